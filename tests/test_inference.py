"""The sampling entry points: the demo grid, runs that go on, and what they say about bad input."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from LightningDiT import files, inference
from LightningDiT.console import duration, run_main
from LightningDiT.errors import LightningDiTError
from LightningDiT.sampling import resumable_run
from LightningDiT.sampling.options import IMAGENET_DEMO_CLASSES, demo_classes


def sample(folder: Path, *arguments: str) -> int:
    command = ["--config", str(folder / "config.yaml"), "--output", str(folder / "out"), *arguments]
    return run_main(lambda: inference.main(command))


@pytest.mark.parametrize(("options", "name"), [(["--num-samples", "2"], "out_preview.png"), (["--demo"], "")])
def test_a_dry_run_names_a_preview_that_would_be_replaced(
    options: list[str], name: str, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    strip = tiny_folder / (name or "out/demo_preview.png")
    strip.parent.mkdir(exist_ok=True)
    strip.write_text("mine")
    assert sample(tiny_folder, *options, "--preview", "1", "--dry-run") == 1
    assert f"{strip} cannot be written" in capsys.readouterr().err
    assert strip.read_text() == "mine"


def test_a_dry_run_draws_no_endless_list(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sample(tiny_folder, "--num-samples", str(inference.MOST_DRAWN + 1), "--dry-run") == 0
    assert "labels         random, drawn when the run begins" in capsys.readouterr().out


def images_in(folder: Path) -> dict[str, np.ndarray]:
    return {path.name: np.asarray(Image.open(path)) for path in sorted(folder.glob("0*.png"))}


def test_the_demo_writes_one_grid(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sample(tiny_folder, "--demo") == 0
    grid = Image.open(tiny_folder / "out" / "demo_samples.png")
    assert grid.width > 3 * 128  # three classes side by side, enlarged
    assert "3 of 3 images, 3 made now" in capsys.readouterr().out
    assert sample(tiny_folder, "--demo") == 0
    assert "all of them made before" in capsys.readouterr().out


def test_a_folder_of_images_goes_on_where_it_stopped(tiny_folder: Path) -> None:
    assert sample(tiny_folder, "--num-samples", "5", "--seed", "4") == 0
    whole = images_in(tiny_folder / "out")
    assert list(whole) == [f"{number:06d}.png" for number in range(5)]
    for name in ("000001.png", "000004.png"):
        (tiny_folder / "out" / name).unlink()
    kept = (tiny_folder / "out" / "000000.png").stat().st_mtime_ns
    assert sample(tiny_folder, "--num-samples", "5", "--seed", "4", "--batch-size", "1") == 0
    again = images_in(tiny_folder / "out")
    for name, image in whole.items():
        assert np.abs(again[name].astype(int) - image.astype(int)).max() <= 1, name
    assert (tiny_folder / "out" / "000000.png").stat().st_mtime_ns == kept


def test_a_folder_of_other_settings_is_refused(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sample(tiny_folder, "--num-samples", "2") == 0
    before = images_in(tiny_folder / "out")
    assert sample(tiny_folder, "--num-samples", "2", "--seed", "9") == 1
    assert "holds a run of other settings (seed: 0 there, 9 now" in capsys.readouterr().err
    assert sample(tiny_folder, "--num-samples", "2", "--guidance-scale", "3") == 1
    error = capsys.readouterr().err
    assert "(sample.cfg_scale: 2.0 there, 3.0 now)" in error
    assert "choose another --output" in error
    after = images_in(tiny_folder / "out")
    assert all((after[name] == image).all() for name, image in before.items())


def test_the_time_budget_keeps_what_is_done(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter(range(0, 10_000, 20))  # every look at the clock is twenty seconds later
    with monkeypatch.context() as patch:
        patch.setattr(resumable_run.time, "monotonic", lambda: float(next(clock)))
        assert sample(tiny_folder, "--num-samples", "6", "--time-budget", "2") == 0
    done = images_in(tiny_folder / "out")
    assert 0 < len(done) < 6
    assert "run the same command again to continue" in capsys.readouterr().out
    assert sample(tiny_folder, "--num-samples", "6") == 0
    assert len(images_in(tiny_folder / "out")) == 6


def test_an_unfinished_grid_never_replaces_a_whole_one(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sample(tiny_folder, "--demo") == 0
    grid = (tiny_folder / "out" / "demo_samples.png").read_bytes()
    assert sample(tiny_folder, "--demo", "--seed", "2", "--time-budget", "1e-9") == 0
    assert (tiny_folder / "out" / "demo_samples.png").read_bytes() == grid
    assert (tiny_folder / "out" / "demo_samples_unfinished.png").exists()


def test_classes_by_name_and_a_contact_sheet(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sample(tiny_folder, "--demo", "--classes", "sea lion", "cat", "--count", "3") == 0
    assert "3 of 3 images" in capsys.readouterr().out
    assert sample(tiny_folder, "--demo", "--classes", "all", "--dry-run") == 0
    assert "images         3 ->" in capsys.readouterr().out
    assert sample(tiny_folder, "--num-samples", "2", "--classes", "all", "--dry-run") == 0
    assert sample(tiny_folder, "--num-samples", "4", "--classes", "all") == 0
    assert (tiny_folder / "out" / "000003.png").exists()
    assert demo_classes(1000) == list(IMAGENET_DEMO_CLASSES)
    assert demo_classes(31) == list(range(10))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], ["labels         balanced, 1 or 2 images of each of 3 classes"]),
        (
            ["--labels", "balanced"],
            [
                "labels         balanced, 1 or 2 images of each of 3 classes",
                "note           4 images are no multiple of 3 classes: 1 of these have 2 images, the others 1",
            ],
        ),
        (
            ["--classes", "dog", "cat"],
            [
                "classes        1 dog; 0 cat, house cat",
                "labels         balanced over 2 of 3 classes, 2 images of each",
            ],
        ),
    ],
)
def test_a_dry_run_says_the_classes_of_the_run(
    options: list[str], said: list[str], tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for more in (["--dry-run"], []):
        assert sample(tiny_folder, "--num-samples", "4", *options, *more) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line for line in lines if line.startswith(("classes ", "labels ", "note "))] == said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--demo", "--classes", "3"], "class 3 is out of range; 0 to 2 are expected"),
        (["--demo", "--classes", "catt"], "class 'catt' is unknown; near to it: cat"),
        (["--demo", "--steps", "1"], "--steps is 1; 2 or more"),
        (["--demo", "--guidance-scale", "-3"], "--guidance-scale is -3.0; a scale from 0 to below 10000"),
        (["--demo", "--solver", "eular"], "sampling_method='eular' is unknown"),
        (["--demo", "--solver", "eular", "--dry-run"], "nearest is 'euler'"),
        (["--demo", "--classes", "9", "--dry-run"], "class 9 is out of range"),
        (["--demo", "--count", "9999999999999"], "images may take"),
        (["--num-samples", "9999999999999"], "images may take"),
        (["--demo", "--guide-ckpt", "none.pt"], "shape in sample.guide_ckpt or --guide-ckpt"),
    ],
)
def test_bad_options_are_one_line(
    arguments: list[str], message: str, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sample(tiny_folder, *arguments) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_more_images_than_the_disk_holds_are_refused(tiny_folder: Path) -> None:
    with pytest.raises(LightningDiTError, match=r"999999999999 images may take .* TB, and .* GB free"):
        files.check_space(tiny_folder, 999_999_999_999, 16)
    files.check_space(tiny_folder, 1, 16)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--count", "0"],
        ["--seed", "-1"],
        ["--steps", "many"],
        ["--num-samples", "-5"],
        ["--time-budget", "0"],
        ["--no-such"],
        ["--demo", "--num-samples", "50"],
        ["--num-samples", "5", "--count", "3"],
        ["--demo", "--guide-ckpt", ""],
    ],
)
def test_usage_errors_end_with_two(arguments: list[str], tiny_folder: Path) -> None:
    with pytest.raises(SystemExit) as caught:
        sample(tiny_folder, *arguments)
    assert caught.value.code == 2


def test_a_place_that_cannot_be_written_is_named(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tiny_folder / "out").write_text("a file where the folder should be")
    assert sample(tiny_folder, "--num-samples", "2") == 1
    assert "cannot be written" in capsys.readouterr().err
    assert (tiny_folder / "out").read_text() == "a file where the folder should be"


@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_a_target_that_cannot_be_is_named_before_anything_is_sampled(
    more: list[str], tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tiny_folder / "out.npz").mkdir()
    config = str(tiny_folder / "config.yaml")
    for target, message in (
        ([], "out.npz is a folder; a file to write is expected"),
        ([str(tiny_folder)], f"{tiny_folder} is a folder; a file to write is expected"),
        ([config + "/new/all.npz"], f"all.npz cannot be written ({config} is a file)"),
    ):
        assert sample(tiny_folder, "--num-samples", "1", "--npz", *target, *more) == 1
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert not (tiny_folder / "out").exists()
    assert sample(tiny_folder, "--num-samples", "1", "--npz", str(tiny_folder / "new" / "all.npz"), *more) == 0


@pytest.mark.parametrize("there", ["000000.png", "7.png"])
def test_images_of_another_origin_are_not_taken_for_those_of_a_run(
    there: str, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tiny_folder / "out").mkdir()
    (tiny_folder / "out" / there).write_bytes(b"mine")
    assert sample(tiny_folder, "--num-samples", "2") == 1
    error = capsys.readouterr().err
    assert "out holds images of no known run; fix: choose another --output" in error
    assert error.count("\n") == 1
    assert [path.name for path in (tiny_folder / "out").iterdir()] == [there]
    (tiny_folder / "out" / there).rename(tiny_folder / "out" / "00_dog.png")  # a picture with a caption for a name
    assert sample(tiny_folder, "--num-samples", "2") == 0


def test_a_manifest_that_is_no_json_is_named(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tiny_folder / "out").mkdir()
    (tiny_folder / "out" / "manifest.json").write_text("{")
    assert sample(tiny_folder, "--num-samples", "2") == 1
    assert "manifest.json cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize("changed", ["transformer.safetensors", "tokenizer.safetensors", "latents_stats.pt"])
def test_other_files_of_the_same_size_make_another_run(changed: str, tiny_folder: Path) -> None:
    config = inference.load_config(tiny_folder / "config.yaml")
    name = resumable_run.run_name(resumable_run.manifest_of(config, [0], 0, "float32"))
    assert resumable_run.run_name(resumable_run.manifest_of(config, [0], 0, "float32")) == name
    path = tiny_folder / changed
    content = path.read_bytes()
    path.write_bytes(bytes(byte ^ 1 for byte in content[:100_000]) + content[100_000:])
    assert resumable_run.run_name(resumable_run.manifest_of(config, [0], 0, "float32")) != name


def test_every_call_gets_on_however_small_the_budget(tiny_folder: Path) -> None:
    for done in (2, 4, 5):
        assert sample(tiny_folder, "--num-samples", "5", "--time-budget", "1e-9") == 0
        assert len(images_in(tiny_folder / "out")) == done


def test_a_grid_of_many_pictures_needs_few_open_files(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resource = pytest.importorskip("resource")
    assert sample(tiny_folder, "--demo", "--count", "80", "--steps", "2", "--batch-size", "40") == 0
    (tiny_folder / "out" / "demo_samples.png").unlink()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
    try:
        code = sample(tiny_folder, "--demo", "--count", "80", "--steps", "2", "--batch-size", "40")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert code == 0
    assert (tiny_folder / "out" / "demo_samples.png").exists()


def test_durations_read_well() -> None:
    assert [duration(seconds) for seconds in (3.4, 75, 3600 * 3 + 300)] == ["3 s", "1 min 15 s", "3 h 5 min"]

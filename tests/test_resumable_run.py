"""Runs that end at any moment: killed, interrupted, shared by processes, and the same bytes in the end."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from LightningDiT import console, files
from LightningDiT.compiling import Plan
from LightningDiT.config import load_config, setting_differences
from LightningDiT.console import run_main
from LightningDiT.data.image_sets import open_samples
from LightningDiT.data.labels import Labels
from LightningDiT.errors import LightningDiTError
from LightningDiT.files import LOCK
from LightningDiT.images import to_uint8
from LightningDiT.inference import main
from LightningDiT.sampling import resumable_run
from LightningDiT.sampling.all_gpus import share_run
from LightningDiT.sampling.pipeline import LightningDiTPipeline
from LightningDiT.sampling.preview import Preview, check_preview
from LightningDiT.sampling.resumable_run import (
    ACCELERATION,
    DIGESTS,
    MANIFEST,
    class_folders,
    manifest_of,
    opened_run,
    run_name,
    sample_run,
)
from LightningDiT.seeds import generator_for
from tests.conftest import PROJECT

COUNT = 60
KILLS = 20
#: Makes a whole run, then forks one into another folder for every line on its input: starting Python and the
#: first call of everything take longer than what is tested.
NURSERY = """
import os, sys
sys.path.insert(0, sys.argv[1])
from LightningDiT import inference
from LightningDiT.console import run_main
options = sys.argv[4:]
whole, broken = (["--output", folder, *options] for folder in sys.argv[2:4])
sys.stdout, answers = open(os.devnull, "w"), sys.stdout
assert inference.main(whole) == 0
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        os._exit(run_main(lambda: inference.main(broken)))
    print(child, file=answers, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=answers, flush=True)
"""


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a run but its lock, which is empty and stays."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != LOCK}


def arguments(folder: Path, output: str, *more: str) -> list[str]:
    return ["--config", str(folder / "config.yaml"), "--output", str(folder / output), *more]


@pytest.fixture
def pipe(tiny_folder: Path) -> LightningDiTPipeline:
    return LightningDiTPipeline.from_config(tiny_folder / "config.yaml", device="cpu")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_killed_at_random_moments_and_in_the_end_the_bytes_of_an_unbroken_run(tiny_folder: Path) -> None:
    """Half of the runs are killed at a random moment after their start, and half at one after a new image."""
    folders = [tiny_folder / "whole", tiny_folder / "broken"]
    options = ["--config", tiny_folder / "config.yaml", "--num-samples", str(COUNT), "--batch-size", "3", "--npz"]
    command = [sys.executable, "-c", NURSERY, str(PROJECT), *map(str, folders), *map(str, options)]
    draw, environment = random.Random(1), {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as nursery:
        assert nursery.stdin
        assert nursery.stdout
        broken, whole = folders[1], dict[str, bytes]()
        for kill in range(KILLS):
            before = len(list(broken.glob("0*.png")))
            print(kill, file=nursery.stdin, flush=True)
            child, deadline = int(nursery.stdout.readline()), time.monotonic() + 60
            whole = whole or contents(folders[0])
            while kill % 2 and len(list(broken.glob("0*.png"))) == before and time.monotonic() < deadline:
                time.sleep(0.001)
            time.sleep(draw.uniform(0.0, 0.03))
            os.kill(child, signal.SIGKILL)
            assert int(nursery.stdout.readline()) == -signal.SIGKILL
            for name, data in contents(broken).items() if broken.exists() else ():
                if name == DIGESTS:  # which grows; its last line may be torn
                    assert set(data.split(b"\n")[:-1]) <= set(whole[name].split(b"\n"))
                else:
                    assert name.endswith(".tmp") or data == whole[name], name
        assert 0 < len(list(broken.glob("0*.png"))) < COUNT
        print("to the end", file=nursery.stdin, flush=True)
        nursery.stdout.readline()
        assert nursery.stdout.readline() == "0\n"
        nursery.stdin.close()
    assert contents(broken) == whole
    assert broken.with_suffix(".npz").read_bytes() == folders[0].with_suffix(".npz").read_bytes()


def test_what_a_killed_run_left_is_removed_and_nothing_else(tiny_folder: Path) -> None:
    options = arguments(tiny_folder, "out", "--num-samples", "3")
    assert main(options) == 0
    folder = tiny_folder / "out"
    whole = contents(folder)
    (folder / "000001.png").write_bytes(b"")  # what a power cut can leave
    for torn in (".000001.png", ".000002.png", f".{MANIFEST}", f".{DIGESTS}"):
        (folder / f"{torn}.x1y2z3w4{files.UNFINISHED}").write_bytes(b"half")
    (folder / ".notes.tmp").write_text("mine")
    assert main(options) == 0
    assert contents(folder) == {**whole, ".notes.tmp": b"mine"}


@pytest.mark.parametrize("layout", [(), ("--by-class",)])
def test_a_picture_that_is_not_the_runs_is_made_again(
    layout: tuple[str, ...], tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One of another run, a torn one and an empty one; also leftovers in the folders of classes."""
    options = arguments(tiny_folder, "out", "--num-samples", "6", "--npz", *layout)
    assert main(options) == 0
    folder = tiny_folder / "out"
    paths = sorted(folder.rglob("0*.png"), key=lambda path: path.name)
    whole = {path: path.read_bytes() for path in (*paths, folder / DIGESTS, folder.with_suffix(".npz"))}
    shutil.copy(paths[1], paths[4])
    paths[2].write_bytes(whole[paths[2]][:-9])
    paths[3].write_bytes(b"")
    torn = paths[0].with_name(f".{paths[0].name}.x1y2z3w4{files.UNFINISHED}")
    torn.write_bytes(b"half")
    capsys.readouterr()
    assert main(options) == 0
    said = capsys.readouterr().out
    assert f"images that changed after they were written are made again: {paths[2]} and 1 more\n" in said
    assert "3 of them made now" in said
    assert {path: path.read_bytes() for path in whole} == whole
    assert not torn.exists()
    assert main(options) == 0
    assert "0 of them made now" in capsys.readouterr().out


def test_a_run_without_digests_keeps_its_images(tiny_folder: Path) -> None:
    """As earlier releases left it; digests that are torn, or of other images, harm nothing."""
    options = arguments(tiny_folder, "out", "--num-samples", "4")
    assert main(options) == 0
    folder = tiny_folder / "out"
    digests = (folder / DIGESTS).read_bytes()
    assert digests.decode() == "".join(f"{files.digest(folder / f'00000{n}.png')}  00000{n}.png\n" for n in range(4))
    (folder / DIGESTS).unlink()
    Image.new("RGB", (16, 16)).save(folder / "000002.png")
    kept = (folder / "000002.png").read_bytes()
    assert main(options) == 0
    assert (folder / "000002.png").read_bytes() == kept
    (folder / DIGESTS).write_bytes(
        b"\xff\n" + (folder / DIGESTS).read_bytes() + b"f" * 64 + b"  000009.png\n" + b"0" * 9
    )
    (folder / "000002.png").unlink()
    assert main(options) == 0
    assert (folder / DIGESTS).read_bytes() == digests
    (folder / DIGESTS).unlink()
    (folder / DIGESTS).mkdir()
    with pytest.raises(LightningDiTError, match=f"{DIGESTS} cannot be read .*fix: mv "):
        main(options)


@pytest.mark.usefixtures("one_thread")
def test_two_processes_make_the_folder_of_one(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Four batches for two processes, the last one of a single image."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    options = ["--num-samples", "7", "--seed", "2", "--npz"]
    assert main(arguments(tiny_folder, "one", *options)) == 0
    capfd.readouterr()
    command = ["-m", "LightningDiT.inference", *arguments(tiny_folder, "two", *options, "--preview", "2")]
    assert share_run(command, [0, 1]) == 0
    said = capfd.readouterr().out
    assert said.count("7 of 7 images") == 1
    assert "7 of them made now" in said
    assert contents(tiny_folder / "two") == contents(tiny_folder / "one")
    assert (tiny_folder / "two.npz").read_bytes() == (tiny_folder / "one.npz").read_bytes()
    assert Image.open(tiny_folder / "two_preview.png").width > 2 * 128


def interrupt_in(monkeypatch: pytest.MonkeyPatch, batch: int, times: int = 1) -> None:
    """Send this process Ctrl-C while it samples its `batch`-th batch, counted from 1."""
    plain, count = LightningDiTPipeline._solve, itertools.count(1)

    def sample(*inputs: Any) -> Any:
        if next(count) == batch:
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)
        return plain(*inputs)

    monkeypatch.setattr(LightningDiTPipeline, "_solve", sample)


def test_ctrl_c_ends_after_the_batch_with_everything_written(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    options = ["--num-samples", "6", "--npz"]
    assert main(arguments(tiny_folder, "whole", *options)) == 0
    with monkeypatch.context() as patch:
        interrupt_in(patch, 1)
        assert run_main(lambda: main(arguments(tiny_folder, "out", *options))) == 130
    said = capfd.readouterr()
    assert "2 of 6 images" in said.out
    assert "Ctrl-C again ends at once" in said.err
    assert "the same command goes on from there" in said.err
    assert sorted(contents(tiny_folder / "out")) == ["000000.png", "000001.png", DIGESTS, MANIFEST]
    assert not (tiny_folder / "out.npz").exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert main(arguments(tiny_folder, "out", *options)) == 0
    assert contents(tiny_folder / "out") == contents(tiny_folder / "whole")


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_a_folder_that_is_removed_meanwhile_is_an_error(
    batch: int, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the end of a time budget, nor images in a folder of no run."""
    plain, count = LightningDiTPipeline._solve, itertools.count(1)

    def sample(*inputs: Any) -> Any:
        if next(count) == batch:
            shutil.rmtree(tiny_folder / "out")
        return plain(*inputs)

    with monkeypatch.context() as patch:
        patch.setattr(LightningDiTPipeline, "_solve", sample)
        with pytest.raises(
            LightningDiTError, match=r"out or files in it were removed while .* fix: run the same comma"
        ):
            main(arguments(tiny_folder, "out", "--num-samples", "6"))
    assert main(arguments(tiny_folder, "out", "--num-samples", "6")) == 0


def test_an_image_that_is_removed_meanwhile_is_an_error(
    pipe: LightningDiTPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, count = LightningDiTPipeline._solve, itertools.count(1)

    def sample(*inputs: Any) -> Any:
        if next(count) == 2:
            (tmp_path / "run" / "000000.png").unlink()
        return plain(*inputs)

    monkeypatch.setattr(LightningDiTPipeline, "_solve", sample)
    with pytest.raises(LightningDiTError, match="or files in it were removed"):
        sample_run(pipe, [0, 1, 2, 0], 0, tmp_path / "run", None)


def test_ctrl_c_twice_ends_at_once(pipe: LightningDiTPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        interrupt_in(patch, 2, times=2)
        with pytest.raises(KeyboardInterrupt):
            sample_run(pipe, [0, 1, 2, 0], 0, tmp_path / "run", None)
    assert sorted(contents(tmp_path / "run")) == ["000000.png", "000001.png", DIGESTS, MANIFEST]


def test_the_grid_of_a_demo_that_was_interrupted_is_written(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt_in(monkeypatch, 1)
    assert run_main(lambda: main(arguments(tiny_folder, "out", "--demo"))) == 130
    assert (tiny_folder / "out" / "demo_samples.png").exists()


def test_a_difference_is_named_by_its_key() -> None:
    there = {"seed": 0, "labels": [1, 2, 3], "sample": {"last_step": None, "mode": "SDE"}, "weights": {"a": "x"}}
    now = {"seed": 0, "labels": [1, 0, 3], "sample": {"mode": "SDE", "cfg_scale": 3.0}, "weights": {"a": "y"}}
    assert setting_differences(there, there) == []
    assert sorted(setting_differences(there, now)) == [
        "labels[1]: 2 there, 0 now",
        "sample.cfg_scale: default there, 3.0 now",
        "sample.last_step: null there, default now",
        "weights.a: x there, y now",
    ]
    assert setting_differences({"labels": [1]}, {"labels": [1, 2]}) == ["labels: 1 there, 2 now"]


def test_the_guide_belongs_to_the_run_by_its_content(tiny_folder: Path) -> None:
    config = load_config(tiny_folder / "config.yaml")
    assert "guide" not in manifest_of(config, [0], 0, "float32")["weights"]
    manifests = []
    for name, content in (("a", "transformer"), ("b", "transformer"), ("c", "tokenizer")):
        shutil.copy(tiny_folder / f"{content}.safetensors", tiny_folder / f"{name}.safetensors")
        guided = replace(config.sample, guide_ckpt=str(tiny_folder / f"{name}.safetensors"))
        manifests.append(manifest_of(replace(config, sample=guided), [0], 0, "float32"))
    assert manifests[0] == manifests[1]  # wherever the file lies
    assert manifests[0]["weights"]["guide"] == manifests[0]["weights"]["transformer"]
    (difference,) = setting_differences(manifests[0], manifests[2])
    assert difference.startswith("weights.guide: ")


@pytest.mark.parametrize(
    ("section", "change", "said"),
    [
        ("transport", {"path_type": "GVP"}, "transport.path_type: default there, GVP now"),
        ("model", {"use_qknorm": True}, "model.use_qknorm: default there, true now"),
        ("data", {"latent_multiplier": 0.5}, "latents.multiplier: 1.0 there, 0.5 now"),
        ("data", {"latent_norm": False}, "latents.norm: true there, false now"),
    ],
)
def test_every_section_that_the_pixels_depend_on_belongs_to_the_run(
    section: str, change: dict[str, object], said: str, tiny_folder: Path
) -> None:
    config = load_config(tiny_folder / "config.yaml")
    other = replace(config, **{section: replace(getattr(config, section), **change)})
    there, now = (manifest_of(one, [0], 0, "float32") for one in (config, other))
    assert said in setting_differences(there, now)


def test_the_solvers_belong_to_the_run_by_their_content(tiny_folder: Path) -> None:
    config, file = load_config(tiny_folder / "config.yaml"), tiny_folder / "solvers.yaml"
    solved, manifests = replace(config, sample=replace(config.sample, solver_file=str(file))), []
    for content in ("a", "b"):
        file.write_text(content)
        manifests.append(manifest_of(solved, [0], 0, "float32"))
    (difference,) = setting_differences(*manifests)
    assert difference.startswith("weights.solvers: ")


def test_two_runs_do_not_write_one_folder(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    manifest = {"seed": 1}
    with (
        opened_run(tmp_path, manifest),
        pytest.raises(LightningDiTError, match="another run writes into"),
        opened_run(tmp_path, manifest),
    ):
        pass
    with opened_run(tmp_path, manifest):
        assert json.loads((tmp_path / MANIFEST).read_text()) == manifest


@pytest.mark.parametrize(("module", "moment"), [(files, "try_lock"), (resumable_run, "atomic_path")])
def test_one_of_two_runs_that_start_together_enters(
    module: ModuleType, moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one, of other settings, starts just before the first takes the lock, or writes its manifest."""
    pytest.importorskip("fcntl")
    plain, held, entered = getattr(module, moment), ExitStack(), list[int]()

    def enter(stack: ExitStack, seed: int) -> None:
        with suppress(LightningDiTError):
            stack.enter_context(opened_run(tmp_path, {"seed": seed}))
            entered.append(seed)

    def late(argument: Any) -> Any:
        monkeypatch.setattr(module, moment, plain)
        enter(held, 2)
        return plain(argument)

    monkeypatch.setattr(module, moment, late)
    with held:
        enter(held, 1)
        assert entered == [{"try_lock": 2, "atomic_path": 1}[moment]]
        assert json.loads((tmp_path / MANIFEST).read_text()) == {"seed": entered[0]}


def test_the_precision_that_is_computed_in_belongs_to_the_run(pipe: LightningDiTPipeline, tmp_path: Path) -> None:
    sample_run(pipe, [0], 0, tmp_path, None)
    pipe.to("cpu", torch.bfloat16)
    with pytest.raises(LightningDiTError, match=r"\(precision: float32 there, bfloat16 now\)"):
        sample_run(pipe, [0], 0, tmp_path, None)


def test_tf32_is_the_float32_of_a_machine_without_it(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run that began in fp32 goes on, and one word says why that is no other precision."""
    options, folder = arguments(tiny_folder, "out", "--num-samples", "3"), tiny_folder / "out"
    assert main([*options, "--precision", "fp32"]) == 0
    whole = contents(folder)
    (folder / "000001.png").unlink()
    with pytest.warns(UserWarning, match="^precision tf32 computes as fp32 here: TF32 needs a GPU of") as said:
        assert main([*options, "--precision", "tf32"]) == 0
    assert len(said) == 1
    assert {name: contents(folder)[name] for name in whole if name.endswith(".png")} == {
        name: content for name, content in whole.items() if name.endswith(".png")
    }
    assert json.loads(whole[MANIFEST])["precision"] == "float32"
    edit_manifest(folder, precision="tf32")
    with pytest.raises(LightningDiTError, match=r"\(precision: tf32 there, float32 now\)"):
        main([*options, "--precision", "fp32"])


def test_a_batch_that_follows_from_the_memory_is_said_and_kept(
    pipe: LightningDiTPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first batches of 2 of 5 images, as the memory was; the run goes on with them in more memory."""
    monkeypatch.setattr(LightningDiTPipeline, "batch_follows_memory", lambda pipe, sample: True)
    monkeypatch.setattr(LightningDiTPipeline, "plan", lambda pipe, images, batch: Plan(batch=batch))
    for memory in (2, 3):
        monkeypatch.setattr(LightningDiTPipeline, "batch_size", lambda pipe, sample, processes=1, most=memory: most)
        sample_run(pipe, [0] * 5, 0, tmp_path, None)
        said = capsys.readouterr().out
        assert "batch size     2, by the GPU's free memory when the run began\n" in said and "note:" not in said
        for path in tmp_path.glob("00000[0-3].png"):
            path.unlink()
    assert json.loads((tmp_path / MANIFEST).read_text())[ACCELERATION]["batch"] == 2


def test_a_short_deterministic_run_pads_to_the_batch_of_a_long_one(pipe: LightningDiTPipeline, tmp_path: Path) -> None:
    """Two images at four a batch, so that the same images of a run of many have the same bits."""
    sample = replace(pipe.config.sample, deterministic=True, per_proc_batch_size=4)
    sample_run(pipe.with_sample(sample), [0, 1], 0, tmp_path, None)
    assert json.loads((tmp_path / MANIFEST).read_text())[ACCELERATION]["batch"] == 4


def edit_manifest(folder: Path, **change: object) -> None:
    file = folder / MANIFEST
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))


def test_what_a_run_began_with_is_what_it_goes_on_with(
    tiny_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options, folder = arguments(tiny_folder, "out", "--num-samples", "6"), tiny_folder / "out"
    assert main(options) == 0
    assert "acceleration   none (on a CPU compiling pays only for long runs" in capsys.readouterr().out
    whole = contents(folder)
    kept = json.loads(whole[MANIFEST])[ACCELERATION]
    assert (kept["graphs"], kept["compiled"], kept["batch"]) == (False, "", None)
    edit_manifest(folder, **{ACCELERATION: {"batch": 3, "reason": "as chosen"}})
    (folder / "000004.png").unlink()
    seen, plain = [], LightningDiTPipeline._solve

    def spy(pipe: LightningDiTPipeline, solver: object, labels: list[int], *inputs: Any) -> Any:
        seen.append((len(labels), inputs[-1].batch))
        return plain(pipe, solver, labels, *inputs)

    with monkeypatch.context() as patch:
        patch.setattr(LightningDiTPipeline, "_solve", spy)
        assert main([*options, "--batch-size", "2"]) == 0
    assert seen == [(3, 3)]
    said = capsys.readouterr().out
    assert f"note: the run in {folder} keeps its batches of 3 images\n" in said
    assert "acceleration   batches padded to 3 (as chosen)\n" in said
    same = [np.asarray(Image.open(folder / "000004.png")).astype(int)]
    (folder / "000004.png").write_bytes(whole["000004.png"])
    assert np.abs(same[0] - np.asarray(Image.open(folder / "000004.png"))).max() <= 1


@pytest.mark.parametrize(
    ("plan", "more", "message"),
    [
        ({"graphs": True}, (), "computes by graphs, and here graphs need a GPU"),
        ({}, ("--compile",), "computes without compiled code, and compile is on"),
        ({"compiled": "whole"}, ("--compile", "off"), "computes by compiled code, and compile is off"),
        ({"compiled": "all"}, (), "compiled is 'all'; block, whole or nothing is expected"),
        ({"batch": [4]}, (), r"batch is \[4\]; int or nothing is expected"),
        (7, (), "acceleration is 7; a mapping of keys to values is expected"),
    ],
)
def test_a_plan_that_cannot_be_kept_ends_the_run(
    plan: object, more: tuple[str, ...], message: str, tiny_folder: Path
) -> None:
    options, folder = arguments(tiny_folder, "out", "--num-samples", "2"), tiny_folder / "out"
    assert main(options) == 0
    edit_manifest(folder, **{ACCELERATION: plan})
    with pytest.raises(LightningDiTError, match=rf"{folder}.*{message}; fix: choose another --output"):
        main([*options, *more])


def test_runs_from_before_the_plans_go_on(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a plan, and with the old switch among the settings."""
    options, folder = arguments(tiny_folder, "out", "--num-samples", "3"), tiny_folder / "out"
    assert main(options) == 0
    content = json.loads((folder / MANIFEST).read_text())
    del content[ACCELERATION]
    for sample, said in ((content["sample"], "none"), ({**content["sample"], "compile": True}, "compiled forward")):
        (folder / MANIFEST).write_text(json.dumps({**content, "sample": sample}))
        assert main(options) == 0
        assert f"acceleration   {said} (as the run began)\n" in capsys.readouterr().out


def test_how_a_run_computes_is_no_part_of_its_name(tiny_folder: Path) -> None:
    config = load_config(tiny_folder / "config.yaml")
    names = {
        value: run_name(manifest_of(replace(config, sample=replace(config.sample, **{key: value})), [0], 0, "float32"))
        for key, value in (("compile", "auto"), ("compile", "on"), ("compile", "off"), ("deterministic", True))
    }
    assert names["auto"] == names["on"] == names["off"] != names[True]


def test_the_strip_shows_the_predictions_of_the_data(pipe: LightningDiTPipeline, tmp_path: Path) -> None:
    """Euler's prediction x + (1 - t) v from the model itself, against the pixels of the strip."""
    state = torch.randn(1, 4, 8, 8, generator=generator_for(5, 0))
    expected, times = [], torch.linspace(0, 1, 4)
    with torch.inference_mode():
        for start, end in itertools.pairwise(times):
            t = start.expand(1)
            unconditional = pipe.transformer(state, t, torch.tensor([3]))
            guided = unconditional + 2.0 * (pipe.transformer(state, t, torch.tensor([1])) - unconditional)
            prediction = state + (1 - start) * guided
            expected.append(to_uint8(pipe.tokenizer.decode(prediction)).numpy()[0])
            state = state + (end - start) * guided
    sample_run(pipe, [1], 5, tmp_path / "run", None, preview=Preview(1, tmp_path / "strip.png"))
    strip = np.asarray(Image.open(tmp_path / "strip.png")).astype(int)
    for column, image in enumerate(expected):
        left = 4 + column * (128 + 4)  # 16 pixels enlarged by 8, with a margin of 4
        assert np.abs(strip[4 : 4 + 128 : 8, left : left + 128 : 8] - image).max() <= 1, column
    last = np.asarray(Image.open(tmp_path / "run" / "000000.png"))
    assert np.abs(strip[4 : 4 + 128 : 8, 4 + 2 * 132 : 4 + 2 * 132 + 128 : 8] - last).max() <= 1


@pytest.mark.parametrize(("every", "panels"), [(2, 2), (3, 1), (99, 1)])
def test_a_strip_ends_with_the_last_step(every: int, panels: int, pipe: LightningDiTPipeline, tmp_path: Path) -> None:
    sample_run(pipe, [0, 1, 2], 0, tmp_path / "run", None, preview=Preview(every, tmp_path / "strip.png"))
    assert Image.open(tmp_path / "strip.png").width == 4 + panels * (128 + 4)
    check_preview(tmp_path / "strip.png", tmp_path / "none")  # which may be replaced
    Image.new("RGB", (4, 4)).save(tmp_path / "other.png")
    check_preview(tmp_path / "other.png", tmp_path / "run")  # of an earlier release, without a mark
    with pytest.raises(LightningDiTError, match="other.png"):
        check_preview(tmp_path / "other.png", tmp_path / "none")


def test_a_strip_shows_what_is_made_again_and_no_later_batch(pipe: LightningDiTPipeline, tmp_path: Path) -> None:
    """A batch with an end that is not finite, the same one in float32, and the next one, as a pipeline reports them."""
    strip = Preview(1, tmp_path / "strip.png")
    strip.start(pipe, 0, [0, 1])
    good = torch.randn(2, 2, 4, 8, 8, generator=generator_for(3, 0))  # (K, N, C, h, w)
    for states in (torch.stack((good[0], good[1] / 0)), good, 2 * good):
        for step, state in enumerate(states):
            strip(step, (step + 1) / 2, state)
    strip.save()
    pixels = np.asarray(Image.open(tmp_path / "strip.png")).astype(int)
    assert pixels.shape[1] == 4 + 2 * (128 + 4)
    with torch.inference_mode():
        last = to_uint8(pipe.tokenizer.decode(good[1])).numpy()  # at t = 1 the prediction is the state
    for row in range(2):
        top = 4 + row * (pixels.shape[0] - 4) // 2
        assert np.abs(pixels[top : top + 128 : 8, 136 : 136 + 128 : 8] - last[row]).max() <= 1


def test_no_strip_where_nothing_is_sampled(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(tiny_folder, "out", "--num-samples", "2")) == 0
    assert main(arguments(tiny_folder, "out", "--num-samples", "2", "--preview", "1")) == 0
    assert "no preview: every image was there" in capsys.readouterr().out
    assert not (tiny_folder / "out_preview.png").exists()
    assert main(arguments(tiny_folder, "demo", "--demo", "--preview", "1")) == 0
    assert (tiny_folder / "demo" / "demo_preview.png").exists()


@pytest.mark.usefixtures("capsys")  # which keeps what is printed in no file
def test_a_full_disk_is_one_line_and_keeps_what_is_whole(pipe: LightningDiTPipeline, tmp_path: Path) -> None:
    """The limit of a process on file sizes stands for the full disk."""
    resource = pytest.importorskip("resource")
    sample_run(pipe, [0, 1], 0, tmp_path / "run", None)
    before = contents(tmp_path / "run")
    (tmp_path / "run" / "000001.png").unlink()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(LightningDiTError, match=r"000001.png cannot be written .*free space"):
            sample_run(pipe, [0, 1], 0, tmp_path / "run", None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert contents(tmp_path / "run") == {name: data for name, data in before.items() if name != "000001.png"}


def test_progress_says_rate_evaluations_and_time_left(
    pipe: LightningDiTPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "PLAIN_INTERVAL", 0.0)
    sample_run(pipe, [0, 1, 2, 0], 0, tmp_path / "run", None)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("  4 of 4 images, ")
    assert "3 evaluations each, about 0 s left" in lines[-1]


def test_a_folder_for_each_class_and_a_manifest_with_names(
    tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same pictures as in one folder; each layout stays what it was, and an evaluation reads both."""
    more = ("--classes", "dog", "house cat", "--count", "5")
    assert main(arguments(tiny_folder, "flat", *more)) == 0
    assert main(arguments(tiny_folder, "tree", *more, "--by-class")) == 0
    assert "classes        1 dog; 0 cat, house cat\n" in capsys.readouterr().out
    flat, tree = tiny_folder / "flat", tiny_folder / "tree"
    found = {path.relative_to(tree).as_posix(): path.read_bytes() for path in tree.rglob("*.png")}
    assert sorted(found) == [
        "cat, house cat/000001.png",
        "cat, house cat/000003.png",
        "dog/000000.png",
        "dog/000002.png",
        "dog/000004.png",
    ]
    assert {Path(name).name: content for name, content in found.items()} == {
        path.name: path.read_bytes() for path in flat.glob("*.png")
    }
    for folder in (flat, tree):
        opened = open_samples(folder)
        assert opened.labels is not None
        names = [(Path(opened.name(n)).stem, int(opened.labels[n])) for n in range(5)]
        assert sorted(names) == [("000000", 1), ("000001", 0), ("000002", 1), ("000003", 0), ("000004", 1)]
        assert opened.class_names == ("cat, house cat", "dog", "sea lion")
    (tree / "dog" / "000002.png").unlink()
    assert main(arguments(tiny_folder, "tree", *more)) == 0
    assert main(arguments(tiny_folder, "flat", *more, "--by-class")) == 0
    assert {path.relative_to(tree).as_posix(): path.read_bytes() for path in tree.rglob("*.png")} == found
    assert not [path for path in flat.iterdir() if path.is_dir()]
    said = capsys.readouterr().out
    assert f"the run in {tree} keeps its layout, one folder a class" in said
    assert f"the run in {flat} keeps its layout, one folder\n" in said


def test_a_run_whose_manifest_has_no_names_goes_on(tiny_folder: Path) -> None:
    options = arguments(tiny_folder, "run", "--num-samples", "4")
    assert main(options) == 0
    file = tiny_folder / "run" / "manifest.json"
    content = json.loads(file.read_text())
    assert content.pop("class_names") == ["cat, house cat", "dog", "sea lion"]
    file.write_text(json.dumps(content))
    (tiny_folder / "run" / "000002.png").unlink()
    assert main(options) == 0
    file.write_text(json.dumps({**content, "class_names": ["dog", "cat, house cat", "sea lion"]}))
    with pytest.raises(LightningDiTError, match=r"class_names\[0\]: dog there, cat, house cat now"):
        main(options)


def test_names_that_no_folder_can_have_are_changed_and_stay_apart() -> None:
    names = ("a/b", "a_b", "A_B", "..", ".x", "", "n" * 100, "n" * 200, "CON: 1\n2")
    folders = class_folders(Labels(len(names), names))
    assert folders == ["a_b", "a_b_1", "A_B_2", "__", "_x", "_", "n" * 60, "n" * 60 + "_7", "CON_ 1_2"]
    assert class_folders(Labels(3)) == ["0", "1", "2"]

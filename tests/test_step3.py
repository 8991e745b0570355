"""Step 3: finding the weights, the configuration that is written, and what is kept."""

from __future__ import annotations

from pathlib import Path

import pytest

import step3_setup_configs as step3
from LightningDiT.config import load_config
from LightningDiT.transport import ADAPTIVE_METHODS, FIXED_METHODS
from setup_steps import configs, machine, weights
from setup_steps.console import StepError
from setup_steps.machine import TorchFacts


@pytest.mark.parametrize(
    ("kind", "memory", "batch"),
    [
        ("published", 16_000_000_000, 16),  # (13.6 - 3.5) / 0.5 = 20, at most 16
        ("published", 8_000_000_000, 6),  # (6.8 - 3.5) / 0.5 = 6.6
        ("published", 4_000_000_000, 1),
        ("bundled", 4_000_000_000, 64),
    ],
)
def test_the_batch_follows_the_memory(kind: str, memory: int, batch: int) -> None:
    assert configs.choose_batch(kind, TorchFacts("2", True, "cuda", "GPU", memory)) == batch


@pytest.fixture
def models(tmp_path: Path, published: dict[str, bytes]) -> Path:
    """A folder with the three files of the 800-epoch model; its path has a space."""
    folder = tmp_path / "my models"
    folder.mkdir()
    for file in weights.files_of("800ep"):
        (folder / file.name).write_bytes(published[file.role])
    return folder


def write_config(models: Path, output: Path, *options: str) -> int:
    return step3.main(["--models-dir", str(models), "--output", str(output), "--model", "800ep", *options])


def test_step3_writes_what_the_library_reads(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "config.yaml"
    assert write_config(models, output, "--print") == 0
    config = load_config(output)
    assert config.ckpt_path == str(models / weights.DIT["800ep"].name)
    assert config.vae.ckpt_path == str(models / weights.VAVAE.name)
    assert config.data.data_path == str(models)
    sample = config.sample
    assert (sample.num_sampling_steps, sample.cfg_scale) == (50, 9.0)
    assert (sample.cfg_interval_start, sample.timestep_shift) == (0.0, 0.0)
    said = capsys.readouterr().out
    assert "cfg_scale: 9.0  # guidance; 1 is off" in said
    assert said.splitlines()[-1] == "Next: python step4_run_inference.py"
    assert [path.name for path in tmp_path.iterdir() if path.suffix] == ["config.yaml"]


def test_step3_again_and_after_an_edit(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "config.yaml"
    write_config(models, output)
    first = output.read_text()
    capsys.readouterr()
    write_config(models, output)
    assert f"{output} was right already" in capsys.readouterr().out
    for number, name in ((4.0, "config.yaml.bak"), (5.0, "config.yaml.bak-1")):
        edited = first.replace("cfg_scale: 9.0", f"cfg_scale: {number}")
        output.write_text(edited)
        write_config(models, output)
        said = capsys.readouterr().out
        assert f"sample.cfg_scale: {number} -> 9.0" in said
        assert said.count("->") == 1
        assert (tmp_path / name).read_text() == edited
        assert output.read_text() == first


def test_step3_keeps_the_good_file_when_the_new_one_is_refused(models: Path, tmp_path: Path) -> None:
    output = tmp_path / "config.yaml"
    write_config(models, output)
    before = output.read_text()
    (models / "latents_stats.pt").write_bytes(b"")
    with pytest.raises(StepError, match=r"is empty \(0 bytes\); mend: python fix_latents_stats.py"):
        write_config(models, output)
    assert output.read_text() == before
    assert [path.name for path in tmp_path.iterdir() if path.suffix] == ["config.yaml"]


def test_step3_names_every_missing_file(tmp_path: Path) -> None:
    with pytest.raises(StepError, match=r"vavae.*latents_stats.*800ep.*--model 800ep"):
        write_config(tmp_path, tmp_path / "config.yaml")


def test_step3_finds_attached_files_at_any_depth(models: Path, tmp_path: Path) -> None:
    attached = tmp_path / "input" / "some-set" / "v1"
    attached.mkdir(parents=True)
    dit = weights.DIT["800ep"].name
    (models / dit).rename(attached / dit)
    output = tmp_path / "config.yaml"
    assert write_config(models, output, "--attached", str(tmp_path / "input")) == 0
    assert load_config(output).ckpt_path == str(attached / dit)


def test_step3_explains_folders_and_files_in_each_others_place(models: Path, tmp_path: Path) -> None:
    output = tmp_path / "config.yaml"
    stats = models / "latents_stats.pt"
    cases = [
        (["--models-dir", str(stats)], "is a file, the folder that holds the weights"),
        (["--stats", str(models)], f"is a folder, a file was expected; mend: .*{stats.name}"),
        (["--checkpoint", str(tmp_path / "none.pt")], "none.pt is not there"),
        (["--stats", str(models / weights.VAVAE.name)], "is not called latents_stats.pt"),
        (["--output", str(models)], "is a folder, a YAML file was expected"),
    ]
    for options, words in cases:
        with pytest.raises(StepError, match=words):
            write_config(models, output, *options)
    stats.rename(models / "moved.pt")
    stats.mkdir()
    with pytest.raises(StepError, match=r"is a folder, the file latents_stats.pt was expected"):
        write_config(models, output)


def test_step3_dry_run_checks_all_and_writes_nothing(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, output = sorted(tmp_path.rglob("*")), tmp_path / "config.yaml"
    assert write_config(models, output, "--dry-run") == 0
    said = capsys.readouterr().out
    assert f"configuration {output}: LightningDiT-XL/1, 1000 classes" in said
    assert f"would write the configuration of the model '800ep' to {output}" in said
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(StepError, match="is a folder, a YAML file was expected"):
        write_config(models, models, "--dry-run")
    (models / "latents_stats.pt").write_bytes(b"")
    with pytest.raises(StepError, match=r"is empty \(0 bytes\); mend: python fix_latents_stats.py"):
        write_config(models, output, "--dry-run")
    assert sorted(tmp_path.rglob("*")) == before


def test_step3_offers_solvers_that_there_are() -> None:
    offered = configs.COMMENTS["sample.sampling_method"].partition(": ")[2].removesuffix(", ...").split(", ")
    assert offered == ["euler", "heun2", "dopri5"]
    assert set(offered) <= {*FIXED_METHODS, *ADAPTIVE_METHODS}


def test_step3_options_that_do_not_go_together(models: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        step3.main(["--checkpoint", str(models / "x.pt")])
    assert ended.value.code == 2


def test_step3_auto_passes_a_damaged_model_over(
    models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With a GPU: one published file is cut short, the other absent, so the bundled model is next."""
    gpu = TorchFacts("2.14.1", True, "cuda", "GPU", 16_000_000_000)
    tried: list[str] = []
    monkeypatch.setattr(machine, "torch_facts", lambda: gpu)
    whole = step3.build

    def build(model: str, *rest: object) -> configs.Config:
        tried.append(model)
        return whole("800ep" if model == "bundled" else model, *rest)

    monkeypatch.setattr(step3, "build", build)
    dit = models / weights.DIT["800ep"].name
    content = dit.read_bytes()
    dit.write_bytes(content[: len(content) // 2])
    with pytest.raises(StepError, match="cut short"):
        step3.main(["--models-dir", str(models), "--output", str(tmp_path / "config.yaml")])
    assert tried == ["800ep", "64ep", "bundled"]
    said = capsys.readouterr().out
    assert "model '800ep' is passed over: " in said
    assert "model '64ep' is passed over: " in said


def test_step3_bundled_settings_with_absolute_paths() -> None:
    assert not weights.missing_bundled()
    config = configs.bundled_config(64)
    for path in (config["ckpt_path"], config["vae"]["ckpt_path"], config["vae"]["model_name"]):
        assert Path(path).is_absolute()
        assert Path(path).is_file()
    assert config["data"]["num_classes"] == 10
    assert "train" not in config


def test_numbers_come_back_from_yaml(tmp_path: Path) -> None:
    import yaml

    values = [1e-06, 9.0, 1e22, 0, True, None, "a: b", "none", [1, "x y"], "微多普勒"]
    text = "".join(f"k{i}: {configs._scalar(value)}\n" for i, value in enumerate(values))
    assert list(yaml.safe_load(text).values()) == values

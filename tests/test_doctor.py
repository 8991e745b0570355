"""`lightningdit doctor`: what it says of versions, device, weights and speed, and when it exits with 1."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from LightningDiT.command import doctor, speed, versions
from LightningDiT.command.versions import inside, requirements
from LightningDiT.config import load_config
from LightningDiT.demo.choices import _model
from LightningDiT.errors import LightningDiTError
from LightningDiT.sampling.pipeline import LightningDiTPipeline
from tests.conftest import BUNDLED, PROJECT


@pytest.fixture
def tiny_clone(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose one configuration is that of the tiny pipeline, as the place where the command is called."""
    folder = tiny_folder / "models" / "tiny"
    folder.mkdir(parents=True)
    for path in [path for path in tiny_folder.iterdir() if path.is_file()]:
        path.rename(folder / path.name)
    monkeypatch.chdir(tiny_folder)
    return folder


def versions_of(monkeypatch: pytest.MonkeyPatch, **here: str | None) -> None:
    """Let packages have these versions, None for an absent one."""
    real = versions.installed_version
    monkeypatch.setattr(versions, "installed_version", lambda name: here[name] if name in here else real(name))


@pytest.mark.parametrize("tested", [">=2.2.0,<2.15", ">=0.17.0,<0.30", ">=1.0.12,<1.1"])
@pytest.mark.parametrize(
    "version", ["2.1.9", "2.2", "2.2.0+cu121", "2.14.1", "2.14.99", "2.15", "2.15.0", "3.0", "0.17", "0.29.1", "1.0.12"]
)
def test_a_range_holds_what_pip_says_it_holds(version: str, tested: str) -> None:
    assert inside(version, tested) == (version in SpecifierSet(tested))


def test_the_ranges_of_a_clone_are_those_of_its_pyproject() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 brings it")
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    extras = {name: lines for name, lines in project["optional-dependencies"].items() if name != "all"}
    expected = {
        (one.name, one.specifier)
        for one in map(Requirement, [*project["dependencies"], *itertools.chain(*extras.values())])
    }
    rows = requirements()
    assert {(row.name, SpecifierSet(row.tested)) for row in rows} == expected
    needed = [row.name for row in rows if not row.extras]
    assert needed == [Requirement(line).name for line in project["dependencies"]]
    assert {row.name: row.extras for row in rows}["matplotlib"] == ("train", "eval", "radar")


def test_the_ranges_of_a_package_are_those_of_its_metadata(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    clone = requirements()
    lines = ["torch<2.15,>=2.2.0", "numpy<2.5,>=1.26.4", 'peft<0.22,>=0.14.0; extra == "lora"']
    lines.append('lightningdit-runnable[demo,train]; extra == "all"')
    monkeypatch.setattr(versions, "PYPROJECT", tmp_path / "pyproject.toml")
    monkeypatch.setattr(versions.metadata, "requires", lambda name: lines)
    assert requirements() == [row for row in clone if row.name in ("torch", "numpy", "peft")]


def test_without_clone_and_package_there_are_no_ranges(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(versions, "PYPROJECT", tmp_path / "pyproject.toml")
    monkeypatch.setattr(versions, "DISTRIBUTION", "no-such-distribution")
    with pytest.raises(LightningDiTError, match="no-such-distribution is not installed, and .*toml is not there"):
        requirements()


def test_a_machine_that_can_make_images_is_ready(
    tiny_clone: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    versions_of(monkeypatch, peft=None, tqdm="99.1")
    monkeypatch.setenv("LIGHTNINGDIT_MODELS", str(tiny_clone))
    (tiny_clone / "vavae-imagenet256-f16d32-dinov2.pt").touch()
    assert doctor.main(["--quick"]) == 0
    said = capsys.readouterr().out
    assert f"torch            {versions.installed_version('torch')} (inside >=2.2.0,<2.15)" in said
    assert "peft             absent (extra lora: python -m pip install 'peft>=0.14.0,<0.22')" in said
    assert "tqdm             99.1 (OUTSIDE >=4.66.5,<4.71, the tested range: python -m pip install 'tqdm>=" in said
    assert "tiny             LightningDiT-XS/2, " in said
    assert f"all files fit ({Path('models', 'tiny', 'config.yaml')})" in said
    assert "fashion-mnist    LightningDiT-XS/2, 9.7 MB, all files fit" in said
    assert f"published        latents_stats.pt, vavae-imagenet256-f16d32-dinov2.pt in {tiny_clone}" in said.replace(
        "vavae-imagenet256-f16d32-dinov2.pt, latents_stats.pt", "latents_stats.pt, vavae-imagenet256-f16d32-dinov2.pt"
    )
    assert "What would run" not in said
    assert said.endswith("ready: images can be made here\n")


def test_what_is_needed_and_absent_is_a_problem(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    versions_of(monkeypatch, timm=None, tqdm=None)
    monkeypatch.setenv("LIGHTNINGDIT_LANG", "zh")
    assert doctor.main([]) == 1
    said = capsys.readouterr().out
    problem = "problem: timm>=1.0.12,<1.1 is needed and absent; fix: python -m pip install 'timm>=1.0.12,<1.1'"
    assert f"{problem}\n  解决办法：运行 python -m pip install 'timm>=1.0.12,<1.1'\n" in said
    assert "timm             ABSENT\n" in said
    assert "Weights" not in said
    assert said.endswith("not ready: 2 to put right · 还不能生成图像：有 2 处需要解决\n")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (LightningDiTError("torch cannot use numpy", "pip install 'numpy<2'"), "torch cannot use numpy; fix: pip inst"),
        (ImportError("libcudart.so: cannot open"), "torch does not import (libcudart.so: cannot open); fix: python -m"),
    ],
)
def test_a_torch_that_fails_is_a_problem(
    error: Exception, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr("LightningDiT.device.best_device", fail)
    assert doctor.main(["--quick"]) == 1
    assert f"problem: {words}" in capsys.readouterr().out


def test_gpus_are_listed_with_whether_a_kernel_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("LightningDiT.device.gpu_count", lambda: 2)
    monkeypatch.setattr("LightningDiT.device.best_device", lambda: torch.device("cpu"))
    monkeypatch.setattr("LightningDiT.device.gpu_name", lambda device: f"card {device.index}" if device.index else None)
    faults = {0: "no kernel image is available", 1: None}
    monkeypatch.setattr("LightningDiT.device.gpu_failure", lambda gpu: faults[gpu.index])
    rows = dict(doctor.device_rows([]))
    assert rows["GPU 0"] == "NOT USED: no kernel image is available"
    assert rows["GPU 1"] == "a kernel ran on card 1"
    assert rows["used"].endswith("precision float32")


def test_a_named_model_that_cannot_be_used_is_a_problem_and_another_is_not(
    tiny_clone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tiny_clone / "tokenizer.safetensors").write_bytes(b"nothing")
    assert doctor.main(["--quick"]) == 0
    assert "tiny             CANNOT BE USED: " in capsys.readouterr().out
    assert doctor.main(["--quick", "--config", str(tiny_clone / "config.yaml")]) == 1
    assert "not ready: 1 to put right" in capsys.readouterr().out


def test_without_any_usable_model_nothing_is_ready(
    tiny_clone: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tiny_clone / "tokenizer.safetensors").write_bytes(b"nothing")
    tiny = {"tiny": _model(tiny_clone / "config.yaml")}
    monkeypatch.setattr("LightningDiT.demo.choices.find_models", lambda folders, named: (tiny, ["x: damaged"]))
    assert doctor.main([]) == 1
    said = capsys.readouterr().out
    assert "left out         x: damaged\n" in said
    assert "What would run" not in said
    assert said.endswith("not ready: 1 to put right\n")


def test_an_image_is_timed_whole_or_from_a_few_evaluations(
    tiny_clone: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(tiny_clone / "config.yaml")
    monkeypatch.setattr(speed, "LONGEST_SECONDS", math.inf)
    whole = speed.speed_of(config)
    assert whole.measured
    assert whole.evaluations == LightningDiTPipeline.from_config(config)(0).nfe
    monkeypatch.setattr(speed, "LONGEST_SECONDS", 0.0)
    part = speed.speed_of(config)
    assert not part.measured
    assert part.evaluations == whole.evaluations
    assert speed.speed_of(load_config(BUNDLED / "config.yaml")).evaluations == 15  # of its calibrated solver
    monkeypatch.setattr(doctor, "HEAVY_BYTES", 0)
    monkeypatch.setattr(speed, "predicted_speed", lambda config: speed.Speed(75.0, 25, measured=False))
    rows = dict(doctor.speed_rows({"tiny": config}, named=False))
    assert rows["tiny"] == f"not measured on a CPU; python -m LightningDiT.command.doctor --config {config.source} does"
    assert rows["published"].startswith(
        "1 min 15 s an image without decoding, 25 evaluations of LightningDiT-XL/1 (pre"
    )
    rows = dict(doctor.speed_rows({"tiny": config, "other": config}, named=True))
    assert rows.keys() == {"tiny", "published"}  # the first one alone is measured
    assert rows["tiny"].endswith(f"{whole.evaluations} evaluations (from a few evaluations measured now)")


def test_the_published_transformer_is_predicted_from_its_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a forward that takes 0.2 s and 0.1 s a block, 28 blocks and 25 evaluations make 25 (0.2 + 2.8) s."""
    config = load_config(doctor.PUBLISHED_CONFIG)
    monkeypatch.setattr(speed, "_forward_seconds", lambda settings, depth, device, dtype: 0.2 + 0.1 * depth)
    predicted = speed.predicted_speed(config)
    assert predicted.seconds == pytest.approx(25 * 3.0)
    assert (predicted.evaluations, predicted.measured) == (25, False)


def test_a_forward_of_so_many_blocks_is_timed(monkeypatch: pytest.MonkeyPatch, tiny_folder: Path) -> None:
    settings, depths = speed.model_settings(load_config(tiny_folder / "config.yaml")), []

    def note(call: Callable[[], torch.Tensor], device: torch.device) -> float:
        assert call().shape == (2, 4, 8, 8)  # an image with and without its class
        return 1.5

    make = speed.make_model
    monkeypatch.setattr(speed, "make_model", lambda settings: depths.append(settings.depth) or make(settings))
    monkeypatch.setattr(speed, "least_seconds", note)
    assert speed._forward_seconds(settings, 3, torch.device("cpu"), torch.float32) == 1.5
    assert depths == [3]


def test_the_least_time_behind_the_first_call_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.accumulate([0, 1, 0, 9, 0, 5, 0, 7])  # seconds of the calls: 1, 9, 5, 7
    monkeypatch.setattr(speed.time, "perf_counter", lambda: next(clock))
    assert speed.least_seconds(lambda: None, torch.device("cpu")) == 5

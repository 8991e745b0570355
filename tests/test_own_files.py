"""A command replaces files that it wrote itself and no others: it refuses before any work, and every file stays."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image

import step4_demo_inference
from LightningDiT import evaluate, evaluate_tokenizer, inference
from LightningDiT.checkpoint import WRITTEN_BY, inspect, load_weights, save_weights, written_by
from LightningDiT.command import gallery
from LightningDiT.errors import LightningDiTError
from LightningDiT.files import holding, json_with, refuse_inputs
from LightningDiT.images import save_png
from LightningDiT.interop import pipeline_folder
from LightningDiT.models.adapters import BASE, KIND, base_digest
from LightningDiT.tokenizer import perceptual
from LightningDiT.tools import (
    choose_tokenizer,
    convert_pipeline,
    convert_tokenizer,
    merge_adapter,
    plot_training,
    prune_latents,
)
from LightningDiT.training.run_dir import RunDir
from setup_steps import project
from tests.conftest import BUNDLED

STRANGE = r"cannot be written \(this program did not write the one that is there\); fix: name another file, or mv "
INPUT = r"cannot be written \(it is an input of this command\)"


def contents(folder: Path) -> dict[str, bytes]:
    """Return the files below a folder, without locks."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith("."))
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def refused(command: Callable[[], object], folder: Path, words: str) -> None:
    """Assert that a command ends in an error with these words and changes nothing below a folder."""
    before = contents(folder)
    with pytest.raises(LightningDiTError, match=words):
        command()
    assert contents(folder) == before


def keeps(command: Callable[[Path], object], folder: Path, *names: str) -> None:
    """Assert that a command keeps a file of someone else under each of the names that it writes, and renews its own."""
    for name in names:
        strange = folder / "strange" / name
        strange.parent.mkdir(parents=True)
        strange.write_text("precious")
        refused(lambda: command(folder / "strange"), folder, rf"{strange.name} {STRANGE}")
        shutil.rmtree(folder / "strange")
    assert command(folder / "own") == 0
    made = contents(folder / "own")
    assert made.keys() >= {*names}
    assert command(folder / "own") == 0
    assert contents(folder / "own").keys() == made.keys()


def pictures(folder: Path) -> str:
    for number in range(2):
        pixels = np.random.RandomState(number).randint(0, 256, (32, 32, 3)).astype(np.uint8)
        save_png(Image.fromarray(pixels), folder / f"{number:06d}.png")
    return str(folder)


# ---- weights


def prune(folder: Path, output: Path) -> int:
    given = ["--weights", str(folder / "tokenizer.safetensors"), "--stats", str(folder / "latents_stats.pt")]
    return prune_latents.main([*given, "--output", str(output)])


def test_prune_latents(tiny_folder: Path) -> None:
    keeps(lambda output: prune(tiny_folder, output / "pruned.safetensors"), tiny_folder, "pruned.safetensors")
    assert inspect(tiny_folder / "own" / "pruned.safetensors").metadata == {WRITTEN_BY: "prune_latents"}
    refused(lambda: prune(tiny_folder, tiny_folder / "tokenizer.safetensors"), tiny_folder, INPUT)
    refused(lambda: prune(tiny_folder, tiny_folder / "transformer.safetensors"), tiny_folder, STRANGE)
    refused(lambda: prune(tiny_folder, tiny_folder / "README.md"), tiny_folder, r"fix: name it README.md.safetensors")
    (tiny_folder / "own" / "pruned.safetensors").replace(tiny_folder / "tokenizer.safetensors")  # its own, an input
    refused(lambda: prune(tiny_folder, tiny_folder / "tokenizer.safetensors"), tiny_folder, INPUT)


def test_merge_adapter(tiny_folder: Path) -> None:
    weights = load_weights(tiny_folder / "transformer.safetensors")
    biases = {name: value + 1 for name, value in weights.items() if name.endswith(".bias")}
    told = {KIND: json.dumps("bias"), BASE: json.dumps(base_digest(weights, biases, weights))}
    save_weights(biases, tiny_folder / "adapter.safetensors", told)
    config = tiny_folder / "config.yaml"
    config.write_text(f"adapter_path: adapter.safetensors\n{config.read_text()}")

    def merge(output: Path) -> int:
        return merge_adapter.main(["--config", str(config), "--output", str(output)])

    keeps(lambda output: merge(output / "whole.safetensors"), tiny_folder, "whole.safetensors")
    for name in ("transformer.safetensors", "adapter.safetensors"):
        refused(lambda name=name: merge(tiny_folder / name), tiny_folder, INPUT)
    refused(lambda: merge(tiny_folder / "README.md"), tiny_folder, "is to be a .safetensors file and is not called so")
    refused(lambda: merge(tiny_folder / "own" / "../tokenizer.safetensors"), tiny_folder, STRANGE)
    assert written_by("merge_adapter")(tiny_folder / "own" / "whole.safetensors")
    assert not written_by("prune_latents")(tiny_folder / "own" / "whole.safetensors")


def convert(source: Path, output: Path) -> int:
    return convert_tokenizer.main(["--tokenizer", str(source), "--output", str(output)])


def test_convert_tokenizer(tiny_folder: Path) -> None:
    """Both ways; a tokenizer of diffusers itself has sorted keys, and one of an earlier release of ours no mark."""
    theirs = ("diffusion_pytorch_model.safetensors", "config.json")
    keeps(lambda output: convert(tiny_folder / "tokenizer.yaml", output), tiny_folder, *theirs)
    own, model = tiny_folder / "own", tiny_folder / "model"
    shutil.copytree(BUNDLED, model)
    refused(lambda: convert(own, model), model, f"tokenizer.safetensors {STRANGE}")
    back = tiny_folder / "back"
    keeps(lambda output: convert(own, output), back, "tokenizer.safetensors", "latents_stats.pt", "tokenizer.yaml")
    weights = own / theirs[0]
    save_weights(load_weights(BUNDLED / "tokenizer.safetensors"), weights, {"format": "pt"})
    assert convert(tiny_folder / "tokenizer.yaml", own) == 0  # config.json beside it is as ours
    values = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps(dict(sorted(values.items())), indent=2) + "\n")
    save_weights(load_weights(BUNDLED / "tokenizer.safetensors"), weights, {"format": "pt"})
    refused(lambda: convert(tiny_folder / "tokenizer.yaml", own), own, STRANGE)


def test_convert_pipeline(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same command goes on in a folder in which it was stopped before the last files."""

    def write(output: Path, config: Path = tiny_folder / "config.yaml") -> int:
        return convert_pipeline.main(["--config", str(config), "--output", str(output)])

    modules = ("lightningdit_pipeline.py", "solver/lightningdit_solver.py", "transformer/lightningdit_transformer.py")
    data = [f"{part}/{name}" for part in ("vae", "transformer") for name in ("diffusion_pytorch_model.safetensors",)]
    keeps(write, tiny_folder, "model_index.json", "solver/config.yaml", "vae/config.json", *data, *modules)
    own = tiny_folder / "own"
    refused(lambda: write(own, own / "solver" / "config.yaml"), tiny_folder, INPUT)
    begun = tiny_folder / "begun"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pipeline_folder, "write_network", Mock(side_effect=KeyboardInterrupt))
        write(begun)
    assert contents(begun).keys() < contents(own).keys()
    assert write(begun) == 0
    assert contents(begun).keys() == contents(own).keys()  # metadata come in any order


# ---- figures and reports


def test_plot_training(tmp_path: Path) -> None:
    log = tmp_path / "run" / "log.jsonl"
    RunDir(log.parent).log({"step": 1, "loss": 0.5})

    def plot(output: Path) -> int:
        return plot_training.main([str(log), "--output", str(output)])

    keeps(lambda output: plot(output / "curves.png"), tmp_path, "curves.png")
    curves = log.with_name("curves.png")
    curves.write_bytes(b"of an earlier release, without a mark")
    assert plot(curves) == 0 and b"of an earlier release" not in curves.read_bytes()
    refused(lambda: plot(log), tmp_path, r"is to be a PNG and is not called so; fix: name it log.jsonl.png")
    log.replace(log.with_suffix(".png"))
    log = log.with_suffix(".png")
    refused(lambda: plot(log), tmp_path, INPUT)


def test_evaluate(tmp_path: Path) -> None:
    """A figure of an earlier release has no mark and is known by the report beside it."""
    images = pictures(tmp_path / "made")

    def run(output: Path) -> int:
        given = ["--samples", images, "--reference", images, "--features", "judge", "--resamples", "2"]
        return evaluate.main([*given, "--output", str(output)])

    keeps(run, tmp_path, "metrics.json", "metrics.png")
    report, figure = tmp_path / "own" / "metrics.json", tmp_path / "own" / "metrics.png"
    save_png(Image.new("RGB", (4, 4)), figure)
    assert run(tmp_path / "own") == 0
    report.unlink()
    assert run(tmp_path / "own") == 0  # the figure's own mark
    report.write_text('{"scores": {}}')
    refused(lambda: run(tmp_path / "own"), tmp_path, rf"metrics.json {STRANGE}")


def test_evaluate_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(perceptual, "VGG_URL", "http://127.0.0.1:9/vgg16-397923af.pth")  # nobody listens there
    given = ["--config", str(BUNDLED / "tokenizer.yaml"), "--images", pictures(tmp_path / "made")]
    given += ["--features", "judge"]

    def run(output: Path) -> int:
        return evaluate_tokenizer.main([*given, "--output", str(output)])

    keeps(run, tmp_path, "evaluation.json", "reconstructions.png")


def test_inference_demo(tiny_folder: Path) -> None:
    """A grid of an earlier release has no mark and lies beside the folder of its run."""

    def run(output: Path) -> int:
        return inference.main(["--config", str(tiny_folder / "config.yaml"), "--demo", "--output", str(output)])

    keeps(run, tiny_folder, "demo_samples.png")
    grid = tiny_folder / "own" / "demo_samples.png"
    save_png(Image.new("RGB", (4, 4)), grid)
    assert run(tiny_folder / "own") == 0
    [made] = (tiny_folder / "own").glob("run-*")
    shutil.rmtree(made)
    assert run(tiny_folder / "own") == 0  # the grid's own mark
    shutil.rmtree(next((tiny_folder / "own").glob("run-*")))
    save_png(Image.new("RGB", (4, 4)), grid)
    refused(lambda: run(tiny_folder / "own"), tiny_folder, rf"demo_samples.png {STRANGE}")


def test_step_4(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The report's title is that of earlier releases; a copy has the bytes of an image of a run in its folder."""
    monkeypatch.setattr(project, "CONFIG", tiny_folder / "config.yaml")

    def run(output: Path) -> int:
        return step4_demo_inference.main(["--output", str(output)])

    keeps(run, tiny_folder, "report.html", "demo_grid.png")
    own = tiny_folder / "own"
    names = [name for name in contents(own) if name.startswith("0") and "/" not in name]
    assert len(names) == 3
    for record in own.glob("run-*/made.json"):
        record.unlink()  # a call that was stopped before it wrote this
    assert run(own) == 0
    save_png(Image.new("RGB", (4, 4)), own / names[1])
    before = contents(own)
    with pytest.raises(LightningDiTError, match=STRANGE):
        run(own)
    after = contents(own)
    assert {name: after[name] for name in names} == {name: before[name] for name in names}


def test_gallery(tiny_folder: Path) -> None:
    def run(output: Path) -> int:
        return gallery.main([str(tiny_folder / "config.yaml"), "--output", str(output)])

    keeps(run, tiny_folder, "README.md", "index.html")


def test_choose_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that it writes beside its report; the report itself is refused by its content."""
    search = SimpleNamespace(output=tmp_path, settings=dict, judge=lambda *_: pytest.fail("nothing is trained"))
    monkeypatch.setattr(choose_tokenizer, "estimate", lambda *_: pytest.fail("nothing is tried"))
    for name in ("chosen.yaml", "as_it_is.png", "fine_tuned.png", "as_it_is/tokenizer.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("precious")
        refused(lambda: choose_tokenizer.figures_of_all(search, ["as_it_is"]), tmp_path, STRANGE)
        (tmp_path / name).unlink()
    (tmp_path / "chosen.yaml").write_text("of ours")
    (tmp_path / "choice.json").write_text('{"settings": {}, "candidates": {}}')
    choose_tokenizer.require_own_files(tmp_path)


# ---- marks


def test_marks(tmp_path: Path) -> None:
    path, test = tmp_path / "a", holding("one", "图")
    assert not test(path)
    for text, known in (("x" * 4093 + "one", True), ("x" * 4094 + "one", False), ("a 图", True), ("On e", False)):
        path.write_text(text, encoding="utf-8")
        assert test(path) is known, text[-5:]
    for text, known in (('{"a": 1, "b": 2, "c": 3}', True), ('{"a": 1}', False), ('["a", "b"]', False), ("{", False)):
        path.write_text(text)
        assert json_with("a", "b")(path) is known, text
    path.write_bytes(b"\x10" + bytes(20))
    assert not written_by("prune_latents")(path)
    (tmp_path / "link").symlink_to(path)
    for name in (path, tmp_path / ".." / tmp_path.name / "a", tmp_path / "link"):
        with pytest.raises(LightningDiTError, match=INPUT):
            refuse_inputs(path, [None, "", tmp_path, "missing", name])
    refuse_inputs(tmp_path / "new", [path, tmp_path / "new"])  # nothing to lose

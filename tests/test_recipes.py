"""The README's recipe for own data and that for few images, run from the folder to the grid, shortened."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest
import yaml
from PIL import Image

from LightningDiT.checkpoint import load_weights
from tests.conftest import PROJECT

CLASSES, EACH = ("bridge", "cat", "tree"), 22  # 66 images: the recipes take batches of 64 at most
SHORTER = {
    "train_tokenizer": ["--max-steps", "2"],
    "train": ["--max-steps", "2"],
    "extract_features": ["--workers", "0"],
}


def commands_of(text: str) -> list[list[str]]:
    """Return the words of each `python -m LightningDiT...` command of a code block."""
    lines = text.replace("\\\n", " ").splitlines()
    return [shlex.split(line)[2:] for line in lines if line.startswith("python -m LightningDiT.")]


def settings_of(text: str) -> str:
    """Return the bundled configuration with the changes of a recipe's YAML block, as a person would edit it."""
    values = yaml.safe_load((PROJECT / "models" / "fashion-mnist" / "config.yaml").read_text())
    del values["data"]["class_names"], values["sample"]["solver_file"]
    for key, value in yaml.safe_load(text).items():
        values[key] = {**values[key], **value} if isinstance(value, dict) else value
    values["data"]["num_classes"] = len(CLASSES)
    return yaml.safe_dump(values)


def section(page: str, heading: str) -> str:
    text = (PROJECT / page).read_text(encoding="utf-8")
    return re.split(r"\n## ", text.split(f"\n## {heading}", 1)[1])[0]


@pytest.mark.parametrize(
    ("page", "heading", "name"),
    [("README.md", "Training your own", "my.yaml"), ("docs/recipes.md", "Small: some hundred images", "small.yaml")],
)
def test_a_recipe_runs_from_the_folder_to_the_grid(
    page: str, heading: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, label in enumerate(CLASSES):
        for index in range(EACH):
            path = tmp_path / "photos" / label / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 32), (80 * number, 10 * index, 99)).save(path)
    (tmp_path / "models").symlink_to(PROJECT / "models")
    monkeypatch.chdir(tmp_path)
    recipe = section(page, heading)
    commands, settings = re.findall(r"```(?:yaml)?\n(.*?)```", recipe, re.S)[:2]
    Path(name).write_text(settings_of(settings))
    demo = re.search(r"python -m LightningDiT\.inference --config \S+ --demo --output output", recipe)
    assert demo is not None
    listed = [one for one in commands_of(commands) if one[0] != "LightningDiT.inference"]
    for module, *options in [*listed, *commands_of(demo.group())]:
        given = ["photos" if option.startswith("FOLDER") else option for option in options]
        entry = importlib.import_module(module)
        assert entry.main([*given, *SHORTER.get(module.rpartition(".")[2], [])]) == 0, module
    with Image.open("output/demo_samples.png") as grid:
        assert grid.width > 3 * 32
    weights = load_weights(yaml.safe_load(Path(name).read_text())["ckpt_path"])
    assert weights["y_embedder.embedding_table.weight"].shape[0] == len(CLASSES) + 1

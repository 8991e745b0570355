"""YAML as data: text stays text, numbers are numbers, and what would grow or run is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from LightningDiT import config, yaml_data
from LightningDiT.errors import LightningDiTError


def test_text_is_literal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stranger's configuration reads neither the environment nor another key."""
    monkeypatch.setenv("HF_TOKEN", "secret")
    path = tmp_path / "config.yaml"
    names = ["${oc.env:HF_TOKEN}", "${ckpt_path}", "${", "${unknown:1}", "???", "2024-01-01"]
    path.write_text(yaml_data.dump({"ckpt_path": "a.pt", "data": {"num_classes": len(names), "class_names": names}}))
    assert list(config.load_config(path).data.class_names) == names
    assert config.read_yaml(path)["data"]["class_names"] == names


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.system ['true']",
        "a: !!python/name:os.system",
        "a: 1\na: 2",
        "a: &a [*a]",
        "\n".join(["a0: &a0 [x, x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12))]),
        "[" * 100_000,
        "\n".join(" " * level + "a:" for level in range(1300)),
        "a: " + "9" * 5000,
        "a: '" + "x" * (yaml_data.MOST_BYTES + 1) + "'",
        "a: [",
        "[1, 2]",
    ],
    ids=lambda text: text[:20],
)
def test_what_runs_or_grows_or_is_no_mapping_is_one_line(text: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(LightningDiTError) as refusal:
        config.read_yaml(path)
    assert len(str(refusal.value)) < 1000
    assert "\n" not in str(refusal.value)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    values = {
        "texts": ["1e-4", "1.5e3", "No", "null", "12", "${a}", " x ", "图", "a: b", "", "2024-01-01"],
        "numbers": [1e-4, 1.5e3, 12, -1.0, float("inf"), 1e-30],
        "others": [None, True, {"a": [], "b": {}}],
        "same": [shared := [1, 2], shared],
    }
    path.write_text(yaml_data.dump(values), encoding="utf-8")
    assert yaml_data.read(path) == values
    path.write_text("")
    assert yaml_data.read(path) == {}


def test_numbers_with_exponents_and_merged_keys(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("a: &a {lr: 2e-4, x: 1.5e3}\nb: {<<: *a, x: 1}\n")
    assert yaml_data.read(path)["b"] == {"lr": 2e-4, "x": 1}
    assert yaml.safe_load(path.read_text())["b"]["lr"] == "2e-4"  # as YAML 1.1 has it

"""The study of adapters: what it holds out, and its tables."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from LightningDiT.config import load_config
from LightningDiT.radar.recording import Cutting, windows_of
from studies import adapter_study
from tests.conftest import BUNDLED


def test_the_last_pass_of_each_walker_is_held_out() -> None:
    pictures, people, held_out = adapter_study.walkers(2, 12, seed=0)
    assert pictures.shape == (24, 1, 32, 32)
    assert people.tolist() == [0] * 12 + [1] * 12
    assert float(pictures.max()) <= 1 and float(pictures.min()) >= -1
    for person in (0, 1):
        passes = [window.pass_ for window in windows_of(0, person, 0, 12, Cutting())]
        assert held_out[people == person].tolist() == [number == max(passes) for number in passes]


def test_a_training_of_the_study_says_what_it_measured(tmp_path: Path) -> None:
    args = adapter_study.parse(["--people", "2", "--windows", "12", "--steps", "2", "--batch", "4", "--looks", "1"])
    config = load_config(BUNDLED / "config.yaml")
    adapter_study.write_latents(tmp_path, config, args)
    threads = torch.get_num_threads()
    try:
        settings = adapter_study.configured(tmp_path, config, args, 0, trainable="bias", lr=1e-3)
        found = adapter_study.trained(replace(settings, train=replace(settings.train, ckpt_every=1)), looks=1)
    finally:
        torch.set_num_threads(threads)
    assert list(found["losses"]) == [0, 2]
    assert found["losses"][2] != found["losses"][0]
    # XS/2: a block has 2 norms of 192, biases of 576, 192, 1024, 192 and 1152; then patches, time, output and 3 classes
    changed = 7 * (2 * 192 + 576 + 192 + 1024 + 192 + 1152) + 192 + 2 * 192 + 192 + 2 * 192 + 24 + 3 * 192
    assert round(found["file"] * 1e6) == 4 * changed
    assert 0.004 < found["share"] < 0.006
    table = adapter_study.parts_table({"settings": "two walkers", "parts": {"bias": {"0.001": found, "1": found}}})
    assert table[-2].startswith(f"| `bias` | {found['share']:.2%} | {found['file']:.2f} | ")


def test_the_table_of_starts_names_the_lowest() -> None:
    runs = {"null": (1.5, 1.2), "mean": (1.4, 1.1), "random": (1.6, 1.3)}
    figures = {
        "settings": "here",
        "starts": {name: [{"losses": {0: first, 8: last}}] * 2 for name, (first, last) in runs.items()},
    }
    lines = adapter_study.starts_table(figures)
    assert "| `mean` | 1.4000 / 1.4000 | 1.1000 / 1.1000 |" in lines
    assert "Lowest at the end: `mean`." in lines

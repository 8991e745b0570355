"""The study of few images: cells that differ in what they say, jobs in order, and the page of known looks."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from LightningDiT.checkpoint import save_weights
from LightningDiT.config import Config, load_config
from LightningDiT.errors import LightningDiTError
from LightningDiT.loading import model_settings
from LightningDiT.models.unet import UNetSettings
from LightningDiT.training.choice import CHOICE_NAME
from studies.small_data import cells, page
from studies.small_data.__main__ import parse
from studies.small_data.jobs import data_jobs, training_jobs


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> cells.Plan:
    start = tmp_path / "start.safetensors"
    save_weights({"weight": torch.zeros(1)}, start)
    monkeypatch.setattr(cells, "WALKERS", str(start))
    return cells.Plan(tmp_path / "study", start, people=4, steps=60, looks=3, seeds=2)


def configs(plan: cells.Plan, seed: int = 0) -> dict[str, Config]:
    cells.write_configs(plan)
    return {cell.name: load_config(plan.config(cell, seed)) for cell in cells.CELLS}


def test_cells_differ_from_the_reference_in_what_they_say(plan: cells.Plan) -> None:
    found = configs(plan)
    reference = found.pop("reference")
    assert len(plan.runs) == 2 * len(cells.CELLS) <= 16 and Path(cells.GARMENTS).is_file()
    changed = {
        name: {key for key in vars(config) if getattr(config, key) != getattr(reference, key)} - {"source", "base_dir"}
        for name, config in found.items()
    }
    assert changed == {
        "lora": {"train"},
        "all": {"train", "optimizer"},
        "scratch": {"train", "optimizer"},
        "garments": {"train", "optimizer"},
        "plain": {"data", "model", "train"},
        "many": {"data"},
        "unet": {"model", "train"},
    }
    train, whole = {name: config.train for name, config in found.items()}, replace(reference.train, trainable="all")
    assert reference.train.trainable == "bias" and train["lora"] == replace(whole, trainable="lora")
    assert train["all"] == whole
    assert train["scratch"] == replace(whole, weight_init=None)
    assert train["garments"] == replace(whole, weight_init=cells.GARMENTS)
    assert train["plain"] == replace(reference.train, choose="last")
    assert isinstance(model_settings(found["unet"]), UNetSettings)
    assert (reference.model.augmentation, found["plain"].model.augmentation) == (5, 0)
    assert configs(plan, 1)["reference"].train == replace(reference.train, global_seed=1)


def test_every_job_comes_after_what_it_needs(plan: cells.Plan) -> None:
    jobs = [*data_jobs(plan), *training_jobs(plan)]
    makes = [job.makes for job in jobs]
    assert len(set(makes)) == len(makes)
    assert Counter(job.command[0] for job in jobs) == {
        "LightningDiT.tools.simulate_walkers": 1,
        "step5_prepare_spectrograms": 1,
        "LightningDiT.extract_features": 5,  # 30 and 100 images in 8 draws, 30 in one, validation beside either
        "LightningDiT.train": 16,
    }
    for at, job in enumerate(jobs):
        for path in makes[at + 1 :]:
            assert str(path) not in job.command, (job.name, path)


def test_what_a_study_needs_is_named(plan: cells.Plan) -> None:
    cells.write_configs(plan)
    cells.write_configs(plan)
    with pytest.raises(LightningDiTError, match="is of a study with other settings; fix: choose another --output"):
        cells.write_configs(replace(plan, people=5))
    with pytest.raises(
        LightningDiTError, match=r"there is no .*unet.safetensors, from which trainings start; fix: pyth"
    ):
        cells.write_configs(replace(plan, unet_start=plan.folder / "unet.safetensors"))


def test_names_of_files_are_those_of_a_training() -> None:
    assert cells.LOOKS == CHOICE_NAME
    assert vars(parse(["--output", "there"]))["steps"] == cells.Plan.steps


def test_the_page_has_the_mean_of_what_each_seed_kept(plan: cells.Plan, tmp_path: Path) -> None:
    for cell, seed in plan.runs:
        folder = plan.run(cell, seed)
        folder.mkdir(parents=True)
        looks = [
            {"step": step, "valid_loss": 1 + step / 100 + seed, "copies": step / 1000, "copies_real": 0.05}
            | {"utility": 0.5, "judge_accuracy": 0.25}
            for step in (20, 40, 60)
        ]
        lines = [{"step": 10.0, "loss": 1.0}, *looks]
        (folder / "log.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
        (folder / (cells.ADAPTER if cell.is_adapter else cells.CHOSEN)).write_bytes(bytes(1_500_000))
        if cell.chooses:
            (folder / cells.LOOKS).write_text(json.dumps({"chosen": 40 - 20 * seed}))
    page.write_page(plan, tmp_path / "radar.md")
    text = (tmp_path / "radar.md").read_text()
    same = "25.0% (25.0%, 25.0%) | 50.0% (50.0%, 50.0%)"
    assert f"| LoRA | 40 / 20 | 1.800 (1.400, 2.200) | {same} | 3.0% (4.0%, 2.0%) | 5.0% | 1.5 |" in text
    assert f"of weights | 60 / 60 | 2.100 (1.600, 2.600) | {same} | 6.0% (6.0%, 6.0%) | 5.0% | 1.5 |" in text
    page.write_page(replace(plan, seeds=1), tmp_path / "radar.md")
    text = (tmp_path / "radar.md").read_text()
    assert "seeds 0:**" in text and "| LoRA | 40 | 1.400 | 25.0% | 50.0% | 4.0% | 5.0% | 1.5 |" in text
    page.write_page(plan, tmp_path / "radar.zh-CN.md")
    text = (tmp_path / "radar.zh-CN.md").read_text()
    assert f"| 每人 100 张图像 | 40 / 20 | 1.800 (1.400, 2.200) | {same} |" in text
    (plan.run(cells.CELLS[1], 0) / "log.jsonl").write_text('{"step": 10}\n')
    with pytest.raises(LightningDiTError, match="has no row with utility and valid_loss"):
        page.write_page(plan, tmp_path / "radar.md")

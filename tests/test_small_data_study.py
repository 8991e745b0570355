"""The study of few images: cells that differ in what they say, jobs in order, and the page of known looks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from LightningDiT.checkpoint import save_weights
from LightningDiT.config import load_config
from LightningDiT.errors import LightningDiTError
from LightningDiT.loading import model_settings
from LightningDiT.models.unet import UNetSettings
from LightningDiT.training.choice import CHOICE_NAME
from studies.small_data import cells, page
from studies.small_data.__main__ import parse
from studies.small_data.jobs import jobs_of


@pytest.fixture
def plan(tmp_path: Path) -> cells.Plan:
    return cells.Plan(tmp_path / "study", people=4, steps=60, looks=3)


def test_cells_differ_from_the_reference_in_what_they_say(plan: cells.Plan) -> None:
    cells.write_configs(plan)
    found = {cell.name: load_config(plan.folder / f"{cell.name}.yaml") for cell in cells.CELLS}
    reference, unet, plain = found["reference"], found["unet"], found["plain"]
    assert (reference.train.choose, plain.train.choose) == ("utility", "last")
    assert (reference.train.patience, plain.train.patience) == (plan.patience, 0)
    assert (Path(reference.data.data_path).name, Path(plain.data.data_path).name) == ("8", "1")
    assert reference.train.weight_init == plain.train.weight_init == found["walkers"].ckpt_path
    assert (reference.model.augmentation, unet.model.augmentation, plain.model.augmentation) == (5, 5, 0)
    assert unet.train.weight_init == found["walkers-unet"].ckpt_path
    assert found["walkers-unet"].train.weight_init is None
    assert (Path(__file__).parents[1] / cells.GARMENTS).is_file()
    assert isinstance(model_settings(unet), UNetSettings)
    assert unet.optimizer == reference.optimizer and unet.data == reference.data
    assert all(config.train.valid_every == config.train.ckpt_every == 20 for config in found.values())


def test_a_start_has_seen_nobody_of_the_test(plan: cells.Plan) -> None:
    starts = {cell.start for cell in cells.CELLS if not cell.others}
    for cell in cells.CELLS:
        assert cell.others == (cell.name in starts), cell.name
    folders = {cell.others: plan.data(cell) for cell in cells.CELLS}
    assert folders[True] != folders[False]


def test_every_job_comes_after_what_it_needs(plan: cells.Plan) -> None:
    jobs = jobs_of(plan)
    makes = [job.makes for job in jobs]
    assert len(set(makes)) == len(makes)
    for at, job in enumerate(jobs):
        if job.command[0] == "LightningDiT.train":
            assert job.command[-2:] == ("--output", str(job.makes.parent))
        for path in makes[at + 1 :]:
            assert str(path) not in job.command, (job.name, path)
    order = [job.name for job in jobs]
    assert order.index("walkers") < order.index("reference") < order.index("unet")


def test_another_plan_does_not_take_the_folder(plan: cells.Plan) -> None:
    cells.write_configs(plan)
    cells.write_configs(plan)
    with pytest.raises(LightningDiTError, match="is of a study with other settings; fix: choose another --output"):
        cells.write_configs(cells.Plan(plan.folder, people=5, steps=60, looks=3))


def test_names_of_files_are_those_of_a_training() -> None:
    assert cells.LOOKS == CHOICE_NAME
    assert vars(parse(["--output", "there"]))["steps"] == cells.Plan.steps


def test_the_page_has_the_kept_step_beside_the_last(plan: cells.Plan, tmp_path: Path) -> None:
    for number, cell in enumerate(cell for cell in cells.CELLS if not cell.others):
        folder = plan.folder / cell.name
        folder.mkdir(parents=True)
        looks = [
            {"step": step, "valid_loss": 1 + step / 100, "copies": step / 1000, "copies_real": 0.05, "utility": 0.5}
            | {"judge_accuracy": 0.25 * (number + 1)}
            for step in (20, 40, 60)
        ]
        lines = [{"step": 10.0, "loss": 1.0}, *looks]
        (folder / "log.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
        save_weights({"weight": torch.zeros(250_000)}, folder / cells.CHOSEN)
        if cell.chooses:
            (folder / cells.LOOKS).write_text(json.dumps({"chosen": 40}))
    target = tmp_path / "page.md"
    page.write_page(plan, target)
    text = target.read_text()
    assert "| transformer | 40 | 60 | 1.400 | 1.600 | 4.0% | 6.0% | 5.0% | 50.0% | 25.0% | 1.0 |" in text
    assert "no early stop | 60 | 60 | 1.600 | 1.600 | 6.0% | 6.0% | 5.0% | 50.0% | 75.0% | 1.0 |" in text
    (plan.folder / "unet" / "log.jsonl").write_text('{"step": 10}\n')
    with pytest.raises(LightningDiTError, match="has no row with utility and valid_loss"):
        page.write_page(plan, target)

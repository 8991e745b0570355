"""The making of models/walkers: jobs in order, settings that a training reads, and the files that it writes."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from LightningDiT.checkpoint import inspect, load_weights, save_weights
from LightningDiT.config import as_yaml, load_config
from LightningDiT.files import write_text
from LightningDiT.loading import model_settings
from LightningDiT.models.lightningdit import LightningDiTSettings
from LightningDiT.models.unet import UNetSettings
from LightningDiT.tokenizer.latents import LatentStats
from studies import pretrain_walkers
from studies.small_data.cells import Plan
from studies.small_data.jobs import SEED


def test_every_job_comes_after_what_it_needs(tmp_path: Path) -> None:
    args = pretrain_walkers.parse(["--work", str(tmp_path), "--people", "3"])
    jobs = pretrain_walkers.jobs_of(args)
    makes = [job.makes for job in jobs]
    for at, job in enumerate(jobs):
        for path in makes[at + 1 :]:
            assert str(path) not in job.command, (job.name, path)
    assert [job.name for job in jobs][-2:] == ["transformer", "unet"]


def test_both_networks_are_trained_alike_from_their_starts(tmp_path: Path) -> None:
    found = {}
    for name in (pretrain_walkers.TRANSFORMER, pretrain_walkers.UNET):
        write_text(tmp_path / f"{name}.yaml", as_yaml(pretrain_walkers.training_values(tmp_path, name, 40, 5)))
        found[name] = load_config(tmp_path / f"{name}.yaml")
    transformer, unet = found.values()
    assert isinstance(model_settings(transformer), LightningDiTSettings)
    assert isinstance(model_settings(unet), UNetSettings)
    assert (transformer.data, transformer.optimizer) == (unet.data, unet.optimizer)
    assert Path(transformer.train.weight_init).is_file() and unet.train.weight_init is None
    assert Plan.unet_start == Path("output/pretrain_walkers/unet/transformer.safetensors")


def test_the_study_has_other_people(tmp_path: Path) -> None:
    assert pretrain_walkers.SEED != SEED


def test_the_model_has_half_precision_and_names_that_nobody_has(tmp_path: Path) -> None:
    work, output = tmp_path / "work", tmp_path / "model"
    weights = {"weight": torch.tensor([1.0, 0.1]), "steps": torch.tensor(7)}
    save_weights(weights, work / "tokenizer/tokenizer.safetensors", {"kind": "tokenizer"})
    save_weights(weights, work / "transformer/transformer.safetensors", {"class_names": '["01", "02"]', "other": "1"})
    stats = LatentStats(torch.tensor([0.5, 1.0]).view(1, 2, 1, 1), torch.tensor([2.0, 3.0]).view(1, 2, 1, 1))
    (work / "latents").mkdir()
    stats.save(work / "latents/latents_stats.pt")
    pretrain_walkers.write_model(work, output)
    for name in ("tokenizer", "transformer"):
        written = load_weights(output / f"{name}.safetensors")
        assert torch.equal(written["weight"], weights["weight"].half()) and written["steps"].dtype == torch.int64
    metadata = inspect(output / "transformer.safetensors").metadata
    assert json.loads(metadata["class_names"]) == ["simulated walker 01", "simulated walker 02"]
    assert metadata["other"] == "1"
    assert inspect(output / "tokenizer.safetensors").metadata == {"kind": "tokenizer"} | stats.as_metadata()
    assert torch.equal(LatentStats.load(output / "latents_stats.pt").std, stats.std)

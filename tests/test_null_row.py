"""A null row that was never trained: by the file's word, by its values, and what is refused then."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from LightningDiT.checkpoint import load_weights, save_weights
from LightningDiT.config import Config, SampleConfig, TrainConfig, load_config
from LightningDiT.errors import LightningDiTError
from LightningDiT.models.lightningdit import CLASS_TABLE, CONDITION_TABLE
from LightningDiT.sampling.dry_run import verify
from LightningDiT.sampling.null_row import check_guidance, is_initial, null_failure, null_failure_of
from LightningDiT.sampling.pipeline import LightningDiTPipeline
from tests.conftest import BUNDLED
from tests.test_conditions import write_model

REFUSED = "guidance of scale 2 needs it; fix: sample with the guidance scale 1, or train with train.label_dropout: 0.1"


def table(rows: float, null: float, width: int = 192, seed: int = 0) -> Tensor:
    """Return the table (32, width) of 31 classes with normal rows of these deviations."""
    values = torch.randn(32, width, generator=torch.Generator().manual_seed(seed))
    return values * torch.tensor([rows] * 31 + [null])[:, None]


@pytest.mark.parametrize(
    ("rows", "null", "refused"),
    [(0.1, 0.02, True), (0.071, 0.02, True), (0.069, 0.02, False), (0.1, 0.028, False), (0.1, 0.1, False)],
)
def test_the_values_tell_where_the_other_rows_have_grown(rows: float, null: float, refused: bool) -> None:
    assert bool(null_failure(Config(), {CLASS_TABLE: table(rows, null)})) == refused


def test_initial_values_are_told_from_others() -> None:
    """Of 1000 rows of initial values few are taken for trained; one with a mean or a direction is none."""
    assert sum(is_initial(table(0.1, 0.02, seed=seed)) for seed in range(1000)) > 980
    values = table(0.1, 0.02)
    for shift in (torch.full((192,), 0.012), 0.5 * values[:-1].mean(0)):
        moved = values.clone()
        moved[-1] = (moved[-1] + shift) * 0.02 / (moved[-1] + shift).square().mean().sqrt()  # the size of before
        assert not is_initial(moved)


def test_settings_without_label_dropout_make_initial_values_enough() -> None:
    config = Config(train=TrainConfig(label_dropout=0.0), source="a.yaml")
    assert "and train.label_dropout is 0 in a.yaml" in null_failure(config, {CLASS_TABLE: table(0.03, 0.02)})
    assert null_failure(config, {CLASS_TABLE: table(0.03, 0.03)}) == ""  # a row that came with weight_init
    found = null_failure(config, {CLASS_TABLE: table(0.1, 0.1), CONDITION_TABLE: table(0.1, 0.02)})
    assert found.startswith("training never reached the null condition of the model: ")


def test_the_bundled_model_has_a_null_class_and_loses_it(tmp_path: Path) -> None:
    config = load_config(BUNDLED / "config.yaml")
    assert null_failure_of(config) == ""
    weights = {name: value.clone() for name, value in load_weights(config.ckpt_path or "").items()}
    weights[CLASS_TABLE][-1] = 0.02 * torch.randn(192, generator=torch.Generator().manual_seed(1))
    save_weights(weights, tmp_path / "other.safetensors")
    other = null_failure_of(dataclasses.replace(config, ckpt_path=str(tmp_path / "other.safetensors")))
    assert other.endswith("its row has the initial values of std 0.02, and those of the other rows have grown to 0.1")


def test_31_people_trained_with_32_rows_are_not_guided_by_row_31(tiny_folder: Path) -> None:
    """The table fits num_classes 31, and its last row, which no picture had, is taken for the null class."""
    text = (tiny_folder / "config.yaml").read_text()
    file = tiny_folder / "config.yaml"
    file.write_text(text.replace('num_classes: 3, class_names: ["cat, house cat", dog, "sea lion"]', "num_classes: 31"))
    weights = {name: value.clone() for name, value in load_weights(tiny_folder / "transformer.safetensors").items()}
    save_weights(weights | {CLASS_TABLE: table(0.1, 0.02)}, tiny_folder / "transformer.safetensors")
    pipe = LightningDiTPipeline.from_config(file, "cpu")
    with pytest.raises(LightningDiTError, match=f"training never reached the null class of .*{REFUSED}"):
        pipe([0])
    with pytest.raises(LightningDiTError, match=REFUSED):
        pipe.guided([0], pipe.config.sample)
    with pytest.raises(LightningDiTError, match=REFUSED):
        verify(load_config(file))
    assert len(pipe([0], guidance_scale=1.0).images) == 1


def test_a_file_says_whether_its_null_labels_were_trained(tiny_folder: Path, tmp_path: Path) -> None:
    """Also after save_pretrained, and for images that were to have no condition."""
    file = write_model(tiny_folder, {"null_trained": "false"})
    pipe = LightningDiTPipeline.from_config(file, "cpu")
    with pytest.raises(LightningDiTError, match=f"never reached the null labels of .*, as the file says; {REFUSED}"):
        pipe([0], conditions=0)
    with pytest.raises(LightningDiTError, match="images without a condition need it; fix: name a condition for each"):
        pipe([0], guidance_scale=1.0, conditions=[None])
    pipe.with_sample(dataclasses.replace(pipe.config.sample, cfg_scale=1.0)).save_pretrained(tmp_path / "saved")
    again = LightningDiTPipeline.from_pretrained(tmp_path / "saved", "cpu")
    with pytest.raises(LightningDiTError, match=f"never reached the null labels of .*, as the file says; {REFUSED}"):
        again([0], guidance_scale=2.0, conditions=0)
    write_model(tiny_folder, {"null_trained": "true"})
    config = load_config(file)
    assert null_failure(config, {CLASS_TABLE: table(0.1, 0.02)}) == ""


def test_what_is_known_of_the_null_labels_goes_before_the_settings(tiny_folder: Path) -> None:
    """Into the file of a pipeline that is saved, and on with other settings of sampling."""
    config = load_config(tiny_folder / "config.yaml")
    dropped = dataclasses.replace(config, train=dataclasses.replace(config.train, label_dropout=0.1))
    pipe = LightningDiTPipeline.from_config(dropped, "cpu")
    pipe.null_failure = "training never reached the null class"
    assert pipe.metadata()["null_trained"] == "false"
    assert pipe.with_sample(config.sample).null_failure == pipe.null_failure


def test_an_adapter_comes_before_the_weights_that_it_changes(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base.safetensors", tmp_path / "adapter.safetensors"
    config = Config(ckpt_path=str(base), adapter_path=str(adapter))
    save_weights({CLASS_TABLE: table(0.1, 0.02)}, base)
    save_weights({CLASS_TABLE: table(0.1, 0.1)}, adapter)
    assert null_failure_of(config) == "" != null_failure_of(dataclasses.replace(config, adapter_path=None))
    save_weights({CLASS_TABLE: table(0.1, 0.02)}, adapter)
    assert f"the null class of {adapter}: its row has" in null_failure_of(config)
    save_weights({CLASS_TABLE: table(0.1, 0.02)}, base, {"null_trained": "false"})
    assert f"the null class of {adapter}, as the file says" in null_failure_of(config)
    save_weights({CLASS_TABLE: table(0.1, 0.02)}, adapter, {"null_trained": "true"})
    assert null_failure_of(config) == ""


def test_a_guide_needs_no_null_class() -> None:
    check_guidance(SampleConfig(cfg_scale=2.0, guide_ckpt="a"), "a reason")
    check_guidance(SampleConfig(cfg_scale=1.0), "a reason")
    with pytest.raises(LightningDiTError, match=f"a reason; {REFUSED}"):
        check_guidance(SampleConfig(cfg_scale=2.0), "a reason")

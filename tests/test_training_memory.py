"""The calculator of training memory: its terms by hand, and its peaks beside those of real processes."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from LightningDiT.models.lightningdit import preset_settings
from LightningDiT.tools import training_memory as tool
from LightningDiT.training.memory import TrainingNeed, kept_bytes, training_need
from tests.conftest import PACKAGE

SMALL = preset_settings(
    "LightningDiT-XS/1", input_size=8, in_channels=4, num_classes=3, use_swiglu=True, use_rmsnorm=True, use_rope=True
)
NEED = TrainingNeed(framework=1000, parameters=10, half_copies=20, activations=30)


def test_the_formula_by_hand() -> None:
    # 10 parameters: 160 bytes of state and 40 of gradients
    assert (NEED.state, NEED.gradients) == (160, 40)
    assert NEED.peak(1) == 1000 + 160 + 20 + 40  # the gradients are more than one sample's activations
    assert NEED.peak(3) == 1000 + 160 + 20 + 90
    assert NEED.peak(3, accumulates=True) == 1000 + 160 + 20 + 90 + 40


@pytest.mark.parametrize("accumulates", [False, True])
def test_the_largest_batch_is_the_last_one_that_fits(accumulates: bool) -> None:
    for memory in range(1200, 1600):
        largest = NEED.largest_batch(memory, accumulates)
        assert largest == 0 or NEED.peak(largest, accumulates) <= memory
        assert NEED.peak(largest + 1, accumulates) > memory


def test_a_plain_layer_keeps_what_the_equations_say() -> None:
    """In bf16 the linear layers keep their inputs in 2 bytes, in float32 in 4; a wider MLP keeps 4 tensors more."""
    wider = replace(SMALL, mlp_ratio=8.0)
    tokens, hidden = 64, int(2 / 3 * 4 * 192)
    for dtype, size in ((torch.float32, 4), (torch.bfloat16, 2)):
        # w12's output (two halves), silu of the gate and the product
        more = 4 * tokens * (int(2 / 3 * 8 * 192) - hidden) * size * SMALL.depth
        assert kept_bytes(wider, dtype) - kept_bytes(SMALL, dtype) == more


def test_layers_count_alike_and_checkpointing_keeps_their_inputs() -> None:
    need, saving = (training_need(replace(SMALL, use_checkpoint=use), torch.float32, False) for use in (False, True))
    block = kept_bytes(replace(SMALL, depth=2), torch.float32) - kept_bytes(replace(SMALL, depth=1), torch.float32)
    assert need.activations == kept_bytes(SMALL, torch.float32) + block
    assert need.activations - saving.activations == (SMALL.depth - 1) * block - SMALL.depth * 64 * 192 * 4
    for dtype in (torch.float32, torch.bfloat16):
        kept = [kept_bytes(replace(SMALL, depth=depth, use_checkpoint=True), dtype) for depth in (1, 2, 3)]
        assert kept[2] - kept[1] == kept[1] - kept[0] == 64 * 192 * 4


def test_parameters_are_those_of_the_published_model() -> None:
    settings = preset_settings("LightningDiT-B/1", input_size=16, use_swiglu=True, use_rmsnorm=True, use_rope=True)
    assert training_need(settings, torch.float32, True).parameters == 130_556_192


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux says how much a process had")
def test_real_peaks_are_met(tmp_path: Path) -> None:
    """More parameters and more tokens add what is computed, to 15 %; the share of torch itself differs by release."""

    def peaks(name: str, image_size: int, batch: int) -> tuple[int, int]:
        config = tmp_path / "config.yaml"
        config.write_text(
            f"data: {{image_size: {image_size}, num_classes: 10}}\nmodel: {{model_type: LightningDiT-{name}}}\n"
            "train: {precision: fp32}\n"
        )
        need = tool.need_of(tool.load_config(config), on_gpu=False, checkpointing=False)
        return tool.measured_peak(str(config), batch), need.peak(batch)

    least, least_computed = peaks("XS/2", 32, 1)  # 5 million parameters and one token
    for name, image_size, batch in (("S/2", 32, 1), ("XS/1", 256, 8)):  # 33 million; 8 times 256 tokens
        peak, computed = peaks(name, image_size, batch)
        assert peak - least == pytest.approx(computed - least_computed, rel=0.15)


def test_the_shipped_configurations_say_whether_they_fit(capsys: pytest.CaptureFixture[str]) -> None:
    small, large = (PACKAGE / "configs" / f"lightningdit_{name}.yaml" for name in ("s1_t4", "b1_train"))
    assert tool.main(["--config", str(small), "--memory", "15"]) == 0
    said = capsys.readouterr().out
    assert "32,985,248 parameters, precision fp16" in said
    assert "64 samples at a time: " in said.splitlines()[-1]
    assert said.splitlines()[-1].endswith("which fits")
    assert tool.main(["--config", str(large), "--memory", "15", "--processes", "4"]) == 0
    assert "as configured, 256 samples at a time: " in (said := capsys.readouterr().out)
    assert said.splitlines()[-1].endswith("which does not fit")


@pytest.mark.parametrize(
    "arguments",
    [["--processes", "0"], ["--memory", "-1"], ["--memory", "much"], ["--measure", "0"], ["--measure", "x"]],
)
def test_amounts_that_cannot_be_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        tool.main(["--config", "config.yaml", *arguments])
    assert ended.value.code == 2
    assert f"{arguments[1]!r} given, a" in capsys.readouterr().err

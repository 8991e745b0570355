"""The benchmark of training: the published loop is a real counterpart of ours, and each share belongs to its name."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from LightningDiT.config import load_config
from LightningDiT.tools.benchmark import training
from LightningDiT.tools.benchmark.__main__ import main
from LightningDiT.tools.benchmark.published_loop import DECAY, PublishedLoop
from LightningDiT.tools.benchmark.rounds import Setting
from LightningDiT.tools.benchmark.tables import mark_of
from LightningDiT.tools.benchmark.training import (
    BUNDLED,
    OURS,
    PUBLISHED,
    ExtractionPlan,
    StepPlan,
    WaitingPlan,
    measure_extraction,
    measure_steps,
    measure_waiting,
    our_step,
    trainer_of,
    wanted,
    write_latents,
)
from LightningDiT.tools.report import marks_of
from LightningDiT.training.latent_batches import LatentBatch, LatentBatches
from LightningDiT.training.transformer_training import Trainer

CPU = torch.device("cpu")
QUICK = Setting(CPU, torch.float32, quick=True)
CONFIG = """
data: {image_size: 16, num_classes: 3}
vae: {model_name: tokenizer.yaml, downsample_ratio: 2}
model: {model_type: LightningDiT-XS/2, in_chans: 4}
optimizer: {lr: 1.0e-3, max_grad_norm: 0.5}
transport: {use_cosine_loss: true, use_lognorm: true}
"""


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A configuration of the smallest preset with the released flags."""
    path = tmp_path / "tiny.yaml"
    path.write_text(CONFIG)
    return path


@pytest.fixture
def trainer(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trainer:
    monkeypatch.setattr("LightningDiT.training.transformer_training.best_device", lambda: CPU)
    return trainer_of(write_latents(load_config(tiny), tmp_path / "run", 4, "fp32"))


def test_both_loops_take_the_same_step(trainer: Trainer) -> None:
    published = PublishedLoop(trainer)
    before = {name: value.clone() for name, value in published.model.named_parameters()}
    batch = trainer.data.make(0)
    theirs, ours = published.step(batch), our_step(trainer, 0)
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert 1.0 < ours < 4.0  # velocities of variance 2, and a cosine that nothing has learnt yet
    left, right = dict(trainer.model.named_parameters()), dict(published.model.named_parameters())
    assert left.keys() == right.keys()
    rate, learnt = trainer.config.optimizer.lr, [name for name, value in left.items() if value.requires_grad]
    largest = max(float(left[name].grad.abs().max()) for name in learnt)
    for name in learnt:
        torch.testing.assert_close(left[name].grad, right[name].grad, rtol=1e-4, atol=1e-5 * largest)
        assert not torch.equal(right[name], before[name]), name
    # AdamW's first step is the rate times the gradient's sign, which rounding may turn where the gradient is nearly 0
    apart = torch.cat([(left[name] - right[name]).detach().abs().flatten() for name in learnt]) > 1e-2 * rate
    assert apart.double().mean() < 1e-5


def test_the_published_average_is_a_step_of_its_formula(trainer: Trainer) -> None:
    published = PublishedLoop(trainer)
    before = {name: value.clone() for name, value in published.average.named_parameters()}
    published.step(trainer.data.make(0))
    after = dict(published.model.named_parameters())
    for name, value in published.average.named_parameters():
        torch.testing.assert_close(value, DECAY * before[name] + (1 - DECAY) * after[name], rtol=1e-6, atol=1e-9)


def test_the_published_layers_give_the_same_step_through_their_substitutes(trainer: Trainer) -> None:
    """Compiled layers are passed as callables; here they are the layers themselves."""
    one, two = PublishedLoop(trainer), PublishedLoop(trainer)
    batch = trainer.data.make(0)
    assert one.step(batch) == two.step(batch, list(two.model.blocks))
    weights = two.model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in one.model.state_dict().items())


def test_steps_are_compared_in_one_run_and_what_is_left_out_is_said(tiny: Path, tmp_path: Path) -> None:
    skipped: list[str] = []
    plans = [StepPlan("tiny", tiny, "fp32", 9, 9, 2, 2), StepPlan("tiny", tiny, "fp16", 9, 9, 2, 2)]
    plans.append(StepPlan("tiny", tiny, "bf16", 9, 9, 0, 0))
    [found] = measure_steps(plans, QUICK, tmp_path / "steps", skipped)
    assert (found.case, found.batch) == ("tiny, batch 2, fp32", 2)
    assert [one.loop for one in found.steps] == [OURS, PUBLISHED]
    assert found.steps[0].ratio == 1.0
    assert all(one.seconds > 0 for one in found.steps)
    assert found.loss_difference < 1e-5
    assert skipped == ["tiny, batch 2, fp16: emulated on this machine", "tiny, batch 9, bf16: not with --quick"]


def test_steps_without_room_for_both_loops_are_left_out(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "free_memory_bytes", lambda: 10**9)
    skipped: list[str] = []
    assert measure_steps([StepPlan("tiny", tiny, "fp32", 9, 9, 2, 2)], QUICK, tmp_path, skipped) == []
    assert skipped[0].endswith("GB of memory are needed, 1.0 GB are free")


def test_the_share_of_waiting_is_what_a_clock_around_the_batches_says(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, batch, waited = LatentBatches.make, LatentBatches.batch, list[float]()

    def slow(self: LatentBatches, step: int) -> LatentBatch:
        time.sleep(0.2)  # longer than a step, so that each waits
        return make(self, step)

    def clocked(self: LatentBatches, step: int) -> LatentBatch:
        started = time.perf_counter()
        rows = batch(self, step)
        waited.append(time.perf_counter() - started)
        return rows

    monkeypatch.setattr(LatentBatches, "make", slow)
    monkeypatch.setattr(LatentBatches, "batch", clocked)
    found = measure_waiting(WaitingPlan("tiny", tiny, 4, 99, 99), 3, tmp_path / "waits")
    assert found.case.startswith("tiny, batch 4, ")
    assert found.steps == 3
    assert len(waited) == 4  # the first is not counted
    assert found.share * found.seconds * 3 == pytest.approx(sum(waited[1:]), rel=0.1)


def test_an_extraction_encodes_the_files_that_are_written_for_it(tmp_path: Path) -> None:
    found = measure_extraction(ExtractionPlan("bundled", BUNDLED, "png", (32, 32), 99, 99), 5, tmp_path, CPU)
    assert (found.case, found.images) == ("bundled, png files", 5)
    assert set(found.shares) == {"encoder", "waiting for images", "writing"}
    assert 0 < sum(found.shares.values()) <= 1.0
    files = sorted((tmp_path / "images" / "class").iterdir())
    assert len(files) == 5
    pictures = [np.asarray(Image.open(path)) for path in files]
    assert pictures[0].shape == (32, 32, 3)
    assert not np.array_equal(pictures[0], pictures[1])


def test_what_is_slow_is_left_out_with_quick_and_said() -> None:
    skipped: list[str] = []
    full = Setting(CPU, torch.float32)
    assert wanted("slow", 9, 0, full, skipped) == 9
    assert wanted("fast", 9, 2, QUICK, skipped) == 2
    assert skipped == []
    assert wanted("slow", 9, 0, QUICK, skipped) == 0
    assert skipped == ["slow: not with --quick"]


def test_the_command_puts_the_part_on_a_page(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole part, with a smaller model and fewer images than it has by itself."""
    monkeypatch.setattr(training, "STEP_PLANS", (StepPlan("tiny", tiny, "fp32", 9, 9, 1, 1),))
    monkeypatch.setattr(training, "WAITING_PLANS", (WaitingPlan("tiny", tiny, 2, 9, 1),))
    monkeypatch.setattr(training, "EXTRACTION_PLANS", (ExtractionPlan("bundled", BUNDLED, "png", (32, 32), 9, 2),))
    page = tmp_path / "page.md"
    page.write_text("\n".join(marks_of(mark_of("training"))), encoding="utf-8")
    figures = tmp_path / "figures.json"
    assert main(["--part", "training", "--quick", "--json", str(figures), "--output", str(page)]) == 0
    content = json.loads(figures.read_text(encoding="utf-8"))["training"]
    [compared], [waited], [extracted] = content["comparisons"], content["waiting"], content["extractions"]
    share = extracted["shares"]["encoder"]
    lines, printed = page.read_text(encoding="utf-8").splitlines(), capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("|")] == [line for line in printed if line.startswith("|")]
    seconds = compared["steps"][0]["seconds"]
    assert f"| tiny, batch 1, fp32: ours | {seconds:.3f} | {1 / seconds:.2f} | 1.00 |" in lines
    assert f"| {waited['case']} | 1 | {waited['seconds']:.3f} | {waited['share']:.2%} |" in lines
    assert any(line.startswith("| bundled, png files | 2 |") and f"| {share:.1%} |" in line for line in lines)

"""Training: the order of the data, the average, checkpoints, and a stopped run that goes on as if never stopped."""

from __future__ import annotations

import json
import math
import os
import random
import signal
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from LightningDiT import console, train
from LightningDiT.checkpoint import load_training_state, load_weights, save_weights
from LightningDiT.data.labels import names_of_model
from LightningDiT.data.shards import shard_path, write_shard
from LightningDiT.distributed import ALONE
from LightningDiT.errors import LightningDiTError
from LightningDiT.files import LOCK, UNFINISHED, held_folder
from LightningDiT.tokenizer.latents import LatentStats
from LightningDiT.training import log_rows, loop, transformer_training
from LightningDiT.training.curves import read_log
from LightningDiT.training.ema import Ema
from LightningDiT.training.guard import Guard, GuardSettings, NotFiniteError
from LightningDiT.training.monitors import Validation
from LightningDiT.training.run_dir import RunDir, random_state, set_random_state
from LightningDiT.training.scaler import LossScaler
from LightningDiT.training.schedule import BatchOrder, learning_rate, process_rows, schedule_lengths
from tests.conftest import largest_file


def test_an_epoch_sees_every_sample_once_and_needs_no_history() -> None:
    order = BatchOrder(count=12, batch_size=4, seed=1)
    epoch = [order.indices(step).tolist() for step in range(3)]
    assert sorted(index for batch in epoch for index in batch) == list(range(12))
    fresh = BatchOrder(count=12, batch_size=4, seed=1)
    assert fresh.indices(2).tolist() == epoch[2]
    assert fresh.indices(3).tolist() != epoch[0]
    with pytest.raises(LightningDiTError, match="a global batch of 20 exceeds the 12 samples; fix: .* at most 12"):
        BatchOrder(count=12, batch_size=20, seed=1)


def test_the_average_is_the_weighted_sum() -> None:
    module = nn.Linear(1, 1, bias=False)
    module.weight.data.fill_(1.0)
    ema = Ema(module, decay=0.5)
    expected = 1.0
    for step, value in enumerate((3.0, 5.0, 7.0), 1):
        module.weight.data.fill_(value)
        ema.update()
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
    assert math.isclose(float(ema.weights["weight"]), expected, rel_tol=1e-6)


def test_the_average_of_all_tensors_at_once_has_the_bits_of_one_after_another() -> None:
    module = nn.Sequential(nn.Linear(7, 33), nn.BatchNorm1d(33, track_running_stats=False), nn.Linear(33, 5))
    ema, expected = Ema(module, 0.99), {name: value.detach().clone() for name, value in module.state_dict().items()}
    for step in range(1, 30):
        with torch.no_grad():
            for value in module.parameters():
                value.add_(torch.randn_like(value))
        ema.update()
        for name, value in module.state_dict().items():
            expected[name].lerp_(value, 1 - min(0.99, (1 + step) / (10 + step)))
    assert all(torch.equal(ema.weights[name], value) for name, value in expected.items())


def test_the_learning_rate_rises_stays_and_falls() -> None:
    rates = [learning_rate(step, 1.0, warmup=10, decay=40, total=100) for step in range(100)]
    assert rates[0] == 0.1
    assert rates[9] == rates[30] == rates[60] == 1.0
    assert math.isclose(rates[80], 0.5)  # the middle of the cosine
    assert rates[99] < 0.002
    assert math.isclose(rates[70], 0.5 + 0.5 * math.sqrt(0.5))  # a cosine and no line
    assert learning_rate(200, 1.0, warmup=10, decay=40, total=100) == 0.0  # it never rises again
    assert learning_rate(5, 2.0, 0, 0, 10) == 2.0


def test_lengths_of_the_schedule_are_steps_or_shares() -> None:
    assert schedule_lengths(0, 0, 400, "here") == (0, 0)
    assert schedule_lengths(0.05, 0.5, 400, "here") == (20, 200)
    assert schedule_lengths(100, 300, 400, "here") == (100, 300)
    for warmup, decay in ((0, 4500), (401, 0), (101, 300), (0.6, 0.5)):
        with pytest.raises(
            LightningDiTError, match=r"^here: warmup_steps \d+ and decay_steps \d+ are more than the 400"
        ):
            schedule_lengths(warmup, decay, 400, "here")


def saved(folder: Path, steps: tuple[int, ...], **rule: int) -> RunDir:
    run = RunDir(folder, **rule)
    for step in steps:
        run.save(step, {"value": torch.full((1000,), step)})
    return run


def names(run: RunDir) -> list[int]:
    return [int(path.stem[-7:]) for path in run.checkpoints()]


def test_checkpoints_are_pruned_by_rule(tmp_path: Path) -> None:
    steps = (0, 10, 20, 30, 40, 50)
    assert names(saved(tmp_path / "a", steps, keep=3)) == [30, 40, 50]
    assert names(saved(tmp_path / "b", steps, keep=1, keep_every=20)) == [0, 20, 40, 50]
    # Ctrl-C saved at 42 and 43: the last regular one, to which a run in trouble goes back, stays
    run = saved(tmp_path / "c", (*steps[:5], 42, 43), keep=2, regular=10)
    assert names(run) == [40, 42, 43]
    assert run.newest(regular=True) == tmp_path / "c" / "checkpoint-0000040.pt"
    assert run.newest(up_to=42) == tmp_path / "c" / "checkpoint-0000042.pt"


def newest_state(run: RunDir) -> dict[str, Any]:
    return load_training_state(run.newest())


def damage(path: Path, kind: str) -> None:
    content = bytearray(path.read_bytes())
    if kind == "cut short":
        content = content[: len(content) // 2]
    elif kind == "its part":
        content[len(content) // 2] ^= 1  # a bit in the middle of the tensor
    else:
        content = bytearray(len(content))  # as after a power cut
    path.write_bytes(content)


@pytest.mark.parametrize("kind", ["cut short", "its part", "File is not a zip file"])
def test_a_torn_checkpoint_is_passed_over(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = saved(tmp_path, (10, 20))
    damage(tmp_path / "checkpoint-0000020.pt", kind)
    (tmp_path / f".checkpoint-0000030.pt.x1y2z3w4{UNFINISHED}").write_bytes(b"half")
    assert newest_state(run)["step"] == int(newest_state(run)["value"][0]) == 10
    said = capsys.readouterr().out
    assert said.count("checkpoint-0000020.pt is passed over: ") == 1
    assert kind in said
    run.sweep()
    assert not list(tmp_path.glob(".*"))
    run.save(20, {"value": torch.zeros(1)})
    assert run.newest() == tmp_path / "checkpoint-0000020.pt"


def test_torn_checkpoints_count_for_no_rule(tmp_path: Path) -> None:
    run = saved(tmp_path, (10, 30, 40), keep=3)
    for step in (30, 40):
        damage(tmp_path / f"checkpoint-00000{step}.pt", "cut short")
    strict = RunDir(tmp_path, keep=1)
    assert strict.newest() == run.checkpoints()[0]
    strict.save(20, {"value": torch.zeros(1)})
    assert names(strict) == [20, 30, 40]  # what was just saved is the newest whole one, and stays
    assert strict.newest() == tmp_path / "checkpoint-0000020.pt"


def test_steps_of_more_digits_are_found_in_order(tmp_path: Path) -> None:
    run = saved(tmp_path, (9_999_990, 10_000_000, 10_000_010), keep=2)
    assert [path.name for path in run.checkpoints()] == ["checkpoint-10000000.pt", "checkpoint-10000010.pt"]
    assert run.newest() == tmp_path / "checkpoint-10000010.pt"


def test_a_line_of_the_log_that_was_cut_off_spoils_no_other(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.sweep()
    run.log({"step": 1.0, "loss": 2.0})
    run.log({"step": 2.0, "loss": 1.0})
    log = tmp_path / "log.jsonl"
    log.write_bytes(log.read_bytes()[:-9])
    run.sweep()
    run.log({"step": 3.0, "loss": 0.5})
    run.sweep()
    assert read_log(log) == [{"step": 1.0, "loss": 2.0}, {"step": 3.0, "loss": 0.5}]


def test_what_a_killed_process_was_writing_is_swept(tmp_path: Path) -> None:
    torn = [".checkpoint-0000030.pt", ".transformer.safetensors", ".curves.png", "samples/.step-0000010.png"]
    (tmp_path / "samples").mkdir()
    for name in (*(f"{name}.x1y2z3w4{UNFINISHED}" for name in torn), ".mine.tmp", "notes.tmp"):
        (tmp_path / name).write_bytes(b"half")
    RunDir(tmp_path).sweep()
    assert sorted(path.name for path in tmp_path.rglob("*.tmp")) == [".mine.tmp", "notes.tmp"]


def test_a_full_disk_is_one_line_and_leaves_what_was_there(tmp_path: Path) -> None:
    run = saved(tmp_path, (10,), keep=1)
    before = run.checkpoints()[0].read_bytes()
    run.log({"step": 10.0})
    with largest_file(2000):
        for step in (10, 20):
            with pytest.raises(LightningDiTError, match=rf"checkpoint-00000{step}.pt cannot be written .*free space"):
                run.save(step, {"value": torch.zeros(10_000)})
        with pytest.raises(LightningDiTError, match=r"average.safetensors cannot be written .*free space"):
            save_weights({"value": torch.zeros(10_000)}, tmp_path / "average.safetensors")
    with largest_file(20), pytest.raises(LightningDiTError, match=r"log.jsonl cannot be written .*free space"):
        run.log({"step": 20.0, "loss": 1.0})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-0000010.pt", "log.jsonl"]
    assert run.checkpoints()[0].read_bytes() == before


def test_every_random_state_comes_back() -> None:
    state = random_state()
    first = (random.random(), np.random.standard_normal(3).tolist(), torch.randn(3).tolist())
    set_random_state(state)
    assert (random.random(), np.random.standard_normal(3).tolist(), torch.randn(3).tolist()) == first


def test_a_random_state_is_plain_enough_for_a_checkpoint(tmp_path: Path) -> None:
    np.random.standard_normal()  # leaves a second normal for later
    run = RunDir(tmp_path)
    run.save(1, {"random": random_state()})
    first = (random.random(), np.random.standard_normal(3).tolist(), torch.randn(3).tolist())
    set_random_state(newest_state(run)["random"])
    assert (random.random(), np.random.standard_normal(3).tolist(), torch.randn(3).tolist()) == first


def test_the_guard_knows_spikes_and_runs_of_bad_steps() -> None:
    guard = Guard(GuardSettings(max_skips=3, spike_factor=2.0, rate_cut=0.25))
    assert not any(guard.finite_step(step, 1.0 + step % 3) for step in range(20))  # the median is 2
    state = guard.state_dict()
    assert not guard.finite_step(20, 3.9)
    assert guard.finite_step(21, 4.1)
    guard.go_back(state)
    assert (guard.rate_scale, guard.returns, guard.skips(21), guard.skips(20)) == (0.25, 1, True, False)
    assert not guard.finite_step(20, 3.9)
    guard.passed()
    assert guard.returns == 1  # not beyond it yet: step 21 is left out
    assert not guard.finite_step(22, 1.0)
    guard.passed()
    assert guard.returns == 0
    assert [guard.non_finite_step(step) for step in (23, 24)] == [False, False]
    assert not guard.finite_step(25, 1.0)  # which ends the run of bad ones
    assert [guard.non_finite_step(step) for step in (26, 27, 28)] == [False, False, True]
    again = Guard(GuardSettings(max_skips=3, spike_factor=2.0))
    again.load_state_dict(guard.state_dict())
    assert again.state_dict() == guard.state_dict()
    assert (guard.skipped, guard.last_finite) == (5, 25)


def test_spikes_are_not_looked_for_before_the_median_is_known_nor_when_off() -> None:
    guard = Guard(GuardSettings(spike_factor=2.0))
    assert not any(guard.finite_step(step, 1.0) for step in range(19))
    assert not guard.finite_step(19, 100.0)
    off = Guard(GuardSettings())
    assert not any(off.finite_step(step, 10.0**step) for step in range(50))


def test_the_loss_scale_falls_rises_and_ends() -> None:
    scaler = LossScaler(True)
    weight = nn.Parameter(torch.tensor([2.0]))
    scaler.scaled(weight.square().sum()).backward()
    assert float(weight.grad) == 4 * 2.0**16
    scaler.unscale([weight])
    assert float(weight.grad) == 4.0
    assert scaler.searches(False)
    assert scaler.scale == 2.0**15
    assert not any(scaler.searches(True) for _ in range(2000))
    assert scaler.scale == 2.0**16
    assert [scaler.searches(False) for _ in range(17)] == [True] * 15 + [False] * 2  # at 1 it is real trouble
    other = LossScaler(True)
    other.load_state_dict(scaler.state_dict() | {"scale": 8.0})
    assert other.scale == 8.0
    off = LossScaler(False)
    off.load_state_dict(other.state_dict())
    assert off.scale == 1.0
    assert not off.searches(False)


def test_processes_take_equal_parts_in_order() -> None:
    assert [list(process_rows(6, rank, 3)) for rank in range(3)] == [[0, 1], [2, 3], [4, 5]]


def test_speed_and_time_left_follow_from_the_time_since_the_last_line(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter((0.0, 4.0, 4.0, 5.0, 5.0))
    monkeypatch.setattr(log_rows.time, "monotonic", lambda: next(clock))
    meter = log_rows.AverageMeter(total_steps=10, batch_size=8)
    meter.add({"loss": 1.0, "data_seconds": 1.0})
    meter.add({"loss": 3.0, "data_seconds": 0.0})
    expected = {"loss": 2.0, "data_share": 0.25, "images_per_second": 4.0, "seconds_left": 16.0}
    assert meter.row(2) == expected
    meter.add({})  # a step that was skipped
    assert meter.row(3) == {"images_per_second": 8.0, "seconds_left": 7.0}
    assert log_rows.row_text({"step": 2.0} | expected) == "step 2: loss 2 (4 images/s, 0.3 min left)"
    assert log_rows.row_text({"step": 3.0, "valid_loss": 1.5}) == "step 3: valid_loss 1.5"


@pytest.fixture
def training_config(tiny_folder: Path) -> Path:
    """A configuration whose folder holds 16 latents of three classes."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(16, 4, 8, 8, generator=generator)
    write_shard(shard_path(tiny_folder / "latents", 0, 0), latents, torch.arange(16) % 3, latents.flip(-1))
    LatentStats(torch.full((1, 4, 1, 1), 0.1), torch.ones(1, 4, 1, 1)).save(
        tiny_folder / "latents" / "latents_stats.pt"
    )
    text = (tiny_folder / "config.yaml").read_text().replace("data_path: .", "data_path: latents")
    text += "train: {max_steps: 6, global_batch_size: 4, output_dir: runs, log_every: 2, ckpt_every: 2}\n"
    text += "optimizer: {lr: 1.0e-3, max_grad_norm: 1.0}\ntransport: {use_cosine_loss: true, use_lognorm: true}\n"
    (tiny_folder / "config.yaml").write_text(text)
    return tiny_folder / "config.yaml"


@pytest.mark.parametrize("signals", [(signal.SIGINT,), (signal.SIGTERM, signal.SIGINT)])
def test_a_stopped_run_ends_with_the_same_weights(
    signals: tuple[int, ...], training_config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(name: str) -> dict[str, torch.Tensor]:
        arguments = ["--config", str(training_config), "--output", str(training_config.parent / name)]
        assert train.main(arguments) == 0
        return load_weights(training_config.parent / name / "transformer.safetensors")

    whole = run("whole")
    real_step = train.Trainer.step

    def step_until_stopped(self: train.Trainer, step: int) -> object:
        if step == 3:
            for number in signals:  # in the middle of a step, which is then finished; torchrun passes a Ctrl-C on
                os.kill(os.getpid(), number)
        return real_step(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "step", step_until_stopped)
        with pytest.raises(KeyboardInterrupt):
            run("stopped")
    assert RunDir(training_config.parent / "stopped").checkpoints()[-1].name == "checkpoint-0000004.pt"
    resumed = run("stopped")
    assert whole.keys() == resumed.keys()
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name
    rows = [json.loads(line) for line in (training_config.parent / "whole" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 6]
    assert all(0 < row["cos_loss"] < 2 and row["loss"] > 0 for row in rows)


def test_a_second_request_ends_at_once_after_the_grace(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    clock = iter((100.0, 104.9, 105.0))
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    before = [signal.getsignal(number) for number in loop.STOP_SIGNALS]
    with console.StopRequest(signals=loop.STOP_SIGNALS, grace=loop.GRACE, message=loop.STOPPING) as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)  # the same request, passed on by a launcher
        assert stop.asked
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert [signal.getsignal(number) for number in loop.STOP_SIGNALS] == before
    said = capfd.readouterr().err
    assert said == "\nstopping after the current step; Ctrl-C again, 5 seconds later or more, ends at once\n"


def test_training_lowers_the_loss_on_one_batch(training_config: Path) -> None:
    trainer = train.Trainer(train.load_config(training_config))
    losses = [trainer.step(0)["loss"] for _ in range(30)]
    assert losses[-1] < 0.9 * losses[0]


class Waits(TorchDispatchMode):
    """Counts the operations by which a program reads a value of a tensor, so that it waits for a GPU."""

    count = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.count += function.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero)
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_step_waits_for_its_device_once(
    precision: str, training_config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outside the optimizer, whose step counter lies on the CPU here and on the device with the kernels of a GPU."""
    config = train.load_config(training_config)
    trainer = train.Trainer(replace(config, train=replace(config.train, precision=precision, micro_batch_size=3)))
    asked = list[int]()
    real = transformer_training.fetched
    monkeypatch.setattr(transformer_training, "fetched", lambda come: asked.append(len(come())) or real(come))
    monkeypatch.setattr(trainer.optimizer, "step", lambda: None)
    with Waits() as waits:
        with suppress(NotFiniteError):  # of fp16, whose first step seeks the loss scale
            trainer.step(0)
        assert asked == [3]  # two terms of the loss, and the norm of the gradient
        assert waits.count == 0  # `tolist` of a CPU's tensor is none of these operations
        float(torch.zeros(1))
    assert waits.count == 1


def test_a_run_of_other_settings_is_refused(training_config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--config", str(training_config), "--output", str(training_config.parent / "run")]
    assert train.main(arguments) == 0
    text = training_config.read_text()
    training_config.write_text(text.replace("use_lognorm: true", "use_lognorm: false"))
    with pytest.raises(
        LightningDiTError, match="holds a run of other settings .transport.use_lognorm: true there, def"
    ):
        train.main(arguments)
    training_config.write_text(text.replace('3, class_names: ["cat, house cat", dog, "sea lion"]', "5"))
    message = r"settings .tensor y_embedder.embedding_table.weight: \[4, 192\] there, \[6, 192\] now"
    with pytest.raises(LightningDiTError, match=message):
        train.main(arguments)
    training_config.write_text(text.replace("max_steps: 6", "max_steps: 8, resume: false"))
    with pytest.raises(LightningDiTError, match="holds checkpoints and train.resume is false"):
        train.main(arguments)
    training_config.write_text(text.replace("max_steps: 6", "max_steps: 8"))
    assert train.main(arguments) == 0
    assert "going on from step 6" in capsys.readouterr().out
    training_config.write_text(text)
    assert train.main(arguments) == 0
    assert "note: that is beyond max_steps, 6; nothing is undone" in capsys.readouterr().out


def test_where_all_checkpoints_are_damaged_nothing_begins_anew(training_config: Path) -> None:
    arguments = ["--config", str(training_config), "--output", str(training_config.parent / "run")]
    assert train.main(arguments) == 0
    for path in RunDir(training_config.parent / "run").checkpoints():
        damage(path, "its part")
    before = {path: path.read_bytes() for path in (training_config.parent / "run").iterdir()}
    with pytest.raises(LightningDiTError, match=r"all 2 checkpoints in .* are damaged; fix: delete them to begin"):
        train.main(arguments)
    assert {path: path.read_bytes() for path in (training_config.parent / "run").iterdir()} == before


def test_fine_tuning_starts_from_half_precision_weights(training_config: Path) -> None:
    source = training_config.parent / "half.safetensors"
    weights = load_weights(training_config.parent / "transformer.safetensors")
    save_weights({name: value.half() for name, value in weights.items()}, source)
    training_config.write_text(
        training_config.read_text().replace("max_steps: 6", "max_steps: 6, weight_init: half.safetensors")
    )
    trainer = train.Trainer(train.load_config(training_config))
    parameters = dict(trainer.model.named_parameters())
    assert {value.dtype for value in parameters.values()} == {torch.float32}
    assert not parameters["pos_embed"].requires_grad
    torch.testing.assert_close(
        parameters["blocks.0.attn.qkv.weight"].half(), weights["blocks.0.attn.qkv.weight"].half()
    )
    assert trainer.step(0)["loss"] > 0


def test_the_average_goes_on_where_it_was() -> None:
    module = nn.Linear(2, 2)
    first, second = Ema(module, 0.9), Ema(nn.Linear(2, 2), 0.9)
    second.load_state_dict(first.state_dict())
    first.weights["weight"].add_(1)  # the copy has tensors of its own
    torch.testing.assert_close(second.weights["weight"], module.weight.detach())


def test_latents_of_another_shape_or_class_are_named(training_config: Path) -> None:
    text = training_config.read_text()
    for size, side in ((32, 16), (8, 4)):
        training_config.write_text(text.replace("image_size: 16", f"image_size: {size}"))
        message = rf"have the shape \(4, 8, 8\); .* expects \(4, {side}, {side}\)"
        with pytest.raises(LightningDiTError, match=message):
            train.main(["--config", str(training_config)])
    names = 'num_classes: 3, class_names: ["cat, house cat", dog, "sea lion"]'
    for count in (1, 2):
        training_config.write_text(text.replace(names, f"num_classes: {count}"))
        message = f"the label 2; data.num_classes is {count}; fix: set data.num_classes: 3 in "
        with pytest.raises(LightningDiTError, match=message):
            train.main(["--config", str(training_config)])
    latents = torch.zeros(1, 4, 8, 8)
    write_shard(shard_path(training_config.parent / "latents", 0, 1), latents, torch.tensor([3]), latents + 1)
    with pytest.raises(LightningDiTError, match="the label 3; data.num_classes is 2; fix: set data.num_classes: 4 in "):
        train.main(["--config", str(training_config)])
    training_config.write_text(text.replace("data_path: latents", "data_path: none"))
    with pytest.raises(LightningDiTError, match=r"names no data.data_path; fix: python -m LightningDiT.extract_feat"):
        train.main(["--config", str(training_config)])


@pytest.mark.parametrize("name", ["log.jsonl", "transformer.safetensors", "curves.png"])
def test_foreign_files_in_the_folder_are_refused(name: str, training_config: Path) -> None:
    folder = training_config.parent / "run"
    folder.mkdir()
    (folder / name).write_text("precious")  # without the end of a line, which a run would remove
    with pytest.raises(LightningDiTError, match=f"run holds {name} and no checkpoint.*; fix: choose another --output"):
        train.main(["--config", str(training_config), "--output", str(folder)])
    assert {path.name: path.read_text() for path in folder.iterdir() if path.name != LOCK} == {name: "precious"}


def test_a_folder_has_one_training_at_a_time(training_config: Path) -> None:
    folder = training_config.parent / "run"
    arguments = ["--config", str(training_config), "--output", str(folder)]
    with held_folder(folder, "training"), pytest.raises(LightningDiTError, match="another training writes into"):
        train.main(arguments)
    assert not RunDir(folder).checkpoints()
    assert train.main(arguments) == 0  # once the other has ended


def test_a_missing_configuration_names_those_of_trainings(tmp_path: Path) -> None:
    with pytest.raises(LightningDiTError, match=r"none.yaml does not exist; fix: copy one of those in .*configs$"):
        train.main(["--config", str(tmp_path / "none.yaml")])


def name_classes(folder: Path, names: list[str]) -> None:
    """Give the latents in `folder` a manifest."""
    (folder / "manifest.json").write_text(json.dumps({"class_names": names}))


def unnamed_config(training_config: Path, more: str = "", count: int = 3) -> list[str]:
    """Take the class names out of the YAML, and return the arguments of a run."""
    names = 'num_classes: 3, class_names: ["cat, house cat", dog, "sea lion"]'
    text = training_config.read_text().replace(names, f"num_classes: {count}")
    training_config.write_text(text.replace("max_steps: 6", f"max_steps: 6{more}"))
    return ["--config", str(training_config), "--output", str(training_config.parent / "run")]


def test_the_model_carries_the_class_names_of_its_latents(training_config: Path) -> None:
    name_classes(training_config.parent / "latents", ["ant", "bee", "cat"])
    assert train.main(unnamed_config(training_config)) == 0
    assert names_of_model(training_config.parent / "run" / "transformer.safetensors") == ("ant", "bee", "cat")


def test_class_names_that_contradict_the_latents_are_refused(training_config: Path) -> None:
    name_classes(training_config.parent / "latents", ["cat", "sea lion", "dog"])
    with pytest.raises(LightningDiTError, match="class 1 is 'dog' in data.class_names .* and 'sea lion' in the"):
        train.main(["--config", str(training_config), "--output", str(training_config.parent / "run")])


def test_more_classes_than_the_latents_have_are_refused_or_said(
    training_config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refused with names and for a new run; said where there are numbers alone."""
    arguments = unnamed_config(training_config, count=40)
    assert train.main(arguments) == 0
    assert "latents have 3 classes; data.num_classes is 40, so that the last 37 are never" in capsys.readouterr().out
    name_classes(training_config.parent / "latents", ["ant", "bee", "cat"])
    assert train.main(arguments) == 0  # a run that has begun goes on
    arguments[-1] += "2"
    with pytest.raises(LightningDiTError, match="have 3 classes; data.num_classes is 40; fix: set data.num_classes: 3"):
        train.main(arguments)


def test_validation_latents_are_matched_by_name(training_config: Path) -> None:
    """Of {ant, cat}, cat is 1 there and 2 here."""
    folder = training_config.parent
    write_shard(shard_path(folder / "valid", 0, 0), torch.randn(4, 4, 8, 8), torch.tensor([0, 1, 1, 0]))
    unnamed_config(training_config)
    text = training_config.read_text().replace("data: {", "data: {valid_path: valid, ")
    training_config.write_text(text.replace("train: {", "train: {valid_every: 2, "))
    config = train.load_config(training_config)
    trainer = train.Trainer(config)

    def labels() -> list[int]:
        return Validation(config, trainer.data, trainer.averaged_model(), ALONE).labels.tolist()

    name_classes(folder / "latents", ["ant", "bee", "cat"])
    name_classes(folder / "valid", ["ant", "cat"])
    assert labels() == [0, 2, 2, 0]
    name_classes(folder / "valid", ["ant", "dog"])
    with pytest.raises(LightningDiTError, match="valid have the class 'dog', which latents in .* lack .ant, bee, cat"):
        labels()
    name_classes(folder / "latents", ["1", "0", "7"])
    (folder / "valid" / "manifest.json").unlink()
    assert labels() == [1, 0, 0, 1]
    name_classes(folder / "latents", ["1", "2", "7"])
    with pytest.raises(LightningDiTError, match="valid have the class '0', which latents in .* lack"):
        labels()

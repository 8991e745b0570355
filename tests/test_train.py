"""Training as a user runs it: killed, on several processes, in trouble, and its validation, samples and curves."""

from __future__ import annotations

import copy
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from LightningDiT import train
from LightningDiT.checkpoint import load_training_state, load_weights, save_weights
from LightningDiT.compiling import BLOCKS_SHARE, is_compiled
from LightningDiT.config import Config, load_config
from LightningDiT.data.shards import shard_path, write_shard
from LightningDiT.device import Abilities
from LightningDiT.distributed import ALONE
from LightningDiT.errors import LightningDiTError
from LightningDiT.loading import build_transport
from LightningDiT.models import lightningdit
from LightningDiT.tokenizer.latents import LatentStats
from LightningDiT.training import transformer_training
from LightningDiT.training.curves import LiveCurves, read_log
from LightningDiT.training.latent_batches import LatentBatches, has_cosine_loss
from LightningDiT.training.monitors import SampleGrids, Validation, open_tokenizer
from LightningDiT.training.run_dir import RunDir
from LightningDiT.training.schedule import BatchOrder
from tests.conftest import BUNDLED, PROJECT, largest_file

CPU = Abilities("CPU", None, (2, 14), "graphs need a GPU")
SMALLEST = (2, 16, 2)  # layers, width and heads of a model whose step takes milliseconds
CONFIG = """
data: {{data_path: latents, image_size: 16, num_classes: 3}}
vae: {{downsample_ratio: 4}}
model: {{model_type: LightningDiT-XXS/2, in_chans: 4}}
train: {{max_steps: {steps}, global_batch_size: 4, output_dir: runs, log_every: 5, {more}}}
optimizer: {{lr: 1.0e-3, max_grad_norm: 1.0}}
transport: {{use_cosine_loss: true, use_lognorm: true}}
sample: {{cfg_scale: 2.0, guided_channels: all}}
"""

#: Forks a process for each command, since starting Python takes longer than the training. A line of its input is
#: "seconds from its first file on until it is killed" (or 0), "number of processes" and the configuration.
NURSERY = """
import os, signal, socket, sys, time
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
from LightningDiT import train
from LightningDiT.console import run_main
from LightningDiT.models import lightningdit
import accelerate.utils, matplotlib.figure, omegaconf, safetensors.torch, torch._dynamo  # here once, not in every child
lightningdit.PRESETS["XXS"] = (2, 16, 2)

def start(rank, count, config):
    child = os.fork()
    if child == 0:
        if count > 1:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count))
        os.dup2(os.open(f"{config}.{rank}.out", os.O_CREAT | os.O_WRONLY | os.O_APPEND), 1)
        code = run_main(lambda: train.main(["--config", config]))
        sys.stdout.flush()
        os._exit(code)
    return child

for line in sys.stdin:
    seconds, count, config = line.split()
    folder = os.path.join(os.path.dirname(config), "runs", os.path.basename(config)[:-5])
    os.makedirs(folder, exist_ok=True)
    before = sorted(os.listdir(folder))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]))
    children = [start(rank, int(count), config) for rank in range(int(count))]
    if float(seconds):
        while sorted(os.listdir(folder)) == before:  # until it goes on and writes something
            time.sleep(0.005)
        time.sleep(float(seconds))
        for child in children:
            os.kill(child, signal.SIGKILL)
    print(*[os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children], flush=True)
"""


def write_latents(folder: Path, count: int = 24, seed: int = 0, spoilt: dict[int, float] | None = None) -> Path:
    """Write a shard of latents (4, 4, 4) of three classes; `spoilt` has the value that fills a latent, by its index."""
    latents = torch.randn(count, 4, 4, 4, generator=torch.Generator().manual_seed(seed))
    flipped = latents.flip(-1)
    for index, value in (spoilt or {}).items():
        latents[index] = flipped[index] = value
    write_shard(shard_path(folder, 0, 0), latents, torch.arange(count) % 3, flipped)
    LatentStats(torch.full((1, 4, 1, 1), 0.1), torch.ones(1, 4, 1, 1)).save(folder / "latents_stats.pt")
    return folder


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with latents, and a preset small enough for many steps."""
    monkeypatch.setitem(lightningdit.PRESETS, "XXS", SMALLEST)
    write_latents(tmp_path / "latents")
    return tmp_path


def spike_at(folder: Path, step: int) -> None:
    """Write latents, one of them a hundred times too large: the first one that `step` sees."""
    index = int(BatchOrder(240, 4, 0).indices(step)[0])
    write_latents(folder / "latents", count=240, spoilt={index: 100.0})


def configured(folder: Path, name: str, steps: int = 40, more: str = "ckpt_every: 10") -> Path:
    """Write a configuration whose run lies in `folder/runs/name`."""
    path = folder / f"{name}.yaml"
    path.write_text(CONFIG.format(steps=steps, more=f"exp_name: {name}, {more}"))
    return path


def with_training(config: Config, **changes: object) -> Config:
    return replace(config, train=replace(config.train, **changes))


def run(config: Path) -> dict[str, torch.Tensor]:
    """Train in this process and return the averaged weights."""
    assert train.main(["--config", str(config)]) == 0
    return weights_of(config)


def weights_of(config: Path) -> dict[str, torch.Tensor]:
    return load_weights(config.parent / "runs" / config.stem / "transformer.safetensors")


def rows_of(config: Path) -> list[dict[str, float]]:
    return read_log(config.parent / "runs" / config.stem / "log.jsonl")


@pytest.fixture(scope="module")
def nursery() -> Iterator[subprocess.Popen[str]]:
    """The process that forks the trainings of all tests here."""
    if not hasattr(os, "fork"):
        pytest.skip("needs os.fork")
    environment = {name: value for name, value in os.environ.items() if name != "WORLD_SIZE"}
    command = [sys.executable, "-c", NURSERY, str(PROJECT)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env={**environment, "OMP_NUM_THREADS": "1"}, **pipes) as process:
        yield process
        process.stdin.close()


def nursed(nursery: subprocess.Popen[str], config: Path, processes: int = 1, killed_after: float = 0) -> list[int]:
    """Train on `processes` processes and return their exit codes; see NURSERY."""
    nursery.stdin.write(f"{killed_after:.4f} {processes} {config}\n")
    nursery.stdin.flush()
    return [int(code) for code in nursery.stdout.readline().split()]


def test_killed_at_random_moments_it_ends_with_the_same_bits(small: Path, nursery: subprocess.Popen[str]) -> None:
    more = "ckpt_every: 3, micro_batch_size: 3"
    whole, killed = configured(small, "whole", 60, more), configured(small, "killed", 60, more)
    assert nursed(nursery, whole) == [0]
    moments = np.random.default_rng(0).uniform(0.001, 0.1, 5)
    codes = [nursed(nursery, killed, killed_after=moment) for moment in moments]
    assert codes[:3] == [[-9]] * 3  # a fast machine may come to the end before all five
    assert nursed(nursery, killed) == [0]
    assert Path(f"{killed}.0.out").read_text().count("going on from step") >= 3
    first, second = weights_of(whole), weights_of(killed)
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert not list((small / "runs" / "killed").glob(".*.tmp"))


def test_processes_and_micro_batches_change_nothing_but_rounding(small: Path, nursery: subprocess.Popen[str]) -> None:
    parts = "ckpt_every: 10, micro_batch_size: 1"
    configs = [configured(small, "one", 20), configured(small, "two", 20), configured(small, "parts", 20, parts)]
    for config in configs:  # Adam moves a weight with a tiny gradient by the whole rate, whichever way it is rounded
        config.write_text(config.read_text().replace("lr: 1.0e-3", "lr: 3.0e-5"))
    start = train.Trainer(load_config(configs[0])).ema.weights
    codes = [nursed(nursery, config, count) for config, count in zip(configs, (1, 2, 1), strict=True)]
    assert codes == [[0], [0, 0], [0]]
    one, *others = (weights_of(config) for config in configs)
    assert max(float((value - start[name]).abs().max()) for name, value in one.items()) > 2e-4
    for other in others:
        for name, value in one.items():
            torch.testing.assert_close(other[name], value, rtol=0, atol=1e-5)
    assert Path(f"{configs[1]}.1.out").read_text() == ""  # the main process alone speaks
    said = [Path(f"{config}.0.out").read_text() for config in configs]
    assert re.search(r"^2 processes on cpu, \w+: 2 samples of each step, 2 at a time$", said[1], re.MULTILINE)
    assert re.search(r"^1 process on cpu, \w+: 4 samples of each step, 1 at a time$", said[2], re.MULTILINE)
    assert [row["step"] for row in rows_of(configs[1])] == [5, 10, 15, 20]


def test_processes_train_a_part_of_the_network_together(small: Path, nursery: subprocess.Popen[str]) -> None:
    """What is frozen has no gradient, and no process waits for one."""
    source = train.Trainer(load_config(configured(small, "source"))).model
    for value in source.parameters():  # biases and norms have no gradient behind layers of zeros
        value.data += 0.05 * torch.randn(value.shape, generator=torch.Generator().manual_seed(0))
    save_weights(source.state_dict(), small / "source.safetensors")
    part = "ckpt_every: 10, precision: fp32, trainable: bias, weight_init: source.safetensors"
    configs = [configured(small, "alone", 10, part), configured(small, "together", 10, part)]
    assert [nursed(nursery, config, count) for config, count in zip(configs, (1, 2), strict=True)] == [[0], [0, 0]]
    one, two = (load_weights(small / "runs" / config.stem / "adapter.safetensors") for config in configs)
    assert one.keys() == two.keys()
    assert not any(torch.equal(value, source.state_dict()[name]) for name, value in one.items())
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=1e-4)


def test_the_learning_rate_stands_in_line_and_log(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = configured(small, "rates", 20, "warmup_steps: 0.5, decay_steps: 5, ckpt_every: 20")
    config.write_text(config.read_text().replace("lr: 1.0e-3", "lr: 3.0e-7"))
    run(config)
    expected = [1.5e-7, 3e-7, 3e-7, 3e-7 * (0.5 - 0.5 * math.cos(math.pi / 5))]
    assert [row["learning_rate"] for row in rows_of(config)] == pytest.approx(expected, rel=1e-5)
    assert "learning_rate 1.5e-07" in capsys.readouterr().out


def test_a_training_may_end_earlier_than_its_schedule(small: Path) -> None:
    """`--max-steps` changes nothing but the end: a later run goes on as if it had not ended."""
    whole = run(configured(small, "whole", 20, "decay_steps: 0.5, ckpt_every: 5"))
    config = configured(small, "parts", 20, "decay_steps: 0.5, ckpt_every: 5")
    assert train.main(["--config", str(config), "--max-steps", "10"]) == 0
    assert [row["step"] for row in rows_of(config)] == [5, 10]
    assert train.main(["--config", str(config), "--max-steps", "100"]) == 0
    assert all(torch.equal(value, weights_of(config)[name]) for name, value in whole.items())


@pytest.mark.parametrize("mistake", ["data_path: none", "global_batch_size: 400"])
def test_an_error_at_the_start_is_said_alone(mistake: str, small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = configured(small, "wrong")
    config.write_text(re.sub(rf"{mistake.split(':')[0]}: \w+", mistake, config.read_text()))
    with pytest.raises(LightningDiTError):
        train.main(["--config", str(config)])
    assert capsys.readouterr().out == ""


def test_the_next_command_is_whole(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = configured(small, "a run", 5)
    run(config)
    said = capsys.readouterr().out
    assert said.index("settings: ") < said.index("step 5: ")
    assert f"Next: set ckpt_path: {small}/runs/a run/transformer.safetensors in {config}, and python -m" in said
    assert said.rstrip().endswith(f"LightningDiT.inference --config '{config}' --demo")


def test_draws_depend_on_seed_step_and_row_alone(small: Path) -> None:
    config = load_config(configured(small, "draws", more="lognorm_until_step: 2"))
    transport = build_transport(config)
    whole = LatentBatches(config, transport).make(1)
    halves = [LatentBatches(config, transport, rank, 2).make(1) for rank in (0, 1)]
    for name in ("latents", "labels", "times", "noise"):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(half, name) for half in halves])), name
    assert [len(part) for part in whole.micro_batches(3)] == [3, 1]
    assert torch.equal(torch.cat([part.noise for part in whole.micro_batches(3)]), whole.noise)
    assert [len(part) for part in whole.micro_batches(None)] == [4]
    assert whole.transport.use_lognorm
    assert not LatentBatches(config, transport).make(2).transport.use_lognorm
    later = LatentBatches(with_training(config, lognorm_until_step=1000), transport)
    assert [later.transport_at(step).use_lognorm for step in (0, 999, int("1000"), 1001)] == [True, True, False, False]
    assert LatentBatches(with_training(config, lognorm_until_step=None), transport).transport_at(10**6).use_lognorm
    with pytest.raises(LightningDiTError, match="a batch of 4 cannot be divided equally among 3 processes"):
        LatentBatches(config, transport, 0, 3)


def test_a_run_may_change_to_uniform_times_on_its_way(small: Path) -> None:
    """As the published 800-epoch run did; the weights are those of a run that had the setting from its beginning."""
    whole = run(configured(small, "whole", 20, "ckpt_every: 5, lognorm_until_step: 10"))
    never = run(configured(small, "never", 20, "ckpt_every: 5"))
    run(configured(small, "parts", 10, "ckpt_every: 5"))
    again = configured(small, "parts", 20, "ckpt_every: 5, lognorm_until_step: 10")
    again.write_text(again.read_text().replace("in_chans: 4", "in_chans: 4, use_checkpoint: true"))  # may change too
    parts = run(again)
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())
    assert not all(torch.equal(value, never[name]) for name, value in whole.items())


def drawn(config: Config, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return which rows (steps, B) of the steps see the mirrored latent, and which the null class."""
    batches = LatentBatches(config, build_transport(config))
    mirrored, dropped = [], []
    for step in range(steps):
        batch, samples = batches.make(step), batches.samples[batches.order.indices(step)]
        both = [batches.stats.normalise(batches.shards.batch(samples, torch.full((24,), flip))[0]) for flip in (0, 1)]
        equal = torch.stack([(batch.latents == latents).flatten(1).all(1) for latents in both])
        assert torch.equal(equal.sum(0), torch.ones(24, dtype=torch.long))  # the latent itself or its mirror image
        labels = batches.shards.labels[samples]
        assert set(batch.labels[batch.labels != labels].tolist()) <= {3}
        mirrored.append(equal[1])
        dropped.append(batch.labels == 3)
    return torch.stack(mirrored), torch.stack(dropped)


@pytest.mark.parametrize("scale", [0.18215, 1.0, 50.0])
def test_the_multiplier_acts_without_normalisation_too(scale: float, small: Path) -> None:
    """As latents of SD-VAE are scaled."""
    path = configured(small, "scaled")
    path.write_text(
        path.read_text().replace("image_size", f"latent_norm: false, latent_multiplier: {scale}, image_size")
    )
    batches = LatentBatches(config := load_config(path), build_transport(config))
    raw = torch.randn(24, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    batch, samples = batches.make(0), batches.order.indices(0)
    for row, sample in zip(batch.latents, samples, strict=True):
        assert torch.equal(row, raw[sample] * scale) or torch.equal(row, raw[sample].flip(-1) * scale)
    torch.testing.assert_close(batches.stats.denormalise(raw * scale), raw)


def test_a_run_goes_on_with_its_own_scale_of_latents(small: Path) -> None:
    path = configured(small, "scaled", 10, "ckpt_every: 5")
    run(path)
    path.write_text(path.read_text().replace("image_size", "latent_multiplier: 0.5, image_size"))
    with pytest.raises(LightningDiTError, match="other settings .data.latent_multiplier: default there, 0.5 now"):
        run(path)


@pytest.mark.parametrize(("more", "share"), [({}, 0.1), ({"label_dropout": 0.5}, 0.5)])
def test_labels_are_dropped_and_latents_mirrored_by_their_shares(
    more: dict[str, float], share: float, small: Path
) -> None:
    config = with_training(load_config(configured(small, "shares")), global_batch_size=24, **more)
    for seed in (0, 1, 2):
        mirrored, dropped = drawn(with_training(config, global_seed=seed), steps=60)
        count = dropped.numel()  # a mean of n draws has the standard error sqrt(p (1 - p) / n)
        for found, expected, among in (
            (mirrored, 0.5, count),
            (dropped, share, count),
            (mirrored & dropped, share / 2, count),  # neither draw tells of the other
        ):
            assert abs(float(found.double().mean()) - expected) < 4 * math.sqrt(expected * (1 - expected) / among)


def test_a_share_of_none_or_all_labels_is_exact(small: Path) -> None:
    config = with_training(load_config(configured(small, "exact")), global_batch_size=24)
    for share in (0.0, 1.0):
        _, dropped = drawn(with_training(config, label_dropout=share), steps=20)
        assert float(dropped.double().mean()) == share


@pytest.mark.filterwarnings("error")
def test_the_draws_of_a_seed_are_these(small: Path) -> None:
    config = with_training(load_config(configured(small, "pinned")), global_batch_size=24)
    mirrored, dropped = drawn(config, steps=3)
    assert [row.nonzero().flatten().tolist() for row in dropped] == [[6], [], [1, 19]]
    assert mirrored[0].nonzero().flatten().tolist() == [1, 4, 5, 6, 7, 11, 15, 16, 17, 18, 23]
    uniform = with_training(config, lognorm_until_step=0)
    for settings, times, noise in (
        (config, [0.769925, 0.886435, 0.858702], [0.223720, -1.699360, 0.076849]),
        (uniform, [0.356508, 0.262717, 0.115495], [0.985235, -0.314875, -1.574881]),
    ):
        batch = LatentBatches(settings, build_transport(settings)).make(0)
        torch.testing.assert_close(batch.times[:3], torch.tensor(times), rtol=0, atol=1e-6)
        torch.testing.assert_close(batch.noise[:3, 0, 0, 0], torch.tensor(noise), rtol=0, atol=1e-6)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_the_null_class_learns_from_dropped_labels_alone(share: float, small: Path) -> None:
    trainer = train.Trainer(with_training(load_config(configured(small, "dropped")), label_dropout=share))
    for step in range(4):  # a model that starts at zero passes no gradient to its embeddings at first
        trainer.step(step)
    table = trainer.model.y_embedder.embedding_table.weight
    learns = trainer.optimizer.state[table]["exp_avg"].abs().sum(1) > 0  # by class
    assert learns.tolist() == [share == 0, share == 0, share == 0, share == 1]


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_label_dropout_that_is_no_share_is_named(share: float, small: Path) -> None:
    value = ".nan" if math.isnan(share) else share
    with pytest.raises(LightningDiTError, match=rf"train.label_dropout is {share}; a share from 0 to 1 is expected"):
        load_config(configured(small, "wrong", more=f"label_dropout: {value}"))


def test_each_batch_is_made_once_and_the_next_one_beforehand(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    make = LatentBatches.make
    monkeypatch.setattr(LatentBatches, "make", lambda self, step: made.append(step) or make(self, step))
    config = load_config(configured(small, "once"))
    batches = LatentBatches(config, build_transport(config))
    for step in (1000, 1001, 1002):
        batches.batch(step)
    batches.batch(1003)
    deadline = time.monotonic() + 30
    while len(made) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert made == [1000, 1001, 1002, 1003, 1004]


def test_what_is_held_out_follows_from_the_share(small: Path) -> None:
    config = load_config(configured(small, "held", more="valid_share: 0.001"))
    few = LatentBatches(config, build_transport(config))
    assert (len(few.held_out), few.description) == (1, [4, 4, 4, 23])
    half = LatentBatches(with_training(config, valid_share=0.5), build_transport(config))
    assert sorted([*half.held_out.tolist(), *half.samples.tolist()]) == list(range(24))
    assert half.held_out.tolist() == [21, 0, 3, 1, 14, 7, 6, 4, 8, 5, 22, 19]
    other = replace(config, data=replace(config.data, valid_path=str(small / "latents")))
    assert LatentBatches(other, build_transport(other)).description == [4, 4, 4, 24]


def test_a_batch_made_beforehand_is_the_batch(small: Path) -> None:
    config = load_config(configured(small, "ahead"))
    batches = LatentBatches(config, build_transport(config))
    for step in (0, 1, 5, 2):  # in order, then as after a resumption and a return
        assert torch.equal(batches.batch(step).noise, LatentBatches(config, build_transport(config)).make(step).noise)


def test_damaged_latents_are_skipped(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_latents(small / "latents", spoilt={5: float("nan"), 11: 1e30})
    config = configured(small, "spoilt", 24)
    assert all(value.isfinite().all() for value in run(config).values())
    # four epochs of six steps; each epoch meets the two samples, at times in the same batch
    assert 4 <= rows_of(config)[-1]["skipped_steps"] <= 8
    assert rows_of(config)[-1]["rate_scale"] == 1
    assert "the loss of step" in capsys.readouterr().out


def test_a_spike_goes_back_leaves_its_batch_out_and_lowers_the_rate(
    small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spike_at(small, 33)
    config = configured(small, "spike", 60)
    run(config)
    assert (
        "step 33: the loss rose above 4 times its median; going back to step 30 at 0.5 of the learning rate, skipping"
        " the batches of steps 33 to 33" in capsys.readouterr().out
    )
    assert rows_of(config)[-1]["rate_scale"] == 0.5
    assert max(row["loss"] for row in rows_of(config)) < 5
    latest = load_training_state(RunDir(small / "runs" / "spike").newest())
    assert latest["opt"]["param_groups"][0]["lr"] == 0.5e-3


class BrokenOnce(train.Trainer):
    """Loses its weights once, as a device with a fault does, at the beginning of a step."""

    broken = False

    def step(self, step: int) -> object:
        if step == 25 and not BrokenOnce.broken:
            BrokenOnce.broken = True
            with torch.no_grad():
                self.model.x_embedder.proj.weight.mul_(1e20)
                self.model.final_layer.linear.weight.add_(1e20)
        return super().step(step)


def test_broken_weights_come_back_from_the_checkpoint(
    small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train, "Trainer", BrokenOnce)
    config = configured(small, "broken", 40, "ckpt_every: 10, max_skips: 6")
    assert all(value.isfinite().all() and value.abs().max() < 100 for value in run(config).values())
    said = capsys.readouterr().out
    # step 30 would save in the middle of the trouble, and does not
    assert "step 30: 6 steps in a row were not finite; going back to step 20 at 0.5 of the learning rate" in said
    assert rows_of(config)[-1]["skipped_steps"] == 6


def test_trouble_without_end_is_one_line(small: Path) -> None:
    write_latents(small / "latents", spoilt=dict.fromkeys(range(24), float("nan")))
    config = configured(small, "hopeless", 200, "ckpt_every: 10, max_skips: 3")
    with pytest.raises(LightningDiTError, match=r"does not get beyond step 18: it went back 5 times, .* 0\.03125 of"):
        run(config)
    assert not (small / "runs" / "hopeless" / "transformer.safetensors").exists()


@pytest.mark.parametrize(("steps", "every"), [(200, 20), (200, 10), (8, 100)])
def test_a_training_without_a_finite_step_fails(
    steps: int, every: int, small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Checkpoints at steps that are left out, or an end before the run goes back, do not make it a success."""
    write_latents(small / "latents", count=4, spoilt={2: float("nan")})
    config = configured(small, "hopeless", steps, f"ckpt_every: {every}")
    with pytest.raises(LightningDiTError, match="does not get beyond step|none of the 8 steps had a finite loss and g"):
        run(config)
    assert not (small / "runs" / "hopeless" / "transformer.safetensors").exists()
    shard = shard_path(small / "latents", 0, 0)
    assert f"the loss of step 0 is not finite, nor are the latents in row 2 of {shard}" in capsys.readouterr().out


def test_a_resumed_run_keeps_the_lowered_rate(small: Path, nursery: subprocess.Popen[str]) -> None:
    spike_at(small, 33)
    whole, config = configured(small, "whole", 60, "ckpt_every: 4"), configured(small, "parts", 60, "ckpt_every: 4")
    assert nursed(nursery, whole) == [0]
    for moment in (0.1, 0.15):
        nursed(nursery, config, killed_after=moment)
    assert nursed(nursery, config) == [0]
    assert rows_of(config)[-1]["rate_scale"] == 0.5
    again = weights_of(config)
    assert all(torch.equal(value, again[name]) for name, value in weights_of(whole).items())


def test_half_precision_with_a_loss_scale_trains(small: Path) -> None:
    config = configured(small, "half", 40, "ckpt_every: 20, precision: fp16")
    run(config)
    full = configured(small, "full", 40, "ckpt_every: 20, precision: fp32")
    run(full)
    assert rows_of(config)[-1]["loss_scale"] in [2.0**power for power in range(8, 17)]
    assert "loss_scale" not in rows_of(full)[-1]
    assert rows_of(config)[-1]["loss"] == pytest.approx(rows_of(full)[-1]["loss"], rel=0.02)


def test_too_little_memory_is_one_line(small: Path) -> None:
    trainer = train.Trainer(load_config(configured(small, "large")))
    trainer.model.forward = lambda *arguments: torch.empty(2**60)  # more than any machine has
    with pytest.raises(
        LightningDiTError,
        match=r"4 samples at a time do not fit into the memory of cpu; fix: .*micro_batch_size: 2 or",
    ):
        trainer.step(0)


def test_the_cosine_loss_is_of_velocities_alone(small: Path) -> None:
    path = configured(small, "noise", 10, "ckpt_every: 10, valid_every: 10, valid_share: 0.25")
    path.write_text(path.read_text().replace("use_cosine_loss: true", "use_cosine_loss: true, prediction: noise"))
    run(path)
    row = rows_of(path)[-1]
    assert {"loss", "valid_loss"} <= row.keys()
    assert not {"cos_loss", "valid_cos_loss"} & row.keys()
    for prediction in ("velocity", "noise", "score"):
        path.write_text(re.sub("prediction: .*}", f"prediction: {prediction}}}", path.read_text()))
        assert has_cosine_loss(load_config(path)) == (prediction == "velocity")


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("max_steps: 40", "max_steps: 40, warmup_steps: -1", r"train.warmup_steps is -1; 0 \(off\), a number of steps"),
        ("max_steps: 40", "max_steps: 40, decay_steps: -1", r"train.decay_steps is -1; 0 \(off\), a number of steps"),
        ("max_grad_norm: 1.0", "max_grad_norm: -1.0", "optimizer.max_grad_norm is -1.0; a positive norm"),
        ("max_steps: 40", "max_steps: 40, decay_steps: 1.5", "decay_steps is 1.5; .* a share of max_steps below 1"),
        (
            "max_steps: 40",
            "max_steps: 40, decay_steps: 4500",
            "train: warmup_steps 0 and decay_steps 4500 are more than the 40 steps of the training; fix: set shares of",
        ),
        (
            "global_batch_size: 4",
            "global_batch_size: 40",
            "a global batch of 40 exceeds the 24 samples.*at most 24",
        ),
    ],
)
def test_settings_that_no_run_could_use_are_named(before: str, after: str, message: str, small: Path) -> None:
    path = configured(small, "wrong")
    path.write_text(path.read_text().replace(before, after))
    with pytest.raises(LightningDiTError, match=message):
        train.main(["--config", str(path)])
    assert not (small / "runs").exists()


def test_checkpointing_gives_the_same_gradient(small: Path) -> None:
    path = configured(small, "kept")
    plain = train.Trainer(load_config(path))
    path.write_text(path.read_text().replace("in_chans: 4", "in_chans: 4, use_checkpoint: true"))
    saving = train.Trainer(load_config(path))
    first, second = (float(trainer.step(0)["gradient_norm"]) for trainer in (plain, saving))
    assert saving.model.settings.use_checkpoint
    assert first == pytest.approx(second, rel=1e-6)


def test_validation_is_the_mean_over_fixed_draws(small: Path) -> None:
    path = configured(small, "valid", more="valid_every: 10, valid_samples: 20, micro_batch_size: 3")
    path.write_text(path.read_text().replace("image_size", "valid_path: held, image_size"))
    write_latents(small / "held", count=30, seed=1)
    config = load_config(path)
    data = LatentBatches(config, build_transport(config))
    trainer = train.Trainer(config)
    validation = Validation(config, data, trainer.averaged_model(), ALONE)
    first, again = validation.observe(1), validation.observe(2)
    assert first == again
    # an untrained model predicts zero: its loss is the mean square of the velocity, latent - noise
    noise = torch.stack([validation._noise(row) for row in range(20)])
    raw = torch.randn(30, 4, 4, 4, generator=torch.Generator().manual_seed(1))[torch.arange(20) * 30 // 20]
    squares = ((raw - 0.1 - noise) ** 2).flatten(1).mean(1)
    assert first["valid_loss"] == pytest.approx(float(squares.mean()), rel=1e-5)
    assert first["valid_loss_t0.3"] == pytest.approx(float(squares[6:8].mean()), rel=1e-5)
    assert sum(name.startswith("valid_loss_t") for name in first) == 10
    trainer.step(0)
    trainer.step(1)  # the first step from zero moves only the last layer
    assert validation.observe(3) != first  # the weights are the average's own


def test_validation_leaves_out_what_is_not_finite(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = configured(small, "valid", more="valid_every: 10")
    path.write_text(path.read_text().replace("image_size", "valid_path: held, image_size"))
    config = load_config(path)
    for spoilt in ([1], range(6)):
        write_latents(small / "held", count=6, spoilt=dict.fromkeys(spoilt, math.nan))
        trainer = train.Trainer(config)
        if len(spoilt) == 6:
            with pytest.raises(
                LightningDiTError, match=r"no latent for the validation loss is finite .row 0 of .*held"
            ):
                Validation(config, trainer.data, trainer.averaged_model(), ALONE)
        else:
            assert math.isfinite(
                Validation(config, trainer.data, trainer.averaged_model(), ALONE).observe(1)["valid_loss"]
            )
            assert "note: 1 latents that are not finite are not validated on (row 1 of " in capsys.readouterr().out


def test_what_is_held_out_is_never_trained_on(small: Path) -> None:
    path = configured(small, "held", more="valid_every: 10, valid_share: 0.25")
    config = load_config(path)
    data = LatentBatches(config, build_transport(config))
    seen = {int(data.samples[index]) for step in range(20) for index in data.order.indices(step)}
    held_out = set(data.held_out.tolist())
    assert (len(held_out), len(seen), seen & held_out) == (6, 18, set())
    path.write_text(path.read_text().replace("valid_share: 0.25", "valid_share: 0.0"))
    with pytest.raises(LightningDiTError, match="there are no latents to validate on; fix: set data.valid_path"):
        train.main(["--config", str(path)])


def test_a_run_leaves_samples_curves_and_figures(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = "ckpt_every: 10, valid_every: 10, valid_share: 0.2, sample_every: 10, sample_count: 6"
    config = configured(small, "seen", 20, more)
    run(config)
    folder = small / "runs" / "seen"
    assert sorted(path.name for path in (folder / "samples").iterdir()) == ["step-0000010.png", "step-0000020.png"]
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    rows = {row["step"]: row for row in rows_of(config)}
    assert "valid_loss" in rows[10] and "valid_loss" not in rows[5]
    assert all(0 <= row["data_share"] <= 1 and row["images_per_second"] > 0 for row in rows.values())
    said = capsys.readouterr().out
    assert "samples show latents" in said
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError:
        assert "tensorboard is not installed, so there are no event files" in said
    else:
        assert list(folder.glob("events.*"))
    assert json.loads((folder / "log.jsonl").read_text().splitlines()[0])["step"] == 5


@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < BLOCKS_SHARE, reason="older torch compiles the whole model"
)
def test_one_compiled_block_serves_all(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced and differentiated by torch.compile, checkpoints of activations too; torch's own operations compute."""
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda plain, dynamic: real(plain, dynamic=dynamic, backend="aot_eager"))
    monkeypatch.setenv("CXX", sys.executable)  # a program that is there
    rows, losses = "precision: fp32, micro_batch_size: 3", []
    for more in (rows, f"compile: true, {rows}"):
        path = configured(small, "compiled", more=more)
        path.write_text(path.read_text().replace("in_chans: 4", "in_chans: 4, use_checkpoint: true"))
        trainer = train.Trainer(load_config(path))
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        losses.append([trainer.step(step)[name] for step in range(4) for name in ("loss", "gradient_norm")])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert all(map(is_compiled, trainer.model.blocks))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # of micro-batches of three and of one
    assert trainer.summary().endswith("3 at a time; the first step compiles one block, whose code serves all")


@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 4), reason="torch has no fused optimizer for the CPU yet"
)
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_the_device_itself_leaves_the_weights_as_they_are(
    weight_decay: float, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fused optimizer of a GPU, which torch also has for the CPU, against the one that the CPU takes."""
    path = configured(small, "device", more="precision: fp32")
    path.write_text(path.read_text().replace("lr: 1.0e-3,", f"lr: 1.0e-3, weight_decay: {weight_decay},"))
    real, trainers = torch.optim.AdamW, []
    for is_fused in (False, True):
        monkeypatch.setattr(
            torch.optim, "AdamW", lambda *args, is_fused=is_fused, **kw: real(*args, **kw | {"fused": is_fused})
        )
        trainers.append(train.Trainer(load_config(path)))
        trainers[-1].step(0)
        trainers[-1]._set_rate(1)
    plain, fused = trainers
    weights = [value.clone() for value in fused.trained]
    before = copy.deepcopy(fused.optimizer.state_dict()["state"])
    fused._update_weights(torch.tensor(True))
    assert all(map(torch.equal, fused.trained, weights))
    for number, state in fused.optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, before[number][name]) for name, value in state.items())
    plain._update_weights()
    fused._update_weights(torch.tensor(False))
    assert not all(map(torch.equal, fused.trained, weights))
    for one, other in zip(plain.trained, fused.trained, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-7)


def test_why_nothing_is_compiled_is_said(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def summary(more: str, **facts: object) -> str:
        monkeypatch.setattr(transformer_training, "abilities", lambda _: replace(CPU, **facts))
        return train.Trainer(load_config(configured(small, "said", 60, more))).summary().partition("a time")[2]

    assert summary("compile: auto") == summary("compile: off", capability=(9, 0)) == ""
    assert summary("compile: on", no_compiler="there is no C++") == "; not compiled: there is no C++"
    assert summary("compile: auto", capability=(9, 0)) == "; not compiled: 60 steps are few for it"


def test_a_resumed_run_needs_the_first_weights_no_more(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = configured(small, "tuned", 10, "ckpt_every: 5, weight_init: source.safetensors")
    source = train.Trainer(load_config(configured(small, "source"))).model
    save_weights(source.state_dict(), small / "source.safetensors")
    path.write_text(path.read_text().replace("num_classes: 3", "num_classes: 4"))
    run(path)
    assert "4 classes in place of 3; the rows are new, the null class is taken" in capsys.readouterr().out
    (small / "source.safetensors").unlink()
    path.write_text(path.read_text().replace("max_steps: 10", "max_steps: 15"))
    run(path)
    said = capsys.readouterr().out
    assert "going on from step 10" in said
    assert "in place of" not in said


def test_samples_are_decoded_by_the_tokenizer_if_its_weights_are_there(tmp_path: Path) -> None:
    latents = torch.randn(4, 6, 8, 8, generator=torch.Generator().manual_seed(0))
    write_shard(shard_path(tmp_path, 0, 0), latents, torch.arange(4))
    shutil.copy(BUNDLED / "latents_stats.pt", tmp_path)
    bundled = load_config(BUNDLED / "config.yaml")
    settings = replace(bundled.train, global_batch_size=2, sample_count=4, sample_every=1)
    config = replace(bundled, data=replace(bundled.data, data_path=str(tmp_path)), train=settings)
    trainer = train.Trainer(config)
    grids = SampleGrids(config, trainer.data, trainer.averaged_model(), tmp_path / "samples")
    assert grids.classes == [0, 2, 5, 7]  # spread over the ten
    assert grids.pipe(grids.classes).images[0].size == (32, 32)
    assert [grids.observe(1), grids.observe(2)] == [{}, {}]
    first, second = (tmp_path / "samples" / f"step-000000{step}.png" for step in (1, 2))
    assert first.read_bytes() == second.read_bytes()  # noises and classes never change


def test_a_tokenizer_of_other_latents_is_refused_before_the_first_step(tmp_path: Path) -> None:
    config = load_config(BUNDLED / "config.yaml")
    other = replace(config, model=replace(config.model, in_chans=4))
    with pytest.raises(LightningDiTError, match=f"model.in_chans is 4, and {config.model.in_chans} in the tokenizer"):
        open_tokenizer(other, None)


def test_curves_that_cannot_be_drawn_end_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = RunDir(tmp_path)
    with LiveCurves(tmp_path) as curves:
        for step in (1.0, 2.0):
            folder.log({"step": step, "loss": 1.0})
            curves.add({"step": step, "loss": 1.0})
        (tmp_path / "log.jsonl").write_text('no row\n{"step": 2.0, "loss": 1.0}\n')
    assert f"note: {tmp_path / 'curves.png'} is not drawn: {tmp_path / 'log.jsonl'}, line 1" in capsys.readouterr().out
    folder.log({"step": 3.0})
    (tmp_path / "log.jsonl").write_text('{"step": 2.0, "loss": 1.0}\n')
    with largest_file(5000), LiveCurves(tmp_path) as curves:
        curves.add({"step": 2.0, "loss": 1.0})
    assert "curves.png cannot be written (File too large); fix: free space" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.png")) + list(tmp_path.glob(".*.tmp"))


def test_samples_that_are_not_finite_end_nothing(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = train.Trainer(load_config(configured(small, "wild", more="sample_count: 2")))
    for value in trainer.ema.weights.values():
        value.fill_(float("nan"))
    grids = SampleGrids(trainer.config, trainer.data, trainer.averaged_model(), small / "samples")
    assert grids.observe(7) == {}
    assert "note: no samples at step 7: sampling in torch.float32 gave values that are not" in capsys.readouterr().out
    assert not (small / "samples").exists()

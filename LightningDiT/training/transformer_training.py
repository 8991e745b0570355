"""The training of LightningDiT on latent shards: model, average, optimizer, data, and what the loop is told."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from LightningDiT.checkpoint import inspect, without_values
from LightningDiT.compiling import BLOCKS_SHARE, compile_forward
from LightningDiT.config import Config, as_dict
from LightningDiT.data.labels import CLASS_NAMES, CONDITION_NAMES, NULL_TRAINED, Labels, Names
from LightningDiT.device import (
    PRECISIONS,
    abilities,
    autocast,
    best_device,
    emulation_note,
    sent_to_cpu,
    training_dtype,
)
from LightningDiT.distributed import ALONE, Processes
from LightningDiT.errors import LightningDiTError, is_out_of_memory
from LightningDiT.idle_settings import training_notes
from LightningDiT.loading import Network, build_transport, make_model, model_settings, network_metadata
from LightningDiT.models.adapters import matrix_names
from LightningDiT.sampling.null_row import null_failure_of
from LightningDiT.seeds import generator_for
from LightningDiT.training.ema import Ema
from LightningDiT.training.fine_tuning import CHANGED, NEW, RESIZED, initialise, plan
from LightningDiT.training.guard import GuardSettings, NotFiniteError, fetched
from LightningDiT.training.latent_batches import (
    LatentBatch,
    LatentBatches,
    class_names_of,
    condition_names_of,
    has_cosine_loss,
)
from LightningDiT.training.loop import LoopSettings
from LightningDiT.training.parts import check_parts
from LightningDiT.training.run_dir import RunDir, load_optimizer
from LightningDiT.training.scaler import LossScaler
from LightningDiT.training.schedule import learning_rate, schedule_lengths
from LightningDiT.training.trainable import (
    ADAPTER_NAME,
    ALL,
    Part,
    add_adapters,
    chosen_names,
    kind_of_part,
    restrict,
    whole_part,
)

WEIGHTS_NAME = "transformer.safetensors"
TERMS = ("loss", "cos_loss")
#: Steps from which a training on a GPU compiles by itself. A step of XL/1 with 128 samples on an H100 gains 0.2 s; of
#: small models and batches, whose steps take 0.05 s uncompiled, most of it.
COMPILED_FROM = 1000
DROPOUT_STREAM = 4  # a second seed, beside those of latent_batches and monitors
SCALING = ("latent_norm", "latent_multiplier")  # how latents become the model's; a run keeps it


class Trainer:
    """Model, average, optimizer and data of one run; `step` is one optimizer step.

    Args:
        starts: the run has no checkpoint yet, so it begins with the weights of `train.weight_init`.
    """

    def __init__(self, config: Config, processes: Processes = ALONE, starts: bool = True) -> None:
        self.config, self.processes = config, processes
        self.lengths = schedule_of(config)
        self.device = best_device()
        self.dtype = PRECISIONS.get(config.train.precision) or training_dtype(self.device)
        for note in filter(None, [emulation_note(self.dtype, self.device), *check_parts(config)]):
            processes.say(f"note: {note}")
        self.terms = TERMS if has_cosine_loss(config) else TERMS[:1]
        self.data = LatentBatches(config, build_transport(config), processes.rank, processes.count, self.device)
        names = class_names_of(config, self.data.shards, starts, processes.say)
        conditions = condition_names_of(config, processes.say)
        model, self.part = self._initial_model(starts, names, conditions)
        self.model = model.float().to(self.device)
        self.metadata = weights_metadata(config, names, conditions) | self.part.metadata
        self.metadata |= network_metadata(self.model.settings)
        self.ema = Ema(self.model, config.train.ema_decay, self.part.names)
        self.scaler = LossScaler(self.dtype == torch.float16)
        self.rate_scale, self.learning_rate = 1.0, 0.0
        values = dict(self.model.named_parameters())
        whole = self.part.kind == ALL  # the optimizer of a whole network counts its fixed table too
        self.trained = list(values.values()) if whole else [values[name] for name in self.part.trained]
        self.matrices = [values[name] for name in matrix_names(self.model)]
        self.optimizer = torch.optim.AdamW(
            self.trained,
            lr=config.optimizer.lr,
            betas=(0.9, config.optimizer.beta2),
            weight_decay=0.0,
            fused=self.device.type != "cpu",
        )
        waits = processes.count > 1 and self._leaves_out_parameters()  # before a forward is compiled
        self.code = self._compile()
        self.network: nn.Module = self.model  # with the gradients of all processes
        if processes.count > 1:
            self.network = nn.parallel.DistributedDataParallel(
                self.model, gradient_as_bucket_view=True, find_unused_parameters=waits
            )
        self.settings = self._kept_settings()

    def _kept_settings(self) -> dict[str, Any]:
        """Return what a resumed run must have in common with its checkpoint."""
        config = self.config
        settings = {
            "model": as_dict(config.model),
            "transport": as_dict(config.transport),
            "lognorm_until_step": config.train.lognorm_until_step,
            "batch": config.train.global_batch_size,
            "seed": config.train.global_seed,
            "latents": self.data.description,
            "data": {name: value for name, value in as_dict(config.data).items() if name in SCALING},
        }
        return settings if self.part.kind == ALL else settings | {"trained": self.part.metadata}

    def _initial_model(self, starts: bool, names: Names | None, conditions: Names | None) -> tuple[Network, Part]:
        """Return the model with random weights or those of `train.weight_init`, and what of it is trained.

        The checkpoints of a run that trains a part of the network lack the rest, so it reads the file again.
        """
        train = self.config.train
        is_whole = kind_of_part(self.config) == ALL
        torch.manual_seed(train.global_seed)
        # LatentBatches drops labels, by a generator of each row; the model's own dropout of labels stays off
        model, new = make_model(model_settings(self.config), class_dropout_prob=0.0), list[str]()
        if train.weight_init and (starts or not is_whole):
            made = initialise(model, train.weight_init, names, conditions, train.new_classes)
            new = [change.name for change in made.changes if change.kind in (CHANGED, RESIZED, NEW)]
            if starts:
                self.processes.say(made.text())
        return model, whole_part(model) if is_whole else restrict(model, self.config, new)

    def _leaves_out_parameters(self) -> bool:
        """Return whether a parameter has no part in the prediction; processes that wait for its gradient would hang."""
        settings = self.model.settings
        latent = torch.zeros(1, settings.in_channels, settings.input_size, settings.input_size, device=self.device)
        labels = torch.zeros((1, 2) if settings.num_conditions else (1,), dtype=torch.long, device=self.device)
        told = torch.zeros(1, settings.augmentation, device=self.device) if settings.augmentation else None
        with torch.random.fork_rng(devices=[]):  # dropout draws
            found = self.model(latent, torch.zeros(1, device=self.device), labels, told)
        parameters = [value for value in self.model.parameters() if value.requires_grad]
        gradients = torch.autograd.grad(found.sum(), parameters, allow_unused=True)
        return any(gradient is None for gradient in gradients)

    def _compile(self) -> str:
        """Compile what `train.compile` asks for and return it in a few words; empty if a CPU computes as usual."""
        wish, machine, steps = self.config.train.compile, abilities(self.device), self.config.train.max_steps
        if wish == "off" or (wish == "auto" and machine.capability is None):
            return ""
        if machine.no_compiler:
            return f"; not compiled: {machine.no_compiler}"
        if wish == "auto" and steps < COMPILED_FROM:
            return f"; not compiled: {steps} steps are few for it"
        if machine.torch < BLOCKS_SHARE or not hasattr(self.model, "blocks"):
            compile_forward(self.model)
            return "; the first step compiles the model"
        compile_forward(*self.model.blocks)
        if self.processes.count > 1:
            # else DistributedDataParallel would have each block cut where its messages begin, inside the block
            torch._dynamo.config.optimize_ddp = False
        return "; the first step compiles one block, whose code serves all"

    def step(self, step: int) -> Mapping[str, float]:
        """Take one optimizer step and return the loss terms, means over the global batch.

        Raises:
            NotFiniteError: a term or the gradient is not finite; no weight has changed.
        """
        started = time.monotonic()
        batch = self.data.batch(step)
        waited = time.monotonic() - started
        self._set_rate(step)
        self._seed_dropout(step)
        self.optimizer.zero_grad(set_to_none=True)
        losses = self.processes.mean(self._backward_within_memory(batch))
        values = torch.cat([losses, self._clip_gradient().view(1)])  # (2 or 3,)
        arriving, is_fused = sent_to_cpu(values), self.optimizer.defaults["fused"]
        if is_fused:  # it skips a bad step by itself, so it need not wait for the numbers
            self._update_weights(~values.isfinite().all())
        *terms, norm = fetched(arriving)
        self._require_finite(terms, norm, batch, step)
        if not is_fused:
            self._update_weights()
        self.ema.update()
        row = dict(zip(self.terms, terms, strict=True)) | {"gradient_norm": norm, "data_seconds": waited}
        return row | ({"loss_scale": self.scaler.scale} if self.scaler.enabled else {})

    def _seed_dropout(self, step: int) -> None:
        """Let dropout depend on the seed, the step and the process alone, whatever else draws in between."""
        if self.config.model.dropout:
            seeds = (self.config.train.global_seed, DROPOUT_STREAM, step, self.processes.rank)
            torch.manual_seed(generator_for(*seeds).initial_seed())

    @torch.no_grad()
    def _update_weights(self, skipped: Tensor | None = None) -> None:
        """Take the optimizer's step; a fused one leaves weights and moments as they are where `skipped` () is true.

        The matrices shrink here, as AdamW does it before its step (Loshchilov and Hutter, arXiv 1711.05101), and not in
        the optimizer, whose groups, and so its checkpoints, are then the same with any decay.
        """
        decay = self.config.optimizer.weight_decay
        if decay and self.matrices:
            kept = 1 - self.learning_rate * decay
            factor = kept if skipped is None else torch.where(skipped, 1.0, kept)
            torch._foreach_mul_(self.matrices, factor)
        if skipped is not None:
            self.optimizer.found_inf = skipped.float()  # what torch's own loss scaling tells a fused optimizer
        self.optimizer.step()

    def _require_finite(self, terms: list[float], norm: float, batch: LatentBatch, step: int) -> None:
        """Raise NotFiniteError unless all are finite; that of a loss names the latents that are not finite."""
        if not all(map(math.isfinite, terms)):
            error = NotFiniteError("loss", step)
            found = [name for names in self.processes.share(lambda: self.data.not_finite(batch)) for name in names]
            if found:
                error.message += f", nor are the latents in {', '.join(found)}"
            raise error
        finite = math.isfinite(norm)
        searches = self.scaler.searches(finite)
        if not finite:
            raise NotFiniteError("gradient", step, counts=not searches)

    def _set_rate(self, step: int) -> None:
        rate = learning_rate(step, self.config.optimizer.lr, *self.lengths, self.config.train.max_steps)
        self.learning_rate = rate * self.rate_scale
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate

    @property
    def micro_batch_size(self) -> int:
        """Samples of one forward pass in this process."""
        return min(len(self.data.rows), self.config.train.micro_batch_size or len(self.data.rows))

    def _backward_within_memory(self, batch: LatentBatch) -> Tensor:
        """Return what `_backward` returns; raises LightningDiTError if memory runs out."""
        try:
            return self._backward(batch)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            size = self.micro_batch_size
            raise LightningDiTError(
                f"{self.config.source}: {size} samples at a time do not fit into the memory of {self.device}",
                f"set train.micro_batch_size: {max(1, size // 2)} or model.use_checkpoint: true",
            ) from error

    def _backward(self, batch: LatentBatch) -> Tensor:
        """Add the gradients of this process's rows, one micro-batch at a time, and return its mean terms (1 or 2,)."""
        total = torch.zeros(len(self.terms), device=self.device)
        parts = batch.micro_batches(self.config.train.micro_batch_size)
        for number, part in enumerate(parts, start=1):
            last = number == len(parts)
            with contextlib.nullcontext() if last or self.network is self.model else self.network.no_sync():
                losses = self._losses(part.to(self.device)) * (len(part) / len(batch))
                self.scaler.scaled(losses.sum()).backward()
            total += losses.detach()
        return total

    def _losses(self, part: LatentBatch) -> Tensor:
        """Return the mean loss terms (1 or 2,) of a micro-batch."""
        told = () if part.augmentation is None else (part.augmentation,)
        with autocast(self.device, self.dtype):
            losses = part.transport.training_losses(
                lambda x, t, y: self.network(x, t, y, *told),
                part.latents,
                {"y": part.labels},
                x0=part.noise,
                t=part.times,
            )
        return torch.stack([losses[name].mean() for name in self.terms])

    def _clip_gradient(self) -> Tensor:
        """Clip the gradient and return the norm () that it had."""
        limit = self.config.optimizer.max_grad_norm
        self.scaler.unscale(self.trained)
        return nn.utils.clip_grad_norm_(self.trained, math.inf if limit is None else limit)

    def summary(self) -> str:
        """Return a line of processes, device, precision, how the batch is divided, and what is compiled.

        A second one says what is trained, unless that is everything.
        """
        count, precision = self.processes.count, str(self.dtype).removeprefix("torch.")
        trained = [] if self.part.kind == ALL else [self.part.text(self.model)]
        first = (
            f"{'1 process' if count == 1 else f'{count} processes'} on {self.device.type}, {precision}:"
            f" {len(self.data.rows)} samples of each step, {self.micro_batch_size} at a time{self.code}"
        )
        return "\n".join([first, *trained])

    def averaged_model(self) -> Network:
        """Return a model in eval mode whose weights are the average's own tensors, so that it costs no memory.

        What is not trained it shares with the model.
        """
        with without_values():
            model = make_model(self.model.settings)
            if self.part.products:
                add_adapters(model, self.part.products, self.part.rank)
        averages = {there: self.ema.weights[name] for name, there in self.part.names.items()}
        model.load_state_dict(self.model.state_dict() | averages, assign=True)
        return model.eval().requires_grad_(False)

    def state_dict(self) -> dict[str, object]:
        """Return everything that a resumed run needs; of the network what is trained, or new, alone."""
        own = self.model.state_dict()
        return {
            "model": {name: own[name] for name in self.part.names.values()},
            "ema": self.ema.weights,
            "ema_steps": self.ema.steps,
            "opt": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Restore what `state_dict` returned."""
        self.model.load_state_dict(state["model"], strict=self.part.kind == ALL)  # else it has the rest already
        self.ema.load_state_dict({"weights": state["ema"], "steps": state["ema_steps"]})
        load_optimizer(self.optimizer, state["opt"])
        self.scaler.load_state_dict(state["scaler"])


def loop_settings(config: Config, max_steps: int | None = None) -> LoopSettings:
    """Return the loop's settings; `max_steps` ends the run earlier than the configuration does."""
    train = config.train
    guard = GuardSettings(train.max_skips, train.spike_factor, train.rate_cut)
    return LoopSettings(
        min(max_steps or train.max_steps, train.max_steps),
        train.global_batch_size,
        train.log_every,
        train.ckpt_every,
        train.resume,
        guard,
    )


def schedule_of(config: Config) -> tuple[int, int]:
    """Return the steps of the learning rate's rise and fall; see `schedule_lengths`."""
    train = config.train
    return schedule_lengths(train.warmup_steps, train.decay_steps, train.max_steps, f"{config.source}: train")


def weights_name(config: Config) -> str:
    """Return the name of the file that a run ends with: whole weights, or an adapter."""
    return WEIGHTS_NAME if config.train.trainable == ALL else ADAPTER_NAME


def weights_metadata(config: Config, names: Names | None, conditions: Names | None) -> dict[str, str]:
    """Return the metadata of the weights that a run makes: names of the labels, and whether the null class is trained.

    That is so with dropped labels, or if the null class came with weights that do not say otherwise. Nothing is said if
    those are gone.
    """
    found = {CLASS_NAMES: names, CONDITION_NAMES: conditions}
    metadata = {key: json.dumps(value) for key, value in found.items() if value}
    source = config.train.weight_init
    if config.train.label_dropout or not source:
        return metadata | {NULL_TRAINED: json.dumps(bool(config.train.label_dropout))}
    if not Path(source).exists():
        return metadata
    return metadata | {NULL_TRAINED: json.dumps(not null_failure_of(Config(ckpt_path=source)))}


def settings_text(config: Config, dry_run: bool, max_steps: int | None = None) -> str:
    """Return the settings as text, for a dry run with the plan of `train.weight_init`.

    Args:
        max_steps: steps after which the run ends before its schedule does.
    """
    rise, fall = schedule_of(config)
    lines = [f"settings: {model_settings(config)}", f"          {config.train}", f"          {config.optimizer}"]
    lines.append(
        f"learning rate: {config.optimizer.lr:g}, after a rise over {rise} steps, and a fall over the last {fall}"
    )
    if max_steps and max_steps < rise:
        highest = learning_rate(max_steps - 1, config.optimizer.lr, rise, fall, config.train.max_steps)
        lines.append(
            f"note: --max-steps {max_steps} ends the run within that rise, at a learning rate of {highest:.2g}"
        )
    lines += [f"note: {note}" for note in training_notes(config)]
    if dry_run and config.train.weight_init:
        with without_values():
            model = make_model(model_settings(config))
        names = Labels.of(config, trained=False).identity
        info, conditions = inspect(config.train.weight_init), condition_names_of(config)
        lines.append(plan(model, info, names, conditions, config.train.new_classes).text())
        chosen_names(model, config)  # refuses what matches nothing
    return "\n".join(lines)


def check_data(config: Config, run: RunDir) -> None:
    """Raise what the run would of its folder, its latents and its classes."""
    run.refuse_foreign()
    if not config.data.data_path:
        print("note: data.data_path is not set yet; a training needs it")
        return
    for note in check_parts(config):
        print(f"note: {note}")
    data = LatentBatches(config, build_transport(config))
    class_names_of(config, data.shards, not run.checkpoints(), print)
    kind_of_part(config)

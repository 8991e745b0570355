"""Settings that a configuration sets and that nothing acts on, each with the reason."""

from __future__ import annotations

import math
from collections.abc import Callable
from operator import attrgetter

from LightningDiT.config import NAMED_SOLVERS, Config

Idle = tuple[tuple[str, ...], Callable[[Config], bool], str]

OF_TRANSFORMERS: Idle = (
    (
        *(f"model.{name}" for name in ("use_qknorm", "use_swiglu", "use_rope", "use_rmsnorm", "wo_shift")),
        *("model.learn_sigma", "model.use_checkpoint", "train.use_checkpoint"),
    ),
    lambda c: c.model.model_type.startswith("UNet"),
    "with a U-Net, only with a transformer",
)
#: Keys, whether they are without effect, and why. A key with its default value is never named.
IN_TRAINING: tuple[Idle, ...] = (
    OF_TRANSFORMERS,
    (("train.lognorm_until_step",), lambda c: not c.transport.use_lognorm, "without transport.use_lognorm"),
    (
        ("train.lognorm_until_step",),
        lambda c: c.transport.use_lognorm and (c.train.lognorm_until_step or 0) >= c.train.max_steps,
        "at or beyond train.max_steps",
    ),
    (("data.valid_path", "train.valid_samples"), lambda c: not c.train.valid_every, "without train.valid_every"),
    (("train.valid_share",), lambda c: bool(c.data.valid_path), "with data.valid_path"),
    (("data.fold",), lambda c: not c.data.split_file, "without data.split_file"),
    (("train.lora_rank", "train.lora_targets"), lambda c: c.train.trainable != "lora", "without train.trainable: lora"),
    (("train.new_classes",), lambda c: not c.train.weight_init, "without train.weight_init"),
    (
        ("optimizer.weight_decay",),
        lambda c: c.train.trainable == "bias",
        "with train.trainable: bias, without matrices",
    ),
    (("train.sample_count",), lambda c: not c.train.sample_every, "without train.sample_every"),
    (("train.valid_every",), lambda c: c.train.valid_every > c.train.max_steps, "beyond train.max_steps"),
    (("train.sample_every",), lambda c: c.train.sample_every > c.train.max_steps, "beyond train.max_steps"),
    (("train.judge_samples", "data.levels_path"), lambda c: not c.train.judge_every, "without train.judge_every"),
    (("train.judge_every",), lambda c: c.train.judge_every > c.train.max_steps, "beyond train.max_steps"),
    (
        ("train.patience",),
        lambda c: c.train.choose == "last" or (c.train.choose == "auto" and not c.train.judge_every),
        "with the last weights, which train.choose keeps: nothing is compared",
    ),
    (
        ("train.keep_every",),
        lambda c: math.lcm(c.train.keep_every, c.train.ckpt_every) > c.train.max_steps,
        "at this train.ckpt_every and train.max_steps, which save no such step",
    ),
    (
        ("transport.use_cosine_loss",),
        lambda c: c.transport.prediction != "velocity",
        "with this transport.prediction: the term is one of velocities",
    ),
)
IN_SAMPLING: tuple[Idle, ...] = (
    OF_TRANSFORMERS,
    (
        ("sample.cfg_interval_start", "sample.cfg_interval_end", "sample.guided_channels", "sample.guide_ckpt"),
        lambda c: c.sample.cfg_scale == 1,
        "with the guidance scale 1",
    ),
    (
        ("sample.diffusion_form", "sample.diffusion_norm", "sample.last_step", "sample.last_step_size"),
        lambda c: c.sample.mode == "ODE",
        "with sample.mode ODE",
    ),
    (
        ("sample.last_step_size",),
        lambda c: c.sample.mode == "SDE" and c.sample.last_step is None,
        "without sample.last_step",
    ),
    (
        ("sample.atol", "sample.rtol"),
        lambda c: c.sample.mode == "SDE" or not c.sample.sampling_method.startswith(ADAPTIVE),
        "with a solver that does not adapt its steps",
    ),
    (
        ("sample.solver_file",),
        lambda c: c.sample.mode == "SDE" or c.sample.sampling_method not in ("fast", "calibrated"),
        "with this sample.sampling_method; fast and calibrated read it",
    ),
    (
        ("sample.time_grid",),
        lambda c: c.sample.mode == "ODE" and c.sample.sampling_method in (*NAMED_SOLVERS, "calibrated"),
        "with this sample.sampling_method, which has a grid of its own",
    ),
    (
        ("sample.timestep_shift",),
        lambda c: c.sample.mode == "ODE" and c.sample.sampling_method in ("fast", "ucgm", "calibrated"),
        "with this sample.sampling_method, which has a grid of its own",
    ),
)
ADAPTIVE = ("dopri", "bosh", "fehlberg", "adaptive")


def idle_settings(config: Config, rows: tuple[Idle, ...]) -> list[str]:
    """Return a line for each setting that differs from its default and has no effect."""
    usual, lines = Config(), []
    for keys, is_idle, reason in rows:
        idle = [key for key in keys if attrgetter(key)(config) != attrgetter(key)(usual)]
        if idle and is_idle(config):
            lines.append(f"{', '.join(idle)}: no effect {reason}")
    return lines


def training_notes(config: Config) -> list[str]:
    """Return the configuration's own notes, and a line for each setting without effect in a training."""
    lines = [*config.notes, *idle_settings(config, IN_TRAINING)]
    if config.train.label_dropout == 0 and config.sample.cfg_scale != 1 and not config.sample.guide_ckpt:
        lines.append("sample.cfg_scale guides by the null class, which train.label_dropout 0 never trains")
    return lines


def sampling_notes(config: Config) -> list[str]:
    """Return the configuration's own notes, and a line for each setting without effect in sampling."""
    return [*config.notes, *idle_settings(config, IN_SAMPLING)]

"""Typed settings: every default once, the only reader of YAML, and an error for every unknown key.

The key names are those of the published YAML files, which load unmodified. Paths in a file are relative to
the folder that the file lies in. Nothing here needs torch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import itertools
import json
import math
import numbers
import re
import types
import typing
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeVar

from LightningDiT.errors import LightningDiTError
from LightningDiT.files import read_text
from LightningDiT.formats import diffusers_vae

MOST_YAML, MOST_BRACKETS = 2**20, 100  # bytes of a file, brackets within brackets
MOST_VALUES = 10_000  # of a file with aliases, each alias counted as what it stands for
#: How to get a configuration that does not exist, for the pipeline and for a training.
STEP3 = "python step3_setup_configs.py"
TRAINING_FIX = f"copy one of those in {Path(__file__).parent / 'configs'}"

#: Keys of the published schema that nothing here reads. They are accepted, and a note says so.
UNREAD_KEYS = {
    "data": ("fid_reference_file", "num_workers"),
    "train": ("ckpt",),
    "sample": ("likelihood",),
}


def is_positive(value: float) -> bool:
    return value > 0


def is_not_negative(value: float) -> bool:
    return value >= 0


def _is_count(value: object) -> bool:
    return isinstance(value, int) and value > 0


def is_seed(value: int) -> bool:
    return 0 <= value < 2**32


def _is_tolerance(value: float) -> bool:
    return 0 <= value < math.inf


def is_share(value: float) -> bool:
    return 0 <= value <= 1


def is_length(value: int | float) -> bool:
    """Whether a value is a number of steps, 0 for none, or a share of all steps."""
    return (isinstance(value, int) and value >= 0) or 0 < value < 1


LENGTH = "0 (off), a number of steps, or a share of max_steps below 1"


#: Settings that hold a path, which is relative to the folder of the configuration.
PATHS = (
    "ckpt_path",
    "adapter_path",
    "data.data_path",
    "data.valid_path",
    "data.split_file",
    "data.levels_path",
    "vae.ckpt_path",
    "train.output_dir",
    "train.weight_init",
    "sample.solver_file",
    "sample.guide_ckpt",
)
CHOICES = ("auto", "last", "valid_loss", "utility")  # of train.choose
LABELS = ("random", "balanced")  # of sample.labels
TIME_GRIDS = ("shifted", "graded", "kumaraswamy")  # of sample.time_grid
SAMPLING_PRECISIONS = ("auto", "fp32", "tf32", "bf16", "fp16")
#: What a value must be, beyond its type: key, test, words for the message.
COMPILES = ("sample.compile", "train.compile")
RULES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("data.image_size", is_positive, "a positive number of pixels"),
    ("data.num_classes", is_positive, "a positive number"),
    ("data.latent_multiplier", lambda value: 1e-6 <= value <= 1e6, "a factor from 0.000001 to 1000000"),
    ("data.num_conditions", is_not_negative, "0 (no second label) or a number of conditions"),
    ("data.fold", is_not_negative, "0 or more"),
    ("vae.downsample_ratio", is_positive, "a positive number"),
    ("model.in_chans", is_positive, "a positive number"),
    ("model.augmentation", is_not_negative, "0 (off) or the number of values that tell an augmentation"),
    ("model.dropout", lambda value: 0 <= value < 1, "a share from 0 to below 1"),
    ("train.max_steps", is_positive, "a positive number"),
    ("train.global_batch_size", is_positive, "a positive number"),
    ("train.log_every", is_positive, "a positive number"),
    ("train.ckpt_every", is_positive, "a positive number"),
    ("train.ema_decay", is_share, "a decay from 0 to 1"),
    ("train.label_dropout", is_share, "a share from 0 to 1"),
    ("train.precision", lambda value: value in ("auto", "fp32", "bf16", "fp16"), "auto, fp32, bf16 or fp16"),
    ("train.micro_batch_size", lambda value: value is None or value > 0, "a positive number"),
    ("train.keep_checkpoints", is_positive, "1 or more"),
    ("train.keep_every", is_not_negative, "0 (off) or a number of steps"),
    ("train.valid_every", is_not_negative, "0 (off) or a number of steps"),
    ("train.valid_samples", is_positive, "a positive number"),
    ("train.valid_share", lambda value: 0 <= value < 1, "a share from 0 to below 1"),
    ("train.sample_every", is_not_negative, "0 (off) or a number of steps"),
    ("train.sample_count", is_positive, "a positive number"),
    ("train.lognorm_until_step", lambda value: value is None or value >= 0, "a number of steps"),
    ("train.warmup_steps", is_length, LENGTH),
    ("train.decay_steps", is_length, LENGTH),
    ("train.lora_rank", is_positive, "a positive rank"),
    ("train.new_classes", lambda value: value in ("null", "mean", "random"), "null, mean or random"),
    ("train.judge_every", is_not_negative, "0 (off) or a number of steps"),
    ("train.judge_samples", is_positive, "a positive number"),
    ("train.choose", lambda value: value in CHOICES, "auto, last, valid_loss or utility"),
    ("train.patience", is_not_negative, "0 (off) or a number of looks"),
    ("train.max_skips", is_positive, "1 or more"),
    ("train.spike_factor", lambda value: value == 0 or 1 < value < math.inf, "0 (off) or a factor above 1"),
    ("train.rate_cut", lambda value: 0 < value <= 1, "a factor above 0 and up to 1"),
    ("train.global_seed", is_seed, "a whole number from 0 to below 2^32"),
    ("optimizer.beta2", lambda value: 0 <= value < 1, "a decay from 0 to below 1"),
    ("optimizer.weight_decay", lambda value: 0 <= value < 1, "a decay from 0 to below 1"),
    ("optimizer.lr", lambda value: 0 < value < 1, "a rate between 0 and 1"),
    ("optimizer.max_grad_norm", lambda value: value is None or 0 < value < math.inf, "a positive norm, or null"),
    ("sample.mode", lambda value: value in ("ODE", "SDE"), "ODE or SDE"),
    ("sample.num_sampling_steps", lambda value: value > 1, "2 or more"),
    ("sample.per_proc_batch_size", lambda value: value is None or value > 0, "1 or more"),
    ("sample.cfg_scale", lambda value: 0 <= value < 1e4, "a scale from 0 to below 10000"),
    ("sample.cfg_interval_start", is_share, "a time between 0 and 1"),
    ("sample.cfg_interval_end", is_share, "a time between 0 and 1"),
    ("sample.time_grid", lambda value: value in TIME_GRIDS, "shifted, graded or kumaraswamy"),
    ("sample.labels", lambda value: value in LABELS, "random or balanced"),
    ("sample.atol", _is_tolerance, "a tolerance of 0 or more"),
    ("sample.rtol", _is_tolerance, "a tolerance of 0 or more"),
    ("sample.timestep_shift", lambda value: 0 <= value < 1e4, "0 (off) or a positive shift below 10000"),
    ("sample.precision", lambda value: value in SAMPLING_PRECISIONS, "auto, fp32, tf32, bf16 or fp16"),
    *((name, lambda value: value in ("auto", "on", "off", True, False), "auto, on or off") for name in COMPILES),
    ("sample.guided_channels", lambda value: value == "all" or _is_count(value), 'a positive number, or "all"'),
)

PUBLISHED_POINTS = 250
CPU_BATCH = 4  # images at once on a CPU if a configuration names no number
#: Solver, points and kind of the time grid under one name, which override those settings. `fast` is the calibrated
#: solver with the most evaluations if sample.solver_file has one that fits, else its row here. `ucgm` is the sampler of
#: arXiv 2505.07447 with 50 evaluations.
NAMED_SOLVERS = {
    "fast": ("ab3", 26, "graded"),
    "published": ("euler", PUBLISHED_POINTS, "shifted"),
    "ucgm": ("extrapolated", 51, "kumaraswamy"),
}
#: Settings of `sample` under one name: a solver together with the guidance that somebody published with it. The FIDs
#: are those of docs/metrics.md, none measured here. A preset guides without a guide.
PRESETS: dict[str, dict[str, Any]] = {
    "demo": {"sampling_method": "published", "cfg_scale": 9.0},
    "64ep": {"sampling_method": "published", "timestep_shift": 0.3, "cfg_scale": 10.0, "cfg_interval_start": 0.1},
    "800ep": {"sampling_method": "published", "timestep_shift": 0.3, "cfg_scale": 6.7, "cfg_interval_start": 0.125},
    "ucgm": {"sampling_method": "ucgm", "cfg_scale": 6.7, "cfg_interval_start": 0.125},
}
PRESET_WORDS = {
    "demo": "the published demonstration: Euler with 250 points, guidance 9 at all times",
    "64ep": "the published figures of the 64-epoch weights: Euler with 250 points, shift 0.3, guidance 10 from t = 0.1",
    "800ep": "the same of the 800-epoch weights: guidance 6.7 from t = 0.125",
    "ucgm": "50 evaluations of arXiv 2505.07447 with guidance 6.7 from t = 0.125, for the 800-epoch weights",
}

T = TypeVar("T")


@dataclass(frozen=True)
class DataConfig:
    """Where latents and their statistics lie, and what they describe."""

    data_path: str | None = None  # the folder that holds latents_stats.pt (and the shards, for training)
    image_size: int = 256  # pixels a side
    num_classes: int = 1000  # the null class of guidance is this number
    latent_norm: bool = True  # normalise latents by mean and std per channel
    latent_multiplier: float = 1.0  # factor on latents, after the normalisation if there is one
    valid_path: str | None = None  # a folder of shards for the validation loss of training
    class_names: tuple[str, ...] | None = None  # one a class; else the latents' manifest has them, or ImageNet for 1000
    num_conditions: int = 0  # values of a second label, each image's condition; 0: there is none
    condition_names: tuple[str, ...] | None = None  # one a condition; else the latents' manifest has them
    split_file: str | None = None  # split.json of step 5; a training refuses latents of its test windows
    fold: int = 0  # of that split
    levels_path: str | None = None  # the windows that step 5 wrote, which samples are judged beside


@dataclass(frozen=True)
class VaeConfig:
    """Which tokenizer decodes."""

    model_name: str = "vavae_f16d32"  # a name in tokenizer/configs, or the path of a tokenizer YAML
    downsample_ratio: int = 16  # image side / latent side
    ckpt_path: str | None = None  # weights; replaces the path in the tokenizer YAML


@dataclass(frozen=True)
class ModelConfig:
    """Which transformer, and its switches."""

    model_type: str = "LightningDiT-XL/1"  # a preset: LightningDiT-SIZE/PATCH or UNet-SIZE
    use_qknorm: bool = False  # normalise queries and keys; prevents NaN, costs FID
    use_swiglu: bool = True  # SwiGLU in place of a GELU MLP
    use_rope: bool = True  # rotary positions of queries and keys
    use_rmsnorm: bool = True  # RMSNorm in place of LayerNorm
    wo_shift: bool = False  # AdaLN without shift
    in_chans: int = 32  # channels of the latent
    learn_sigma: bool = False  # twice the output channels, of which the second half is ignored
    use_checkpoint: bool = False  # recompute activations in the backward pass
    augmentation: int = 0  # values that tell the network how a latent was augmented; 0: none
    dropout: float = 0.0  # share of activations that are set to zero in training


def _spell_compile(self: TrainConfig | SampleConfig) -> None:
    """Name the setting's value as `auto` is: earlier files have true and false, as which YAML reads on and off."""
    if isinstance(self.compile, bool):
        object.__setattr__(self, "compile", "on" if self.compile else "off")


@dataclass(frozen=True)
class TrainConfig:
    """Length, batch, and upkeep of a training run."""

    max_steps: int = 80_000  # optimiser steps of the whole run
    global_batch_size: int = 1024  # latents of a step, in all processes together
    global_seed: int = 0  # of the order of the latents, their times, noises and dropped labels
    output_dir: str = "output"  # folder of the runs, unless --output names that of this run
    exp_name: str = "lightningdit"  # name of the run's folder in it
    log_every: int = 100  # steps between two lines of the log
    ckpt_every: int = 20_000  # steps between two checkpoints
    resume: bool = True  # go on from the newest checkpoint of the run
    weight_init: str | None = None  # weights to start from
    use_checkpoint: bool = False  # another published spelling of model.use_checkpoint
    label_dropout: float = 0.1  # share of labels replaced by the null class; at 0 guidance cannot be learnt
    ema_decay: float = 0.9999  # of the averaged weights, which are what is kept and sampled
    warmup_steps: int | float = 0  # linear rise of the learning rate; below 1: a share of max_steps
    decay_steps: int | float = 0  # cosine fall to zero over the last steps; below 1: a share of max_steps
    precision: str = "auto"  # of matrix products: auto (bf16 where it is native, else fp32) | fp32 | bf16 | fp16
    micro_batch_size: int | None = None  # samples of one forward pass in each process; fewer take less memory
    compile: bool | str = "auto"  # torch.compile of the transformer's block: auto | on | off
    keep_checkpoints: int = 2  # the newest ones
    keep_every: int = 0  # also keep checkpoints at multiples of this step; 0: off
    valid_every: int = 0  # steps between two validation losses (EMA weights); 0: off
    valid_samples: int = 1024  # the most latents of a validation loss
    valid_share: float = 0.0  # share of the training latents that is held out, without data.valid_path
    sample_every: int = 0  # steps between two sample grids (EMA weights); 0: off
    sample_count: int = 16  # images of a grid
    lognorm_until_step: int | None = None  # uniform times from this step on, with transport.use_lognorm
    trainable: str | tuple[str, ...] = "all"  # all | lora | bias | patterns of names, such as blocks.*.mlp.*
    lora_rank: int = 8  # of each adapter's two matrices
    lora_targets: tuple[str, ...] | None = None  # layers with an adapter, by ends of their names; None: all products
    new_classes: str = "mean"  # rows of classes that weight_init lacks: mean (of its rows) | null (row) | random
    judge_every: int = 0  # steps between two looks at what samples are worth (data.levels_path); 0: off
    judge_samples: int = 8  # of each class in such a look
    choose: str = "auto"  # weights to keep: last | valid_loss | utility | auto (utility with judge_every, else last)
    patience: int = 0  # looks without a better one after which the run ends; 0: off
    max_skips: int = 10  # non-finite steps in a row before the run goes back to a checkpoint
    spike_factor: float = 4.0  # a loss above this many times the median of the last 100 does the same; 0: off
    rate_cut: float = 0.5  # factor on the learning rate each time the run goes back

    __post_init__ = _spell_compile


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW."""

    lr: float = 2e-4  # learning rate after the warm-up
    beta2: float = 0.95  # decay of the second moment; that of the first is 0.9
    max_grad_norm: float | None = None  # the gradient's norm is clipped to this
    weight_decay: float = 0.0  # of matrices; biases, norms and tables have none


@dataclass(frozen=True)
class TransportConfig:
    """Path between noise and data, what the model predicts, and the loss."""

    path_type: str = "Linear"  # Linear | GVP | VP
    prediction: str = "velocity"  # velocity | noise | score
    loss_weight: str | None = None  # None | velocity | likelihood
    sample_eps: float | None = None  # distance kept from the ends of the path; None: as the path needs
    train_eps: float | None = None  # the same for training times
    use_cosine_loss: bool = False  # add 1 - cosine between predicted and true velocity
    use_lognorm: bool = False  # logit-normal training times


@dataclass(frozen=True)
class SampleConfig:
    """Solver, guidance and number of images."""

    mode: str = "ODE"  # ODE | SDE (SiT, arXiv 2401.08740)
    sampling_method: str = "euler"  # fast, published, ucgm, calibrated, or euler, ab3, dopri5, ...: docs/sampling.md
    solver_file: str | None = None  # calibrated solvers of these weights, written by tools/calibrate_solver
    atol: float = 1e-6  # of the adaptive solvers
    rtol: float = 1e-3  # of the adaptive solvers too
    reverse: bool = False  # from data to noise; the call then needs latents
    num_sampling_steps: int = PUBLISHED_POINTS  # points of the time grid, so one evaluation fewer for Euler
    cfg_scale: float = 1.0  # 1: no guidance
    guide_ckpt: str | None = None  # weaker weights of the same shape, for autoguidance; None: classifier-free guidance
    per_proc_batch_size: int | None = None  # images at once; None: CPU_BATCH, and on a GPU as many as its memory holds
    fid_num: int = 50_000  # images of a run for the FID
    labels: str = "random"  # of a run without --classes: random | balanced, each class equally often
    cfg_interval_start: float = 0.0  # no guidance before this time
    cfg_interval_end: float = 1.0  # no guidance after this time
    time_grid: str = "shifted"  # shifted: by timestep_shift | graded: short steps where guidance begins | kumaraswamy
    timestep_shift: float = 0.0  # below 1: more points near the noise; 0: off
    guided_channels: int | str = 3  # the first N channels are guided, or "all"
    precision: str = "auto"  # auto | fp32 | tf32 | bf16 | fp16, docs/precision.md
    compile: bool | str = "auto"  # torch.compile of the networks: auto | on | off, docs/compile.md
    deterministic: bool = False  # an image's bits are the same in every batch; slower, docs/compile.md
    diffusion_form: str = "SBDM"  # of the SDE: constant | SBDM | sigma | linear | decreasing | increasing-decreasing
    diffusion_norm: float = 1.0  # of the SDE: factor on its diffusion; of `decreasing`, on the cosine in it
    last_step: str | None = "Mean"  # of the SDE: Mean | Tweedie | Euler | none
    last_step_size: float = 0.04  # of the SDE: length of the last step in time

    __post_init__ = _spell_compile


def resolved_solver(sample: SampleConfig) -> SampleConfig:
    """Return the settings with a named solver's method, points and grid spelt out; others as they are."""
    if sample.mode != "ODE" or sample.sampling_method not in NAMED_SOLVERS:
        return sample
    method, points, grid = NAMED_SOLVERS[sample.sampling_method]
    shift = sample.timestep_shift if grid == "shifted" else 0.0
    return dataclasses.replace(
        sample, sampling_method=method, num_sampling_steps=points, time_grid=grid, timestep_shift=shift
    )


def preset_values(name: str) -> dict[str, Any]:
    """Return solver and guidance of a row of `PRESETS` by key of `SampleConfig`: what the row leaves out is default.

    Raises:
        LightningDiTError: no such preset.
    """
    if name not in PRESETS:
        raise LightningDiTError(f"preset {name!r} is unknown; {', '.join(PRESETS)} are expected", "choose one of them")
    solver = ("mode", "time_grid", "timestep_shift", "reverse")
    guidance = ("cfg_scale", "cfg_interval_start", "cfg_interval_end", "guided_channels", "guide_ckpt")
    usual = SampleConfig()
    return {key: getattr(usual, key) for key in (*solver, *guidance)} | PRESETS[name]


def with_preset(sample: SampleConfig, name: str) -> SampleConfig:
    """Return the settings with solver and guidance of a preset; see `preset_values`."""
    return dataclasses.replace(sample, **preset_values(name))


def with_overrides(sample: SampleConfig, names: Mapping[str, str] | None = None, **given: Any) -> SampleConfig:
    """Return the settings with those of `given` that are not None in place of their own.

    A number of points replaces that of a named solver, whose method and grid stay.

    Args:
        names: what the caller calls each setting, for messages; by default `sample.key`.

    Raises:
        LightningDiTError: a value has the wrong type or cannot be.
    """
    hints = typing.get_type_hints(SampleConfig)
    called = {f"sample.{key}": (names or {}).get(key, f"sample.{key}") for key in given}
    values = {
        key: coerce(value, hints[key], called[f"sample.{key}"]) for key, value in given.items() if value is not None
    }
    _check_rules({f"sample.{key}": value for key, value in values.items()}, called.__getitem__)
    changed = dataclasses.replace(sample, **values)
    points = values.get("num_sampling_steps")
    return dataclasses.replace(resolved_solver(changed), num_sampling_steps=points) if points else changed


def check_sample(sample: SampleConfig) -> None:
    """Raise LightningDiTError for sampling settings that no run could use."""
    hints = typing.get_type_hints(SampleConfig)
    values = {name: coerce(value, hints[name], f"sample.{name}") for name, value in vars(sample).items()}
    _check_rules({f"sample.{name}": value for name, value in values.items()}, str)
    _check_pairs(sample, "sample")


def describe_solver(sample: SampleConfig) -> str:
    """Return the solver in a few words, as far as the settings alone decide it."""
    if sample.sampling_method == "calibrated":
        return f"calibrated, at most {sample.num_sampling_steps - 1} evaluations"
    spelt = resolved_solver(sample)
    grid = f"shift {spelt.timestep_shift:g}" if spelt.time_grid == "shifted" else f"{spelt.time_grid} grid"
    words = f"{spelt.sampling_method}, {spelt.num_sampling_steps} points, {grid}"
    if sample.mode == "SDE":
        return f"SDE {words}"
    if sample.sampling_method == "fast" and sample.solver_file:  # the weights, not read yet, decide
        words = f"calibrated if a solver fits, else {words}"
    return words if spelt is sample else f"{sample.sampling_method}: {words}"


def describe_guidance(guidance: Any) -> str:
    """Return scale, channels and interval of the guidance of `SampleConfig` or `transport.GuidanceSettings`."""
    return (
        f"{guidance.cfg_scale:g} on {guidance.guided_channels} channels"
        f" from t = {guidance.cfg_interval_start:g} to {guidance.cfg_interval_end:g}"
    )


@dataclass(frozen=True)
class Config:
    """One file of the published schema."""

    ckpt_path: str | None = None  # the network's weights
    adapter_path: str | None = None  # what a training of a part of these weights has changed
    data: DataConfig = field(default_factory=DataConfig)
    vae: VaeConfig = field(default_factory=VaeConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    transport: TransportConfig = field(default_factory=TransportConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    source: str = ""  # the file that was read
    notes: tuple[str, ...] = ()  # what the reader of the file should know


def load_config(path: str | Path, fix: str = STEP3) -> Config:
    """Return the settings in the YAML file at `path`, its relative paths made absolute.

    Args:
        fix: command that makes such a file, for the message if it is missing.

    Raises:
        LightningDiTError: the file is missing or no YAML, a key is unknown, a value has the wrong type or
            cannot be.
    """
    values = read_yaml(path, fix)
    notes = _drop_unread_keys(values)
    config = typed(Config, values, str(path), hidden=("source", "notes"))
    config = dataclasses.replace(config, source=str(real_path(Path(path))), notes=tuple(notes))
    _check_values(config)
    return _with_absolute_paths(config)


def read_yaml(path: str | Path, fix: str = STEP3) -> dict[str, Any]:
    """Return the mapping in a YAML file. Its text is data: `${...}` stays as it is.

    Args:
        fix: command that makes such a file, for the message if it is missing.

    Raises:
        LightningDiTError: it is missing, a folder, no YAML, or holds no mapping.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    file = Path(path)
    if not file.exists():
        raise LightningDiTError(f"configuration {path} does not exist", fix)
    if file.is_dir():
        raise LightningDiTError(f"configuration {path} is a folder, a YAML file was expected", "name the file")
    try:
        text = read_text(file, MOST_YAML, "utf-8-sig")
        _refuse_deep_brackets(text)
        _refuse_copies(text)
        loaded = OmegaConf.to_container(OmegaConf.load(io.StringIO(text)), resolve=False)
    except (YAMLError, OmegaConfBaseException, AssertionError, ValueError, OSError, RecursionError) as error:
        # an assertion of OmegaConf's: the text is no mapping, and not even YAML's `key: value`
        reason = "nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())
        raise LightningDiTError(
            f"configuration {path} is no valid YAML ({reason[:200]})",
            f"correct it, or {fix}",
        ) from error
    return as_mapping(loaded, str(path))


def _refuse_deep_brackets(text: str) -> None:
    """Raise ValueError for brackets within brackets that keep YAML's reader busy for minutes."""
    depth = 0
    for bracket in re.findall(r"[\[\]{}]", text):
        depth = max(0, depth + (1 if bracket in "[{" else -1))
        if depth > MOST_BRACKETS:
            raise ValueError("nested too deeply")


def _refuse_copies(text: str) -> None:
    """Raise ValueError for aliases that stand for too many values; OmegaConf before 2.4 copies each of them."""
    if "*" not in text or "&" not in text:
        return
    import yaml

    sizes: dict[int, int] = {}

    def size(node: Any) -> int:
        if id(node) not in sizes:
            sizes[id(node)] = 0  # an alias of a node around it, which OmegaConf refuses
            inner = node.value if isinstance(node, yaml.CollectionNode) else []
            parts = itertools.chain(*inner) if isinstance(node, yaml.MappingNode) else inner
            sizes[id(node)] = 1 + sum(map(size, parts))
        return sizes[id(node)]

    if size(yaml.compose(text, Loader=yaml.SafeLoader)) > MOST_VALUES:
        raise ValueError(f"its aliases stand for more than {MOST_VALUES} values")


def as_yaml(values: Mapping[str, Any]) -> str:
    """Return plain values as YAML text that `read_yaml` gives back, the keys in their order."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(dict(values)))


def typed(cls: type[T], values: dict[str, Any], where: str, hidden: tuple[str, ...] = ()) -> T:
    """Return the dataclass `cls` filled from `values`, each coerced to its field's type.

    Args:
        where: file and section, for the messages.
        hidden: fields that a file may not set.

    Raises:
        LightningDiTError: an unknown key (the nearest known one is named), a missing one that has no default, or a
            value of another type.
    """
    hints = typing.get_type_hints(cls)
    known = [name for name in hints if name not in hidden]
    refuse_unknown(values, known, where)
    for item in dataclasses.fields(cls):
        if item.name not in values and item.default is item.default_factory is dataclasses.MISSING:
            raise LightningDiTError(f"{where}: {item.name} is missing", "set it")
    filled: dict[str, Any] = {}
    for name, value in values.items():
        hint = hints[name]
        if dataclasses.is_dataclass(hint):
            section = f"{where}: {name}"
            filled[name] = typed(hint, as_mapping(value if value is not None else {}, section), section)
        else:
            filled[name] = coerce(value, hint, f"{where}: {name}")
    try:
        return cls(**filled)
    except ValueError as error:
        raise LightningDiTError(f"{where}: {error}", "edit that value") from error


def as_dict(config: Any) -> dict[str, Any]:
    """Return a settings dataclass as plain values that differ from the defaults, ready for YAML."""
    result: dict[str, Any] = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if item.name in ("source", "notes"):
            continue
        if dataclasses.is_dataclass(value):
            if section := as_dict(value):
                result[item.name] = section
        elif value != item.default:
            result[item.name] = list(value) if isinstance(value, tuple) else value
    return result


def _drop_unread_keys(values: dict[str, Any]) -> list[str]:
    """Take the keys that nothing reads out of `values` and return a note for each that was set."""
    notes = []
    for section, keys in UNREAD_KEYS.items():
        present = values.get(section)
        if not isinstance(present, dict):
            continue
        notes += [f"{section}.{key} is accepted and has no effect" for key in keys if present.pop(key, None)]
    return notes


def _check_rules(values: Mapping[str, Any], name_of: Callable[[str], str]) -> None:
    """Refuse values, given by dotted key, that no run could use."""
    for key, good, expected in RULES:
        if key in values and not good(values[key]):
            raise LightningDiTError(
                f"{name_of(key)} is {values[key]!r}; {expected} is expected", "choose another value"
            )


def _check_pairs(sample: SampleConfig, where: str) -> None:
    """Refuse values of two settings that do not go together."""
    start, end = sample.cfg_interval_start, sample.cfg_interval_end
    if start > end:
        raise LightningDiTError(
            f"{where}.cfg_interval_start is {start}, after cfg_interval_end {end}", "edit either value"
        )
    if not sample.atol and not sample.rtol:
        raise LightningDiTError(f"{where}.atol and rtol are both 0, which no step meets", "edit either value")


def _check_values(config: Config) -> None:
    """Refuse values that no run could use, naming the key."""
    _check_rules({key: attrgetter(key)(config) for key, _, _ in RULES}, lambda key: f"{config.source}: {key}")
    _check_pairs(config.sample, f"{config.source}: sample")
    names, classes = config.data.class_names, config.data.num_classes
    if names is not None and len(names) != classes:
        raise LightningDiTError(
            f"{config.source}: data.class_names has {len(names)} names for {classes} classes",
            "remove data.class_names (latents carry the names of theirs), or name every class once",
        )
    names, conditions = config.data.condition_names, config.data.num_conditions
    if names is not None and len(names) != conditions:
        raise LightningDiTError(
            f"{config.source}: data.condition_names has {len(names)} names, data.num_conditions is {conditions}",
            f"set data.num_conditions: {len(names)} in {config.source}",
        )
    size, ratio = config.data.image_size, config.vae.downsample_ratio
    if size % ratio:
        raise LightningDiTError(
            f"{config.source}: data.image_size {size} is no multiple of vae.downsample_ratio {ratio}",
            "edit either value",
        )


def _with_absolute_paths(config: Config) -> Config:
    source, changed = Path(config.source), dict[str, dict[str, str]]()
    for key in PATHS:
        section, _, name = key.rpartition(".")
        if value := attrgetter(key)(config):
            changed.setdefault(section, {})[name] = absolute_path(value, source)
    if config.vae.model_name.endswith((".yaml", ".yml")):
        changed.setdefault("vae", {})["model_name"] = absolute_path(config.vae.model_name, source)
    own = changed.pop("", {})
    if tokenizer := changed.get("vae", {}).get("ckpt_path"):
        changed["vae"]["ckpt_path"] = str(diffusers_vae.weights_file(tokenizer))
    sections = {name: dataclasses.replace(getattr(config, name), **values) for name, values in changed.items()}
    return dataclasses.replace(config, **own, **sections)


def absolute_path(value: str, source: Path) -> str:
    return str(real_path(real_path(source).parent / Path(value).expanduser()))


def real_path(path: Path) -> Path:
    """Return a path without links, but for a link to a file without an ending: the cache of the hub keeps files under
    their hashes, and links with their names in the folder of a commit."""
    real = path.resolve()
    return real if real.suffix or not path.suffix else path.parent.resolve() / path.name


def as_mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise LightningDiTError(f"{where} is {value!r}; a mapping of keys to values is expected", "edit that section")
    return value


def refuse_unknown(values: dict[str, Any], known: typing.Iterable[str], where: str) -> None:
    names = list(known)
    for key in values:
        if key not in names:
            nearest = difflib.get_close_matches(str(key), names, 1, 0.5)
            hint = f"did you mean {nearest[0]!r}?" if nearest else f"known keys: {', '.join(names)}"
            raise LightningDiTError(f"{where}: unknown key {key!r}; {hint}", "rename or remove the key")


def coerce(value: Any, hint: Any, where: str) -> Any:
    """Return `value` as the type `hint`: a scalar, a path, a dataclass, a tuple of one of these, or a union."""
    options = typing.get_args(hint) if _is_union(hint) else (hint,)
    if type(None) in options and (value is None or value in ("none", "None")):
        return None
    for option in options:
        if option is type(None):
            continue
        if typing.get_origin(option) is tuple and isinstance(value, list | tuple):
            inner = typing.get_args(option)[0]
            return tuple(coerce(item, inner, where) for item in value)
        if option is bool and isinstance(value, bool):
            return value
        if option is int and isinstance(value, numbers.Integral) and not isinstance(value, bool):
            return int(value)
        if option is float and isinstance(value, numbers.Real) and not isinstance(value, bool):
            with contextlib.suppress(OverflowError):  # of whole numbers beyond 1e308
                return float(value)
        if option in (str, Path) and isinstance(value, str):
            return option(value)
        if dataclasses.is_dataclass(option):
            return typed(option, as_mapping(value, where), where)
    names = " or ".join("nothing" if o is type(None) else getattr(o, "__name__", str(o)) for o in options)
    is_unquoted = str in options and isinstance(value, bool | int | float)
    fix = "put it in quotes: without them YAML reads a number, or Yes and No as true and false"
    raise LightningDiTError(f"{where} is {value!r}; {names} is expected", fix if is_unquoted else "edit that value")


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


ABSENT = "default"  # what a message says for a setting that one side lacks: defaults are not written


def setting_differences(
    there: Mapping[str, Any],
    now: Mapping[str, Any],
    ignored: Collection[str] = (),
    sides: tuple[str, str] = ("there", "now"),
) -> list[str]:
    """Return a text such as `sample.cfg_scale: 2.0 there, 3.0 now` for each setting in which two sets differ.

    Args:
        there, now: settings by name, or by section and name.
        ignored: dotted names of settings that may differ.
        sides: what the texts call the two sets.
    """
    old, new = _flat(there), _flat(now)
    names = [name for name in {**new, **old} if name not in ignored]
    pairs = {name: (old.get(name, ABSENT), new.get(name, ABSENT)) for name in names}
    return [_difference(name, *pair, *sides) for name, pair in pairs.items() if pair[0] != pair[1]]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings as one level, the keys joined by dots."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _difference(key: str, old: Any, new: Any, there: str, now: str) -> str:
    if isinstance(old, list) and isinstance(new, list):
        if len(old) != len(new):
            return f"{key}: {len(old)} {there}, {len(new)} {now}"
        index = next(index for index, pair in enumerate(zip(old, new, strict=True)) if pair[0] != pair[1])
        key, old, new = f"{key}[{index}]", old[index], new[index]
    return f"{key}: {_short(old)} {there}, {_short(new)} {now}"


def _short(value: Any) -> str:
    if isinstance(value, str):  # a path differs at its end
        return value
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."

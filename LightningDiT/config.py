"""Typed settings: every default once, the only reader of YAML, and an error for every unknown key.

The key names are those of the published YAML files, which load unmodified. Paths in a file are relative to
the folder that the file lies in. Nothing here needs torch.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from LightningDiT.errors import LightningDiTError

TOKENIZER_CONFIGS = Path(__file__).parent / "tokenizer" / "configs"
#: What makes a configuration that is not there: of the pipeline, of a training, and of a tokenizer.
STEP3 = "python step3_setup_configs.py"
TRAINING_MEND = f"copy one of those in {Path(__file__).parent / 'configs'}"
TOKENIZER_MEND = f"name a tokenizer YAML, such as those in {TOKENIZER_CONFIGS}"

#: Keys of the published schema that nothing here reads. They are accepted, and a note says so.
UNREAD_KEYS = {
    "data": ("fid_reference_file", "num_workers"),
    "train": ("ckpt",),
    "sample": ("likelihood",),
}


def _positive(value: float) -> bool:
    return value > 0


def _not_negative(value: float) -> bool:
    return value >= 0


def _is_count(value: object) -> bool:
    return isinstance(value, int) and value > 0


def _is_seed(value: int) -> bool:
    return 0 <= value < 2**63


def _share(value: float) -> bool:
    return 0 <= value <= 1


#: What a value must be, where its type allows more: key, test, words for the message.
RULES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("data.image_size", _positive, "a positive number of pixels"),
    ("data.num_classes", _positive, "a positive number"),
    ("data.latent_multiplier", _positive, "a positive factor"),
    ("vae.downsample_ratio", _positive, "a positive number"),
    ("model.in_chans", _positive, "a positive number"),
    ("train.max_steps", _positive, "a positive number"),
    ("train.global_batch_size", _positive, "a positive number"),
    ("train.log_every", _positive, "a positive number"),
    ("train.ckpt_every", _positive, "a positive number"),
    ("train.ema_decay", _share, "a share between 0 and 1"),
    ("train.precision", lambda value: value in ("auto", "fp32", "bf16", "fp16"), "auto, fp32, bf16 or fp16"),
    ("train.micro_batch_size", lambda value: value is None or value > 0, "a positive number"),
    ("train.keep_checkpoints", _positive, "1 or more"),
    ("train.keep_every", _not_negative, "0 (off) or a number of steps"),
    ("train.valid_every", _not_negative, "0 (off) or a number of steps"),
    ("train.valid_samples", _positive, "a positive number"),
    ("train.valid_share", lambda value: 0 <= value < 1, "a share from 0 to below 1"),
    ("train.sample_every", _not_negative, "0 (off) or a number of steps"),
    ("train.sample_count", _positive, "a positive number"),
    ("train.lognorm_until_step", lambda value: value is None or value >= 0, "a number of steps"),
    ("train.warmup_steps", _not_negative, "0 (off) or a number of steps"),
    ("train.decay_steps", _not_negative, "0 (off) or a number of steps"),
    ("train.max_skips", _positive, "1 or more"),
    ("train.spike_factor", lambda value: value == 0 or value > 1, "0 (off) or a factor above 1"),
    ("train.rate_cut", lambda value: 0 < value <= 1, "a factor above 0 and up to 1"),
    ("train.global_seed", _is_seed, "a whole number from 0 to below 2^63"),
    ("optimizer.beta2", lambda value: 0 <= value < 1, "a decay from 0 to below 1"),
    ("optimizer.lr", lambda value: 0 < value < 1, "a rate between 0 and 1"),
    ("optimizer.max_grad_norm", lambda value: value is None or value > 0, "a positive norm"),
    ("sample.mode", lambda value: value in ("ODE", "SDE"), "ODE or SDE"),
    ("sample.num_sampling_steps", lambda value: value > 1, "2 or more"),
    ("sample.per_proc_batch_size", _positive, "1 or more"),
    ("sample.cfg_scale", lambda value: 0 <= value < 1e4, "a scale of 0 or more"),
    ("sample.cfg_interval_start", _share, "a time between 0 and 1"),
    ("sample.cfg_interval_end", _share, "a time between 0 and 1"),
    ("sample.time_grid", lambda value: value in ("shifted", "graded"), "shifted or graded"),
    ("sample.timestep_shift", lambda value: value >= 0, "0 (off) or a positive shift"),
    ("sample.precision", lambda value: value in ("auto", "fp32", "bf16", "fp16"), "auto, fp32, bf16 or fp16"),
    ("sample.guided_channels", lambda value: value == "all" or _is_count(value), 'a positive number, or "all"'),
)

#: Solver, points and kind of the time grid under one name, whatever the settings say of the latter two. `fast` is the
#: calibrated solver with the most evaluations where sample.solver_file has one that fits, else its row here.
NAMED_SOLVERS = {"fast": ("ab3", 26, "graded"), "published": ("euler", 250, "shifted")}

T = TypeVar("T")


@dataclass(frozen=True)
class DataConfig:
    """Where latents and their statistics lie, and what they describe."""

    data_path: str | None = None  # the folder that holds latents_stats.pt (and the shards, for training)
    image_size: int = 256  # pixels a side
    num_classes: int = 1000  # the null class of guidance is this number
    latent_norm: bool = True  # normalise latents by mean and std per channel
    latent_multiplier: float = 1.0  # factor on latents after the normalisation
    valid_path: str | None = None  # a folder of shards for the validation loss of training
    class_names: tuple[str, ...] | None = None  # one a class; else the latents' manifest has them, or ImageNet for 1000


@dataclass(frozen=True)
class VaeConfig:
    """Which tokenizer decodes."""

    model_name: str = "vavae_f16d32"  # a name in tokenizer/configs, or the path of a tokenizer YAML
    downsample_ratio: int = 16  # image side / latent side
    ckpt_path: str | None = None  # weights; replaces the path in the tokenizer YAML


@dataclass(frozen=True)
class ModelConfig:
    """Which transformer, and its switches."""

    model_type: str = "LightningDiT-XL/1"
    use_qknorm: bool = False
    use_swiglu: bool = True
    use_rope: bool = True
    use_rmsnorm: bool = True
    wo_shift: bool = False  # AdaLN without shift
    in_chans: int = 32  # channels of the latent
    learn_sigma: bool = False
    use_checkpoint: bool = False  # recompute activations in the backward pass


@dataclass(frozen=True)
class TrainConfig:
    """How long and with what batch to train, and where the run is kept."""

    max_steps: int = 80_000
    global_batch_size: int = 1024
    global_seed: int = 0
    output_dir: str = "output"
    exp_name: str = "lightningdit"
    log_every: int = 100
    ckpt_every: int = 20_000
    resume: bool = True  # go on from the newest checkpoint of the run
    weight_init: str | None = None  # weights to start from
    use_checkpoint: bool = False  # another published spelling of model.use_checkpoint
    ema_decay: float = 0.9999
    warmup_steps: int = 0  # linear rise of the learning rate
    decay_steps: int = 0  # cosine fall to zero over the last steps
    precision: str = "auto"  # of matrix products: auto (bf16 where it is native, else fp32) | fp32 | bf16 | fp16
    micro_batch_size: int | None = None  # samples that a process computes at once; less takes less memory
    compile: bool = False  # torch.compile of the transformer
    keep_checkpoints: int = 2  # the newest ones
    keep_every: int = 0  # checkpoints after multiples of so many steps stay besides
    valid_every: int = 0  # steps between two validation losses, of the averaged weights
    valid_samples: int = 1024  # at most so many latents of data.valid_path, or of what is held out
    valid_share: float = 0.0  # held out of the training latents where there is no data.valid_path
    sample_every: int = 0  # steps between two grids of samples, of the averaged weights
    sample_count: int = 16  # images of a grid
    lognorm_until_step: int | None = None  # uniform times from this step on, where transport.use_lognorm is on
    max_skips: int = 10  # so many steps in a row that are not finite: back to the newest checkpoint
    spike_factor: float = 4.0  # the same for a loss so many times the median of the last 100; 0 is off
    rate_cut: float = 0.5  # factor on the learning rate at each return


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, without weight decay."""

    lr: float = 2e-4
    beta2: float = 0.95
    max_grad_norm: float | None = None  # clip the gradient's norm


@dataclass(frozen=True)
class TransportConfig:
    """Path between noise and data, what the model predicts, and the loss."""

    path_type: str = "Linear"  # Linear | GVP | VP
    prediction: str = "velocity"  # velocity | noise | score
    loss_weight: str | None = None  # None | velocity | likelihood
    sample_eps: float | None = None  # distance kept from the ends of the path; None: as the path needs
    train_eps: float | None = None
    use_cosine_loss: bool = False
    use_lognorm: bool = False  # logit-normal training times


@dataclass(frozen=True)
class SampleConfig:
    """Solver, guidance and amount of sampling."""

    mode: str = "ODE"  # ODE | SDE (SiT, arXiv 2401.08740)
    sampling_method: str = "euler"  # euler, ab3, unipc2, dopri5, ... (docs/sampling.md), calibrated, fast or published
    solver_file: str | None = None  # calibrated solvers of these weights, from tools/calibrate_solver
    atol: float = 1e-6  # of the adaptive solvers
    rtol: float = 1e-3
    reverse: bool = False  # from data to noise, for latents that are given
    num_sampling_steps: int = 250  # points of the time grid, so one evaluation fewer for Euler
    cfg_scale: float = 1.0  # 1: no guidance
    guide_ckpt: str | None = None  # autoguidance by these weaker weights of the same shape; none: classifier-free
    per_proc_batch_size: int = 4
    fid_num: int = 50_000  # images of a run for the FID
    cfg_interval_start: float = 0.0  # no guidance before this time
    cfg_interval_end: float = 1.0  # no guidance after this time
    time_grid: str = "shifted"  # shifted: by timestep_shift | graded: short steps where guidance sets in or ends
    timestep_shift: float = 0.0  # 0: off
    guided_channels: int | str = 3  # the first N channels are guided, or "all"
    precision: str = "auto"  # auto | fp32 | bf16 | fp16
    compile: bool = False  # torch.compile of the transformer: minutes at the start, docs/compile.md
    diffusion_form: str = "SBDM"  # of the SDE: constant | SBDM | sigma | linear | decreasing | increasing-decreasing
    diffusion_norm: float = 1.0
    last_step: str | None = "Mean"  # of the SDE: Mean | Tweedie | Euler | none
    last_step_size: float = 0.04


def resolved_solver(sample: SampleConfig) -> SampleConfig:
    """Return the settings with a named solver's method, points and grid spelt out; others as they are."""
    if sample.mode != "ODE" or sample.sampling_method not in NAMED_SOLVERS:
        return sample
    method, points, grid = NAMED_SOLVERS[sample.sampling_method]
    shift = sample.timestep_shift if grid == "shifted" else 0.0
    return dataclasses.replace(
        sample, sampling_method=method, num_sampling_steps=points, time_grid=grid, timestep_shift=shift
    )


def with_points(sample: SampleConfig, points: int) -> SampleConfig:
    """Return the settings with so many points of the time grid; a named solver, which has its own, is spelt out."""
    return dataclasses.replace(resolved_solver(sample), num_sampling_steps=points)


@dataclass(frozen=True)
class Config:
    """One file of the published schema."""

    ckpt_path: str | None = None  # the transformer's weights
    data: DataConfig = field(default_factory=DataConfig)
    vae: VaeConfig = field(default_factory=VaeConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    transport: TransportConfig = field(default_factory=TransportConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    source: str = ""  # the file that was read
    notes: tuple[str, ...] = ()  # what the reader of the file should know


@dataclass(frozen=True)
class TokenizerTrainConfig:
    """How the tokenizer is trained: amount, rates and the terms of the loss, each of which a weight of 0 leaves out."""

    max_steps: int = 20_000
    epochs: int | None = None  # passes over the images, in place of max_steps
    batch_size: int = 32  # of all processes together
    seed: int = 0
    flip: bool = False  # mirror half of the images; wrong where left and right differ in meaning
    weight_init: str | None = None  # weights to start from: a published checkpoint, or those of another training
    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.99
    warmup_steps: int = 200
    decay_steps: int | None = None  # cosine fall to zero over the last steps; all after the warm-up where left out
    max_grad_norm: float | None = 1.0
    precision: str = "auto"  # of matrix products: auto (bf16 where it is native, else fp32) | fp32 | bf16
    ema_decay: float = 0.999
    l1_weight: float = 1.0  # on the mean absolute error per value, images in [-1, 1]
    l2_weight: float = 1.0  # on the mean squared error per value
    kl_weight: float = 1e-6  # on the KL in nats per image
    sum_values: bool = False  # the reconstruction terms are summed over an image's values, as published
    logvar_init: float = 0.0  # logarithm of the scale that the reconstruction terms are divided by
    learn_logvar: bool = False
    lpips_weight: float = 0.0  # on LPIPS
    lpips_weights: str | None = None  # file with VGG-16; torch.hub's cache or a download where left out
    disc_weight: float = 0.0  # on the adversarial term, times the adaptive weight
    disc_start: int = 1  # the first step, counted from 1, in which the discriminator takes part
    disc_layers: int = 3  # that halve the resolution
    vf_weight: float = 0.0  # on the alignment with the vision model
    adaptive_vf: bool = True  # times the ratio of gradient norms at the encoder's last layer
    cos_weight: float = 1.0  # on the cosine term of the alignment
    distmat_weight: float = 1.0  # on its distance-matrix term
    cos_margin: float = 0.0
    distmat_margin: float = 0.0
    vision_model: str | None = None  # dinov2 | mae | a name of timm's; model.params.use_vf where left out
    vision_weights: str | None = None  # file; the hub's where left out
    vision_size: int | None = None  # pixels a side that it sees; so many that its grid is the latents' where left out
    vision_input: str = "own"  # own: normalised as the model was trained | published: in [-1, 1] as they are
    log_every: int = 100
    ckpt_every: int = 500


@dataclass(frozen=True)
class TokenizerConfig:
    """One tokenizer YAML of the published schema.

    `ddconfig` holds the fields of `AutoencoderSettings`, which checks them; `lossconfig` is read for training alone,
    by `tokenizer_training`.
    """

    ckpt_path: str | None
    embed_dim: int
    ddconfig: dict[str, Any]
    train: TokenizerTrainConfig
    source: str = ""
    use_vf: str | None = None  # the vision model by its published name
    reverse_proj: bool = True  # latents are projected to the features' width; false: features to the latents'
    lossconfig: dict[str, Any] = field(default_factory=dict)
    train_keys: tuple[str, ...] = ()  # of `train` that the file sets


#: Keys of the published `lossconfig.params`, ours, and what they are there where the file is silent.
LOSS_KEYS: tuple[tuple[str, str, Any], ...] = (
    ("disc_start", "disc_start", 1),
    ("logvar_init", "logvar_init", 0.0),
    ("kl_weight", "kl_weight", 1.0),
    ("pixelloss_weight", "l1_weight", 1.0),
    ("perceptual_weight", "lpips_weight", 1.0),
    ("disc_num_layers", "disc_layers", 3),
    ("disc_weight", "disc_weight", 1.0),
    ("vf_weight", "vf_weight", 100.0),
    ("adaptive_vf", "adaptive_vf", False),
    ("cos_margin", "cos_margin", 0.0),
    ("distmat_margin", "distmat_margin", 0.0),
    ("cos_weight", "cos_weight", 1.0),
    ("distmat_weight", "distmat_weight", 1.0),
)
#: Published keys that have one value here.
FIXED_LOSS_KEYS: dict[str, Any] = {
    "disc_in_channels": 3,
    "disc_factor": 1.0,
    "use_actnorm": False,
    "disc_conditional": False,
    "disc_loss": "hinge",
    "pp_style": False,
}
PUBLISHED_LOSS = "LPIPSWithDiscriminator"
#: What a value of a tokenizer's training must be, where its type allows more.
TOKENIZER_RULES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    *((name, _positive, "a positive number") for name in ("max_steps", "batch_size", "log_every", "ckpt_every")),
    *(
        (name, lambda value: 0 <= value < math.inf, "0 (off) or a positive weight")
        for name in ("l1_weight", "l2_weight", "kl_weight", "lpips_weight", "disc_weight", "vf_weight")
    ),
    *((name, lambda value: 0 <= value < math.inf, "0 or more") for name in ("cos_weight", "distmat_weight")),
    *((name, _not_negative, "0 or more") for name in ("disc_start", "warmup_steps")),
    *((name, lambda value: 0 <= value < 1, "a decay from 0 to below 1") for name in ("beta1", "beta2")),
    ("seed", _is_seed, "a whole number from 0 to below 2^63"),
    ("lr", lambda value: 0 < value < 1, "a rate between 0 and 1"),
    ("ema_decay", _share, "a share between 0 and 1"),
    ("max_grad_norm", lambda value: value is None or value > 0, "a positive norm, or none"),
    ("decay_steps", lambda value: value is None or value >= 0, "0 (off) or a number of steps"),
    ("logvar_init", lambda value: -30 <= value <= 30, "a logarithm from -30 to 30"),
    *((name, lambda value: 0 <= value <= 2, "a margin from 0 to 2") for name in ("cos_margin", "distmat_margin")),
    ("epochs", lambda value: value is None or value > 0, "a positive number"),
    ("precision", lambda value: value in ("auto", "fp32", "bf16"), "auto, fp32 or bf16"),
    ("disc_layers", lambda value: 1 <= value <= 5, "1 to 5 layers"),
    ("vision_size", lambda value: value is None or value > 0, "a positive number of pixels"),
    ("vision_input", lambda value: value in ("own", "published"), "own or published"),
)


def tokenizer_training(config: TokenizerConfig) -> TokenizerTrainConfig:
    """Return how a tokenizer is to be trained: its `train` section, with what `lossconfig` and `use_vf` say.

    Raises:
        LightningDiTError: a value cannot be, is set in both places, or asks for what is not here.
    """
    values: dict[str, Any] = {"vision_model": config.train.vision_model or config.use_vf}
    if config.lossconfig:
        values |= _published_loss(config)
    train = dataclasses.replace(config.train, **values)
    for name, good, expected in TOKENIZER_RULES:
        value = getattr(train, name)
        if not good(value):
            raise LightningDiTError(
                f"{config.source}: train.{name} is {value!r}; {expected} is expected", "edit that value"
            )
    if train.vf_weight and not train.vision_model:
        raise LightningDiTError(
            f"{config.source}: train.vf_weight is {train.vf_weight:g} and no vision model is named",
            "set train.vision_model: dinov2 or train.vf_weight: 0",
        )
    return train


def _published_loss(config: TokenizerConfig) -> dict[str, Any]:
    """Return the fields of `TokenizerTrainConfig` that the published `lossconfig` sets."""
    where = f"{config.source}: model.params.lossconfig"
    _refuse_unknown(config.lossconfig, ("target", "params"), where)
    target = str(config.lossconfig.get("target", PUBLISHED_LOSS))
    if not target.endswith(PUBLISHED_LOSS):
        raise LightningDiTError(
            f"{where}.target is {target!r}; {PUBLISHED_LOSS} is the one that is read",
            "remove lossconfig, and set the weights in the train section",
        )
    params = _mapping(config.lossconfig.get("params") or {}, f"{where}.params")
    _refuse_unknown(params, [*(key for key, _, _ in LOSS_KEYS), *FIXED_LOSS_KEYS], f"{where}.params")
    for key, only in FIXED_LOSS_KEYS.items():
        if params.get(key, only) != only:
            raise LightningDiTError(f"{where}.params.{key} is {params[key]!r}; {only!r} is expected", "edit that value")
    hints = typing.get_type_hints(TokenizerTrainConfig)
    values = {
        ours: _coerce(params.get(key, default), hints[ours], f"{where}.params.{key}")
        for key, ours, default in LOSS_KEYS
    }
    if not (config.train.vision_model or config.use_vf):
        values["vf_weight"] = 0.0  # there the alignment is what use_vf switches on
    values |= {"l2_weight": 0.0, "sum_values": True}
    if twice := sorted(values.keys() & set(config.train_keys)):
        raise LightningDiTError(
            f"{config.source}: train.{twice[0]} is set, and model.params.lossconfig decides it", "remove one of them"
        )
    return values


def load_config(path: str | Path, mend: str = STEP3) -> Config:
    """Return the settings in the YAML file at `path`, its relative paths made absolute.

    Args:
        mend: what makes such a file where it is missing, for the message.

    Raises:
        LightningDiTError: the file is missing or no YAML, a key is unknown, a value has the wrong type or
            cannot be.
    """
    values = read_yaml(path, mend)
    notes = _drop_unread_keys(values)
    config = typed(Config, values, str(path), hidden=("source", "notes"))
    config = dataclasses.replace(config, source=str(Path(path).resolve()), notes=tuple(notes))
    _check_values(config)
    return _with_absolute_paths(config)


def load_tokenizer_config(path: str | Path) -> TokenizerConfig:
    """Return the settings in the tokenizer YAML at `path` (`ckpt_path`, `model.params`, own `train`).

    Raises:
        LightningDiTError: as `load_config`.
    """
    values = read_yaml(path, TOKENIZER_MEND)
    where = str(path)
    _refuse_unknown(values, ("ckpt_path", "model", "train"), where)
    params = _mapping(_mapping(values.get("model"), f"{where}: model").get("params"), f"{where}: model.params")
    published = ("embed_dim", "use_vf", "reverse_proj", "lossconfig", "ddconfig", "monitor", "ckpt_path")
    _refuse_unknown(params, published, f"{where}: model.params")
    ddconfig = _mapping(params.get("ddconfig"), f"{where}: model.params.ddconfig")
    section = _mapping(values.get("train") or {}, f"{where}: train")
    train = typed(TokenizerTrainConfig, section, f"{where}: train")
    files = {name: getattr(train, name) for name in ("weight_init", "lpips_weights", "vision_weights")}
    train = dataclasses.replace(train, **{name: _absolute(value, Path(path)) for name, value in files.items() if value})
    ckpt_path = values.get("ckpt_path")
    return TokenizerConfig(
        ckpt_path=_absolute(ckpt_path, Path(path)) if ckpt_path else None,
        embed_dim=_coerce(params.get("embed_dim", 32), int, f"{where}: model.params.embed_dim"),
        ddconfig=ddconfig,
        train=train,
        source=str(Path(path).resolve()),
        use_vf=_coerce(params.get("use_vf"), str | None, f"{where}: model.params.use_vf"),
        reverse_proj=_coerce(params.get("reverse_proj", True), bool, f"{where}: model.params.reverse_proj"),
        lossconfig=_mapping(params.get("lossconfig") or {}, f"{where}: model.params.lossconfig"),
        train_keys=tuple(section),
    )


def tokenizer_config_path(config: Config) -> Path:
    """Return the tokenizer YAML that `config.vae.model_name` names.

    Raises:
        LightningDiTError: neither a shipped name nor an existing file.
    """
    name = config.vae.model_name
    shipped = TOKENIZER_CONFIGS / f"{name}.yaml"
    if shipped.is_file():
        return shipped
    if name.endswith((".yaml", ".yml")) and Path(name).is_file():
        return Path(name)
    known = sorted(path.stem for path in TOKENIZER_CONFIGS.glob("*.yaml") if "_stage" not in path.stem)
    raise LightningDiTError(
        f"vae.model_name {name!r} is neither one of {', '.join(known)} nor an existing .yaml file",
        f"edit vae.model_name in {config.source or 'the configuration'}",
    )


def read_yaml(path: str | Path, mend: str = STEP3) -> dict[str, Any]:
    """Return the mapping in a YAML file, interpolations resolved.

    Args:
        mend: what makes such a file where it is missing, for the message.

    Raises:
        LightningDiTError: it is missing, a folder, no YAML, or holds no mapping.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    file = Path(path)
    if not file.exists():
        raise LightningDiTError(f"configuration {path} does not exist", mend)
    if file.is_dir():
        raise LightningDiTError(f"configuration {path} is a folder, a YAML file was expected", "name the file")
    try:
        loaded = OmegaConf.to_container(OmegaConf.load(file), resolve=True)
    except (YAMLError, UnicodeDecodeError, OmegaConfBaseException, OSError) as error:
        reason = " ".join(str(error).split())
        raise LightningDiTError(
            f"configuration {path} is no valid YAML ({reason[:200]})",
            f"correct it, or {mend}",
        ) from error
    return _mapping(loaded, str(path))


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
    _refuse_unknown(values, known, where)
    for item in dataclasses.fields(cls):
        if item.name not in values and item.default is item.default_factory is dataclasses.MISSING:
            raise LightningDiTError(f"{where}: {item.name} is missing", "set it")
    filled: dict[str, Any] = {}
    for name, value in values.items():
        hint = hints[name]
        if dataclasses.is_dataclass(hint):
            section = f"{where}: {name}"
            filled[name] = typed(hint, _mapping(value if value is not None else {}, section), section)
        else:
            filled[name] = _coerce(value, hint, f"{where}: {name}")
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


def _check_values(config: Config) -> None:
    """Refuse values that no run could use, naming the key."""
    for key, good, expected in RULES:
        value = _value_of(config, key)
        if not good(value):
            raise LightningDiTError(f"{config.source}: {key} is {value!r}; {expected} is expected", "edit that value")
    start, end = config.sample.cfg_interval_start, config.sample.cfg_interval_end
    if start > end:
        raise LightningDiTError(
            f"{config.source}: sample.cfg_interval_start is {start}, after cfg_interval_end {end}", "edit either value"
        )
    names, classes = config.data.class_names, config.data.num_classes
    if names is not None and len(names) != classes:
        raise LightningDiTError(
            f"{config.source}: data.class_names has {len(names)} names for {classes} classes", "name every class once"
        )
    size, ratio = config.data.image_size, config.vae.downsample_ratio
    if size % ratio:
        raise LightningDiTError(
            f"{config.source}: data.image_size {size} is no multiple of vae.downsample_ratio {ratio}",
            "edit either value",
        )


def _value_of(config: Config, key: str) -> Any:
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name)


def _with_absolute_paths(config: Config) -> Config:
    source = Path(config.source)

    def absolute(value: str | None) -> str | None:
        return _absolute(value, source) if value else value

    model_name = config.vae.model_name
    if model_name.endswith((".yaml", ".yml")):
        model_name = _absolute(model_name, source)
    data = dataclasses.replace(
        config.data,
        data_path=absolute(config.data.data_path),
        valid_path=absolute(config.data.valid_path),
    )
    vae = dataclasses.replace(config.vae, ckpt_path=absolute(config.vae.ckpt_path), model_name=model_name)
    train = dataclasses.replace(
        config.train,
        output_dir=_absolute(config.train.output_dir, source),
        weight_init=absolute(config.train.weight_init),
    )
    sample = dataclasses.replace(
        config.sample,
        solver_file=absolute(config.sample.solver_file),
        guide_ckpt=absolute(config.sample.guide_ckpt),
    )
    return dataclasses.replace(
        config, ckpt_path=absolute(config.ckpt_path), data=data, vae=vae, train=train, sample=sample
    )


def _absolute(value: str, source: Path) -> str:
    return str((source.resolve().parent / Path(value).expanduser()).resolve())


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise LightningDiTError(f"{where} is {value!r}; a mapping of keys to values is expected", "edit that section")
    return value


def _refuse_unknown(values: dict[str, Any], known: typing.Iterable[str], where: str) -> None:
    names = list(known)
    for key in values:
        if key not in names:
            nearest = difflib.get_close_matches(str(key), names, 1, 0.5)
            hint = f"did you mean {nearest[0]!r}?" if nearest else f"known keys: {', '.join(names)}"
            raise LightningDiTError(f"{where}: unknown key {key!r}; {hint}", "rename or remove the key")


def _coerce(value: Any, hint: Any, where: str) -> Any:
    """Return `value` as the type `hint`, which is a scalar, a tuple of scalars, or a union of these."""
    options = typing.get_args(hint) if _is_union(hint) else (hint,)
    if type(None) in options and (value is None or value == "none"):
        return None
    for option in options:
        if option is type(None):
            continue
        if typing.get_origin(option) is tuple and isinstance(value, list | tuple):
            inner = typing.get_args(option)[0]
            return tuple(_coerce(item, inner, where) for item in value)
        if option is bool and isinstance(value, bool):
            return value
        if option is int and isinstance(value, int) and not isinstance(value, bool):
            return value
        if option is float and isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        if option is str and isinstance(value, str):
            return value
    names = " or ".join("nothing" if o is type(None) else getattr(o, "__name__", str(o)) for o in options)
    raise LightningDiTError(f"{where} is {value!r}; {names} is expected", "edit that value")


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)

"""Typed settings: every default once, the only reader of YAML, and an error for every unknown key.

The key names are those of the published YAML files, which load unmodified. Paths in a file are relative to
the folder that the file lies in. Nothing here needs torch.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from LightningDiT.errors import LightningDiTError

TOKENIZER_CONFIGS = Path(__file__).parent / "tokenizer" / "configs"

#: Keys of the published schema that nothing here reads. They are accepted, and a note says so.
UNREAD_KEYS = {
    "data": ("fid_reference_file", "valid_path", "num_workers"),
    "train": ("ckpt",),
    "sample": ("likelihood",),
}


def _positive(value: float) -> bool:
    return value > 0


def _is_count(value: object) -> bool:
    return isinstance(value, int) and value > 0


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
    ("train.global_seed", lambda value: value >= 0, "0 or more"),
    ("optimizer.beta2", lambda value: 0 <= value < 1, "a decay from 0 to below 1"),
    ("optimizer.lr", lambda value: 0 < value < 1, "a rate between 0 and 1"),
    ("sample.mode", lambda value: value in ("ODE", "SDE"), "ODE or SDE"),
    ("sample.num_sampling_steps", lambda value: value > 1, "2 or more"),
    ("sample.per_proc_batch_size", _positive, "1 or more"),
    ("sample.cfg_scale", lambda value: 0 <= value < 1e4, "a scale of 0 or more"),
    ("sample.cfg_interval_start", _share, "a time between 0 and 1"),
    ("sample.cfg_interval_end", _share, "a time between 0 and 1"),
    ("sample.timestep_shift", lambda value: value >= 0, "0 (off) or a positive shift"),
    ("sample.precision", lambda value: value in ("auto", "fp32", "bf16", "fp16"), "auto, fp32, bf16 or fp16"),
    ("sample.guided_channels", lambda value: value == "all" or _is_count(value), 'a positive number, or "all"'),
)

#: Names for solver and points of the time grid together, whatever num_sampling_steps says. `fast` is the calibrated
#: solver with the most evaluations where sample.solver_file has one that fits, else this row on a graded grid.
NAMED_SOLVERS = {"fast": ("ab3", 26), "published": ("euler", 250)}

T = TypeVar("T")


@dataclass(frozen=True)
class DataConfig:
    """Where latents and their statistics lie, and what they describe."""

    data_path: str | None = None  # the folder that holds latents_stats.pt (and the shards, for training)
    image_size: int = 256  # pixels a side
    num_classes: int = 1000  # the null class of guidance is this number
    latent_norm: bool = True  # normalise latents by mean and std per channel
    latent_multiplier: float = 1.0  # factor on latents after the normalisation
    class_names: tuple[str, ...] | None = None  # one a class; ImageNet's names where there are 1000 classes


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
    per_proc_batch_size: int = 4
    fid_num: int = 50_000  # images of a run for the FID
    cfg_interval_start: float = 0.0  # no guidance before this time
    cfg_interval_end: float = 1.0  # no guidance after this time
    timestep_shift: float = 0.0  # 0: off
    guided_channels: int | str = 3  # the first N channels are guided, or "all"
    precision: str = "auto"  # auto | fp32 | bf16 | fp16
    diffusion_form: str = "SBDM"  # of the SDE: constant | SBDM | sigma | linear | decreasing | increasing-decreasing
    diffusion_norm: float = 1.0
    last_step: str | None = "Mean"  # of the SDE: Mean | Tweedie | Euler | none
    last_step_size: float = 0.04


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
    """How the tokenizer is trained: amount, rates and the weights of the loss terms."""

    max_steps: int = 20_000
    batch_size: int = 32
    seed: int = 0
    lr: float = 1e-3
    warmup_steps: int = 200
    max_grad_norm: float = 1.0
    ema_decay: float = 0.999
    l1_weight: float = 1.0  # on the mean absolute error per value, images in [-1, 1]
    l2_weight: float = 1.0  # on the mean squared error per value
    kl_weight: float = 1e-6  # on the KL in nats per image
    log_every: int = 100
    ckpt_every: int = 500


@dataclass(frozen=True)
class TokenizerConfig:
    """One tokenizer YAML of the published schema.

    `ddconfig` holds the fields of `AutoencoderSettings`, which checks them.
    """

    ckpt_path: str | None
    embed_dim: int
    ddconfig: dict[str, Any]
    train: TokenizerTrainConfig
    source: str = ""


def load_config(path: str | Path) -> Config:
    """Return the settings in the YAML file at `path`, its relative paths made absolute.

    Raises:
        LightningDiTError: the file is missing or no YAML, a key is unknown, a value has the wrong type or
            cannot be.
    """
    values = read_yaml(path)
    notes = _drop_unread_keys(values)
    config = typed(Config, values, str(path), hidden=("source", "notes"))
    config = dataclasses.replace(config, source=str(Path(path).resolve()), notes=tuple(notes))
    _check_values(config)
    return _with_absolute_paths(config)


def load_tokenizer_config(path: str | Path) -> TokenizerConfig:
    """Return the settings in the tokenizer YAML at `path` (`ckpt_path`, `model.params`, own `train`)."""
    values = read_yaml(path)
    where = str(path)
    _refuse_unknown(values, ("ckpt_path", "model", "train"), where)
    params = _mapping(_mapping(values.get("model"), f"{where}: model").get("params"), f"{where}: model.params")
    published = ("embed_dim", "use_vf", "reverse_proj", "lossconfig", "ddconfig", "monitor", "ckpt_path")
    _refuse_unknown(params, published, f"{where}: model.params")
    ddconfig = _mapping(params.get("ddconfig"), f"{where}: model.params.ddconfig")
    train = _mapping(values.get("train") or {}, f"{where}: train")
    ckpt_path = values.get("ckpt_path")
    return TokenizerConfig(
        ckpt_path=_absolute(ckpt_path, Path(path)) if ckpt_path else None,
        embed_dim=_coerce(params.get("embed_dim", 32), int, f"{where}: model.params.embed_dim"),
        ddconfig=ddconfig,
        train=typed(TokenizerTrainConfig, train, f"{where}: train"),
        source=str(Path(path).resolve()),
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
    known = sorted(path.stem for path in TOKENIZER_CONFIGS.glob("*.yaml"))
    raise LightningDiTError(
        f"vae.model_name {name!r} is neither one of {', '.join(known)} nor an existing .yaml file",
        f"edit vae.model_name in {config.source or 'the configuration'}",
    )


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Return the mapping in a YAML file, interpolations resolved."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    file = Path(path)
    if not file.exists():
        raise LightningDiTError(f"configuration {path} does not exist", "python step3_setup_configs.py")
    if file.is_dir():
        raise LightningDiTError(f"configuration {path} is a folder, a YAML file was expected", "name the file")
    try:
        loaded = OmegaConf.to_container(OmegaConf.load(file), resolve=True)
    except (YAMLError, UnicodeDecodeError, OmegaConfBaseException, OSError) as error:
        reason = " ".join(str(error).split())
        raise LightningDiTError(
            f"configuration {path} is no valid YAML ({reason[:200]})",
            "correct it, or python step3_setup_configs.py",
        ) from error
    return _mapping(loaded, str(path))


def typed(cls: type[T], values: dict[str, Any], where: str, hidden: tuple[str, ...] = ()) -> T:
    """Return the dataclass `cls` filled from `values`, each coerced to its field's type.

    Args:
        where: file and section, for the messages.
        hidden: fields that a file may not set.

    Raises:
        LightningDiTError: an unknown key (the nearest known one is named) or a value of another type.
    """
    hints = typing.get_type_hints(cls)
    known = [name for name in hints if name not in hidden]
    _refuse_unknown(values, known, where)
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
    )
    vae = dataclasses.replace(config.vae, ckpt_path=absolute(config.vae.ckpt_path), model_name=model_name)
    train = dataclasses.replace(
        config.train,
        output_dir=_absolute(config.train.output_dir, source),
        weight_init=absolute(config.train.weight_init),
    )
    sample = dataclasses.replace(config.sample, solver_file=absolute(config.sample.solver_file))
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

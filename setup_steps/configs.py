"""The YAML that step 3 writes: the published schema with a comment per key, precision and batch size as they fit."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from LightningDiT.console import format_bytes
from LightningDiT.errors import LightningDiTError
from LightningDiT.files import atomic_path, free_name, read_text, require_replaceable, write_text
from setup_steps import project, weights
from setup_steps.machine import TorchFacts, memory_bytes
from setup_steps.project import STEP3, absolute

if TYPE_CHECKING:
    from LightningDiT.sampling.memory_model import Need

YAML_ENDINGS = (".yaml", ".yml")
STEPS = 50
# largest batch size on a CPU: enough rows to keep it busy, and the first images come soon
LARGEST_BATCH = {"published": 16, "bundled": 64}
CPU_SHARE = 0.5  # the rest is for the system, the notebook and the browser

Config = dict[str, Any]

#: The running command, or step 3, with other options.
again = partial(project.again, STEP3)

#: Keys of the YAML for the published weights, with the library's defaults; `fit_to_machine` adds two.
PUBLISHED_KEYS = {
    "data": ("data_path", "image_size", "num_classes", "latent_norm", "latent_multiplier"),
    "vae": ("model_name", "downsample_ratio", "ckpt_path"),
    "model": ("model_type", "use_qknorm", "use_swiglu", "use_rope", "use_rmsnorm", "wo_shift", "in_chans"),
    "transport": ("path_type", "prediction"),
    "sample": ("mode", "sampling_method", "num_sampling_steps", "cfg_scale", "cfg_interval_start", "timestep_shift"),
}
#: What differs: the published demo has strong guidance, at all times and without a shift.
DEMO = {"sampling_method": "fast", "num_sampling_steps": STEPS, "cfg_scale": 9.0}
SECTIONS = ("ckpt_path", *PUBLISHED_KEYS)
TRAINING_KEYS = ("valid_path", "fid_reference_file", "num_workers")  # of `data`, not for sampling

COMMENTS = {
    "ckpt_path": "the transformer's weights",
    "data.data_path": "the folder (not the file) that holds latents_stats.pt",
    "data.image_size": "pixels a side",
    "data.num_classes": "labels are 0 to this number minus 1; the number itself is the null class",
    "data.latent_norm": "latents are normalised by latents_stats.pt",
    "data.latent_multiplier": "factor on normalised latents",
    "data.valid_path": "latents for the validation loss of training",
    "data.class_names": "names of the labels",
    "data.num_conditions": "values of a second label, the condition of an image; 0: there is none",
    "data.condition_names": "names of the conditions",
    "data.split_file": "for training: split.json of step 5; latents of its test windows are refused",
    "data.fold": "for training: fold of that split",
    "data.levels_path": "for training: windows that step 5 wrote, to judge samples by",
    "vae.model_name": "a name in LightningDiT/tokenizer/configs or the path of a tokenizer YAML",
    "vae.downsample_ratio": "image side / latent side",
    "vae.ckpt_path": "the tokenizer's weights",
    "model.model_type": "preset: size / patch side",
    "model.use_qknorm": "queries and keys are normalised",
    "model.use_swiglu": "SwiGLU instead of a GELU MLP",
    "model.use_rope": "rotary positions of queries and keys (2-D RoPE)",
    "model.use_rmsnorm": "RMSNorm instead of LayerNorm",
    "model.wo_shift": "modulation scales without a shift",
    "model.in_chans": "channels of a latent",
    "model.learn_sigma": "twice the output channels; the second half is ignored",
    "model.augmentation": "values that tell the network how a latent was augmented; 0: none",
    "model.dropout": "for training: share of activations that are set to zero",
    "model.use_checkpoint": "for training: recompute activations to save memory",
    "transport.path_type": "Linear, GVP or VP",
    "transport.prediction": "velocity, noise or score",
    "transport.loss_weight": "for training: velocity, likelihood or none",
    "transport.sample_eps": "distance from the ends of the path; none: as the path needs",
    "transport.train_eps": "the same in training",
    "transport.use_cosine_loss": "for training: adds the cosine loss over channels",
    "transport.use_lognorm": "for training: times from the logit-normal distribution",
    "sample.mode": "ODE or SDE",
    "sample.sampling_method": "fast, published (Euler, 250 points), ucgm, or a solver: euler, ab3, heun, dopri5, ...",
    "sample.solver_file": "calibrated solvers of these weights; sampling_method fast takes the best one",
    "sample.atol": "absolute tolerance of adaptive solvers",
    "sample.rtol": "relative tolerance of adaptive solvers",
    "sample.reverse": "from image to noise",
    "sample.num_sampling_steps": "points of the time grid; fast, published and ucgm have their own",
    "sample.cfg_scale": "guidance; 1 is off",
    "sample.guide_ckpt": "autoguidance: weaker weights of the same shape; none is classifier-free guidance",
    "sample.cfg_interval_start": "no guidance before this time (0 = noise, 1 = image)",
    "sample.cfg_interval_end": "no guidance after this time",
    "sample.guided_channels": 'the first N channels are guided, or "all"',
    "sample.time_grid": "shifted (by timestep_shift), graded (short steps where guidance sets in) or kumaraswamy",
    "sample.timestep_shift": "0 is off",
    "sample.per_proc_batch_size": "batch size, chosen by this machine's memory",
    "sample.fid_num": "images of a run for the FID",
    "sample.labels": "of images without --classes: random, or balanced, each class equally often",
    "sample.precision": "auto, fp32, tf32, bf16 or fp16, chosen by this machine's memory; auto is fp32 on the CPU",
    "sample.compile": "torch.compile of the networks: auto, on or off, docs/compile.md",
    "sample.deterministic": "the same bits in every batch of the same size: docs/compile.md",
    "sample.diffusion_form": "of the SDE: constant, SBDM, sigma, linear, ...",
    "sample.diffusion_norm": "of the SDE: factor on its diffusion",
    "sample.last_step": "of the SDE: Mean, Tweedie, Euler or none",
    "sample.last_step_size": "of the SDE: size of the last step in time",
}
HEADER = (
    "# Written by step3_setup_configs.py. Edit it freely: when step 3 runs again, an edited file\n"
    "# is kept as .bak and what changed is said. Labels, seed and more are options of step 4.\n"
)
HASH_LINE = "# sha256 of what follows: "


def fit_to_machine(config: Config, kind: str, torch: TorchFacts) -> str:
    """Set precision and batch size by the available memory (`LightningDiT.sampling.memory_model`), and return one line
    that says why. The policy is in docs/memory.md.

    Args:
        config: result of `published_config` or `bundled_config`; its weights file must exist.
        kind: "published" or "bundled".
    """
    from LightningDiT.sampling.memory_model import GPU_SHARE, HALF, LARGEST_GPU_BATCH

    on_gpu = torch.device_memory > 0
    memory = torch.device_memory or memory_bytes()
    share, whose = (GPU_SHARE, "the GPU's memory") if on_gpu else (CPU_SHARE, "the machine's memory")
    usable = None if memory is None else share * memory
    if on_gpu:
        precision, words, need = "auto", _gpu_words(torch), _need(config, True, HALF)
    else:
        precision, words, need = _cpu_precision(config, usable)
    at_most = LARGEST_GPU_BATCH if on_gpu else LARGEST_BATCH[kind]
    batch = 1 if usable is None else need.largest_batch(usable, at_most)
    config["sample"] |= {"per_proc_batch_size": batch, "precision": precision}
    words, amount = f"precision {precision}: {words}; ", format_bytes(need.peak(batch))
    if usable is None:
        return f"{words}batch size 1 needs {amount}, the memory is unknown"
    there = f"{format_bytes(usable)} usable ({share:.0%} of {whose})"
    if need.peak(batch) <= usable:
        return f"{words}batch size {batch} takes at most {amount} of the {there}"
    return f"{words}WARNING: even batch size {batch} may take {amount}, more than the {there}"


def _need(config: Config, on_gpu: bool, value_bytes: int) -> Need:
    from LightningDiT.config import Config as Settings
    from LightningDiT.config import typed
    from LightningDiT.sampling.memory_model import sampling_need

    settings = typed(Settings, config, "the configuration of step 3", hidden=("source", "notes"))
    return sampling_need(settings, on_gpu, value_bytes)


def _cpu_precision(config: Config, usable: float | None) -> tuple[str, str, Need]:
    """Return the precision on the CPU, why, and its need: float32, unless bf16 alone fits `usable` bytes (None:
    unknown). Never fp16: torch 2.2 has no LayerNorm of it on CPUs.
    """
    from LightningDiT.sampling.memory_model import FLOAT32, HALF

    full, half = (_need(config, False, size) for size in (FLOAT32, HALF))
    if usable is None or full.peak(1) <= usable:
        return "auto", "fp32 on the CPU", full
    if half.peak(1) > usable:
        return "auto", "fp32 on the CPU, since bf16 does not fit either", full
    return "bf16", f"on the CPU one image in fp32 takes {format_bytes(full.peak(1))}, which does not fit", half


def _gpu_words(torch: TorchFacts) -> str:
    """Return what `auto` of LightningDiT/device.py means on the first GPU, and why."""
    if not torch.gpus:
        return "bf16 if the GPU computes it natively, else fp16"
    gpu = torch.gpus[0]
    return f"bf16, which {gpu.title} computes" if gpu.native_bf16 else f"fp16, since {gpu.title} only emulates bf16"


def published_config(files: dict[str, Path]) -> Config:
    """Return the settings of the published demo with these files (by role)."""
    from LightningDiT.config import Config as Settings

    defaults = asdict(Settings())
    config: Config = {"ckpt_path": str(files["dit"])}
    config |= {section: {key: defaults[section][key] for key in keys} for section, keys in PUBLISHED_KEYS.items()}
    config["sample"] |= DEMO
    config["data"]["data_path"] = str(files["stats"].parent)
    config["vae"]["ckpt_path"] = str(files["vavae"])
    return config


def apply_preset(config: Config, name: str) -> str:
    """Put solver and guidance of a preset into the settings and return a line that says what it is."""
    from LightningDiT.config import PRESET_WORDS, SampleConfig, preset_values

    for key, value in preset_values(name).items():
        if value is None:  # guide_ckpt: guided by no second network
            config["sample"].pop(key, None)
        elif key in config["sample"] or value != getattr(SampleConfig(), key):
            config["sample"][key] = value
    return f"preset {name}: {PRESET_WORDS[name]}"


def bundled_config() -> Config:
    """Return the bundled model's own settings, its paths absolute."""
    from LightningDiT.config import read_yaml

    weights.require_bundled()
    own = read_yaml(weights.BUNDLED / "config.yaml")
    config = {key: own[key] for key in SECTIONS if key in own}
    for section in ("data", "vae", "sample"):
        config[section] = dict(config.get(section) or {})
    for key in TRAINING_KEYS:
        config["data"].pop(key, None)
    config["ckpt_path"] = str(weights.BUNDLED / "transformer.safetensors")
    config["data"]["data_path"] = str(weights.BUNDLED)
    config["vae"]["model_name"] = str(weights.BUNDLED / "tokenizer.yaml")
    config["vae"]["ckpt_path"] = str(weights.BUNDLED / "tokenizer.safetensors")
    config["sample"].setdefault("num_sampling_steps", STEPS)
    if solvers := config["sample"].get("solver_file"):
        config["sample"]["solver_file"] = str(weights.BUNDLED / solvers)
    return config


def render(config: Config) -> str:
    """Return the YAML with a comment per key, under a header that carries the hash of the rest."""
    lines: list[str] = []
    for key in SECTIONS:
        if isinstance(config.get(key), dict):
            lines += ["", f"{key}:"]
            lines += ["  " + _line(inner, value, f"{key}.{inner}") for inner, value in config[key].items()]
        elif key in config:
            lines.append(_line(key, config[key], key))
    body = "\n".join(lines) + "\n"
    return HEADER + HASH_LINE + _sha256(body) + "\n" + body


def _line(key: str, value: object, path: str) -> str:
    return f"{key}: {_scalar(value)}  # {COMMENTS[path]}"


def _scalar(value: object) -> str:
    """Return a value as YAML 1.1 reads it back: JSON, except that floats need a point before an 'e'."""
    text = json.dumps(value, ensure_ascii=False)
    if isinstance(value, float) and "e" in text and "." not in text:
        return text.replace("e", ".0e")
    return text


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def was_edited(text: str) -> bool:
    """Return whether a file is not, to the letter, what an earlier step 3 wrote."""
    head, mark, rest = text.partition(HASH_LINE)
    said, _, body = rest.partition("\n")
    return head != HEADER or not mark or said != _sha256(body)


def output_file(path: Path) -> Path:
    """Return the path of the YAML to write, made absolute; raise LightningDiTError if nothing can be written there."""
    # the name itself, whatever it may lead to
    target, fix = absolute(path.parent) / path.name, again("--output", "FILE.yaml", without=["--output"])
    if target.is_dir():
        raise LightningDiTError(f"{target} is a folder, a YAML file was expected", fix)
    if target.suffix not in YAML_ENDINGS:
        raise LightningDiTError(f"{target} is named like no YAML file, {' or '.join(YAML_ENDINGS)} was expected", fix)
    for folder in target.parents:
        if folder.is_file():
            raise LightningDiTError(f"{folder} is a file, the folder of {target.name} was expected", fix)
    require_replaceable(target)
    return target


def check(config: Config, target: Path, verify: Callable[[Path], list[str]]) -> list[str]:
    """Return the lines of `verify`, or raise its LightningDiTError, about the YAML that `write` would write."""
    with tempfile.TemporaryDirectory() as folder:
        fresh = Path(folder).resolve() / target.name
        fresh.write_text(render(config), encoding="utf-8")
        try:
            return [line.replace(str(fresh), str(target)) for line in verify(fresh)]
        except LightningDiTError as error:
            raise LightningDiTError(error.message.replace(str(fresh), str(target)), error.fix) from error


def write(config: Config, target: Path, verify: Callable[[Path], list[str]]) -> list[str]:
    """Write the YAML if `verify` accepts it, and return lines that say what was done; an edited file is kept as .bak.

    Raises:
        LightningDiTError: `verify` refused it; the earlier file stays.
    """
    lines, text = check(config, target, verify), render(config)
    old = read_text(target, errors="replace") if target.exists() else None
    if old == text:
        return [*lines, f"{target} was right already"]
    if old is not None and was_edited(old):
        lines += _keep_edited(target, config)
    write_text(target, text)
    return [*lines, f"written: {target}"]


def _keep_edited(target: Path, config: Config) -> list[str]:
    """Copy an edited file to a .bak, and return lines that say so and what changes."""
    from LightningDiT.config import read_yaml, setting_differences

    backup = target.with_name(target.name + ".bak")
    if os.path.lexists(backup):
        backup = free_name(target, "bak")
    with atomic_path(backup) as fresh:
        shutil.copy2(target, fresh)
    try:
        rows = setting_differences(read_yaml(target), config)
    except LightningDiTError as error:
        rows = [error.message]
    said = f"{target.name} had been edited; it is kept as {backup.name}. What changed:"
    return [said, *(f"  {row}" for row in rows)]

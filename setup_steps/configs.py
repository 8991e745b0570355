"""What step 3 writes: kaggle_inference_config.yaml in the published schema, a comment per key."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from setup_steps import console, memory_model, weights
from setup_steps.console import StepError, absolute, format_bytes
from setup_steps.files import free_name
from setup_steps.machine import TorchFacts, memory_bytes

YAML_ENDINGS = (".yaml", ".yml")
STEPS = 50
# Pictures at a time at most: enough rows to keep a device busy, and the first pictures come soon.
LARGEST_BATCH = {"published": 16, "bundled": 64}
# The rest of a GPU's memory is left to work space of its libraries, which no shape tells, and to
# blocks that the allocator cannot join.
GPU_SHARE = 0.85
# The rest of the machine's memory is left to the system, the notebook and the browser.
CPU_SHARE = 0.5

Config = dict[str, Any]

PUBLISHED: Config = {
    "ckpt_path": None,
    "data": {
        "data_path": None,
        "image_size": 256,
        "num_classes": 1000,
        "latent_norm": True,
        "latent_multiplier": 1.0,
    },
    "vae": {"model_name": "vavae_f16d32", "downsample_ratio": 16, "ckpt_path": None},
    "model": {
        "model_type": "LightningDiT-XL/1",
        "use_qknorm": False,
        "use_swiglu": True,
        "use_rope": True,
        "use_rmsnorm": True,
        "wo_shift": False,
        "in_chans": 32,
    },
    "transport": {"path_type": "Linear", "prediction": "velocity"},
    # The published demo: strong guidance all the way, no shift.
    "sample": {
        "mode": "ODE",
        "sampling_method": "fast",
        "num_sampling_steps": STEPS,
        "cfg_scale": 9.0,
        "cfg_interval_start": 0.0,
        "timestep_shift": 0.0,
        "per_proc_batch_size": 1,
        "precision": "auto",
    },
}
SECTIONS = tuple(PUBLISHED)
TRAINING_KEYS = ("valid_path", "fid_reference_file", "num_workers")  # of `data`, not for sampling

COMMENTS = {
    "ckpt_path": "the transformer's weights",
    "data.data_path": "the folder (not the file) that holds latents_stats.pt",
    "data.image_size": "pixels a side",
    "data.num_classes": "labels are 0 to this number less 1; the number itself is the null class",
    "data.latent_norm": "latents are normalised by latents_stats.pt",
    "data.latent_multiplier": "factor on normalised latents",
    "data.valid_path": "latents for the validation loss of training",
    "data.class_names": "what the labels are called",
    "vae.model_name": "a name in LightningDiT/tokenizer/configs or the path of a tokenizer YAML",
    "vae.downsample_ratio": "image side / latent side",
    "vae.ckpt_path": "the tokenizer's weights",
    "model.model_type": "preset: size / patch side",
    "model.use_qknorm": "queries and keys are normalised",
    "model.use_swiglu": "gated MLP (SwiGLU) in place of GELU",
    "model.use_rope": "queries and keys turn with their place (2-D RoPE)",
    "model.use_rmsnorm": "RMSNorm in place of LayerNorm",
    "model.wo_shift": "modulation scales and does not shift",
    "model.in_chans": "channels of a latent",
    "model.learn_sigma": "twice the output channels, the second half is left out",
    "model.use_checkpoint": "for training: recompute activations to save memory",
    "transport.path_type": "Linear, GVP or VP",
    "transport.prediction": "velocity, noise or score",
    "transport.loss_weight": "for training: velocity, likelihood or none",
    "transport.sample_eps": "distance kept from the ends of the path; none: as the path needs",
    "transport.train_eps": "the same in training",
    "transport.use_cosine_loss": "for training: adds the cosine loss over channels",
    "transport.use_lognorm": "for training: times from the logit-normal distribution",
    "sample.mode": "ODE or SDE",
    "sample.sampling_method": "fast, published (Euler, 250 points), or a solver: euler, ab3, heun, dopri5, ...",
    "sample.solver_file": "calibrated solvers of these weights; sampling_method fast takes the best of them",
    "sample.atol": "absolute tolerance of adaptive solvers",
    "sample.rtol": "relative tolerance of adaptive solvers",
    "sample.reverse": "from picture to noise",
    "sample.num_sampling_steps": "points of the time grid; fast and published have their own",
    "sample.cfg_scale": "guidance; 1 is off",
    "sample.guide_ckpt": "autoguidance: weaker weights of the same shape; none is classifier-free guidance",
    "sample.cfg_interval_start": "no guidance before this time (0 = noise, 1 = picture)",
    "sample.cfg_interval_end": "no guidance after this time",
    "sample.guided_channels": 'the first N channels are guided, or "all"',
    "sample.time_grid": "shifted (by timestep_shift) or graded (short steps where guidance sets in)",
    "sample.timestep_shift": "0 is off",
    "sample.per_proc_batch_size": "pictures at a time, chosen by this machine's memory",
    "sample.fid_num": "pictures of a run for the FID",
    "sample.precision": "auto, fp32, bf16 or fp16, chosen by this machine's memory; auto is fp32 on the processor",
    "sample.compile": "torch.compile of the transformer: docs/compile.md",
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
    """Set precision and pictures at a time by the memory that there is (setup_steps/memory_model.py),
    and return one line that says why. The policy is in docs/memory.md.

    Args:
        config: what `published_config` or `bundled_config` gave; its weights file must be there.
        kind: "published" or "bundled".
    """
    on_gpu = torch.device_memory > 0
    memory = torch.device_memory or memory_bytes()
    share, place = (GPU_SHARE, "the GPU's memory") if on_gpu else (CPU_SHARE, "the machine's memory")
    if on_gpu:
        precision, words, need = "auto", _gpu_words(torch), _need(config, True, memory_model.HALF)
    else:
        precision, words, need = _processor_precision(config, memory and share * memory)
    config["sample"] |= {"per_proc_batch_size": 1, "precision": precision}
    words = f"precision {precision}: {words}"
    if memory is None:
        return f"{words}; 1 picture at a time: memory unknown, {format_bytes(need.peak(1))} are needed"
    usable = share * memory
    batch = need.largest_batch(usable, LARGEST_BATCH[kind])
    config["sample"]["per_proc_batch_size"] = batch
    pictures = "1 picture" if batch == 1 else f"{batch} pictures"
    takes = "takes" if batch == 1 else "take"
    amount, there = format_bytes(need.peak(batch)), f"{format_bytes(usable)} usable ({share:.0%} of {place})"
    if need.peak(batch) <= usable:
        return f"{words}; {pictures} at a time {takes} at most {amount}, of {there}"
    return f"{words}; WARNING: even {pictures} may take {amount}, more than the {there}"


def _need(config: Config, on_gpu: bool, value_bytes: int) -> memory_model.Need:
    from LightningDiT.config import Config as Settings
    from LightningDiT.config import typed

    settings = typed(Settings, config, "the configuration of step 3", hidden=("source", "notes"))
    return memory_model.sampling_need(settings, on_gpu, value_bytes)


def _processor_precision(config: Config, usable: float | None) -> tuple[str, str, memory_model.Need]:
    """Precision on the processor, why, and what it takes: float32, unless bf16 alone fits `usable`
    bytes (None: unknown). Never fp16: torch 2.2 has no LayerNorm of it on processors.
    """
    full, half = (_need(config, False, size) for size in (memory_model.FLOAT32, memory_model.HALF))
    if usable is None or full.peak(1) <= usable:
        return "auto", "fp32 on the processor", full
    if half.peak(1) > usable:
        return "auto", "fp32 on the processor, since bf16 does not fit either", full
    return "bf16", f"on the processor fp32 takes {format_bytes(full.peak(1))} for 1 picture, which does not fit", half


def _gpu_words(torch: TorchFacts) -> str:
    """What `auto` of LightningDiT/device.py comes to on the first GPU, and why."""
    if not torch.gpus:
        return "bf16 where the GPU computes it natively, else fp16"
    gpu = torch.gpus[0]
    return f"bf16, which {gpu.title} computes" if gpu.native_bf16 else f"fp16, since {gpu.title} only emulates bf16"


def published_config(files: dict[str, Path]) -> Config:
    """Settings of the published demo with these files (by role)."""
    config = json.loads(json.dumps(PUBLISHED))
    config["ckpt_path"] = str(files["dit"])
    config["data"]["data_path"] = str(files["stats"].parent)
    config["vae"]["ckpt_path"] = str(files["vavae"])
    return config


def bundled_config() -> Config:
    """The bundled model's own settings, its paths absolute."""
    from LightningDiT.config import read_yaml

    missing = weights.missing_bundled()
    if missing:
        raise StepError(
            f"{weights.BUNDLED} lacks {', '.join(missing)}",
            weights.RESTORE_BUNDLED,
        )
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
    """YAML with a comment per key, under a header that carries the hash of the rest."""
    lines: list[str] = []
    for key in SECTIONS:
        if key not in config:
            continue
        if not isinstance(config[key], dict):
            lines.append(_line(key, config[key], key))
            continue
        lines += ["", f"{key}:"]
        lines += ["  " + _line(k, value, f"{key}.{k}") for k, value in config[key].items()]
    body = "\n".join(lines) + "\n"
    return HEADER + HASH_LINE + _sha256(body) + "\n" + body


def _line(key: str, value: object, path: str) -> str:
    return f"{key}: {_scalar(value)}  # {COMMENTS[path]}"


def _scalar(value: object) -> str:
    """A value as YAML 1.1 reads it back: JSON, but for floats, which need a point before an 'e'."""
    text = json.dumps(value, ensure_ascii=False)
    if isinstance(value, float) and "e" in text and "." not in text:
        return text.replace("e", ".0e")
    return text


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def was_edited(text: str) -> bool:
    """True where a file is not, to the letter, what an earlier step 3 wrote."""
    head, mark, rest = text.partition(HASH_LINE)
    said, _, body = rest.partition("\n")
    return head != HEADER or not mark or said != _sha256(body)


def differences(old: Path, new: Config) -> list[str]:
    """One line per key whose value in the file `old` is not that of `new`."""
    from LightningDiT.config import read_yaml
    from LightningDiT.errors import LightningDiTError

    try:
        before = _flat(read_yaml(old))
    except LightningDiTError as error:
        return [error.message]
    after = _flat(new)
    absent = "(not there)"
    return [
        f"{key}: {before.get(key, absent)} -> {after.get(key, absent)}"
        for key in {**before, **after}
        if before.get(key, absent) != after.get(key, absent)
    ]


def _flat(config: Config) -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat.update({f"{key}.{inner}": content for inner, content in value.items()})
        else:
            flat[key] = value
    return flat


def again(*added: str, without: Sequence[str] = ()) -> str:
    """The command that is running, step 3 unless it is another's, with other options."""
    return console.again("step3_setup_configs.py", *added, without=without)


def output_file(path: Path) -> Path:
    """Where the YAML goes, made absolute.

    Raises:
        StepError: a folder carries the name, or a file stands where its folder was expected.
    """
    target, fix = absolute(path), again("--output", "FILE.yaml", without=["--output"])
    if target.is_dir():
        raise StepError(f"{target} is a folder, a YAML file was expected", fix)
    if target.suffix not in YAML_ENDINGS:
        raise StepError(f"{target} is named like no YAML file, {' or '.join(YAML_ENDINGS)} was expected", fix)
    for folder in target.parents:
        if folder.is_file():
            raise StepError(f"{folder} is a file, the folder of {target.name} was expected", fix)
    return target


def check(config: Config, target: Path, verify: Callable[[Path], list[str]]) -> list[str]:
    """Return what `verify` says of the YAML that `write` would put at `target`, by a file in a
    temporary folder that is deleted again.

    Raises:
        StepError: the file was refused.
    """
    with tempfile.TemporaryDirectory() as folder:
        fresh = Path(folder).resolve() / target.name
        fresh.write_text(render(config), encoding="utf-8")
        return _verified(fresh, target, verify)


def write(config: Config, target: Path, verify: Callable[[Path], list[str]]) -> list[str]:
    """Write the YAML if `verify` (which raises where it is not good) takes it, and return lines
    that say what was done. What was there before stays until then; an edited file is kept as .bak.

    Raises:
        StepError: the file was refused.
    """
    text = render(config)
    fresh = target.with_name(f".{target.stem}.new.yaml")
    try:
        fresh.write_text(text, encoding="utf-8")
        lines = _verified(fresh, target, verify)
        if target.exists():
            old = target.read_text(encoding="utf-8", errors="replace")
            if old == text:
                return [*lines, f"{target} was right already"]
            if was_edited(old):
                lines += _keep_edited(target, config)
        fresh.replace(target)
    finally:
        fresh.unlink(missing_ok=True)
    return [*lines, f"written: {target}"]


def _verified(fresh: Path, target: Path, verify: Callable[[Path], list[str]]) -> list[str]:
    """What `verify` says of `fresh`, in words about `target`, whose content it is to be."""
    from LightningDiT.errors import LightningDiTError

    try:
        return [line.replace(str(fresh), str(target)) for line in verify(fresh)]
    except LightningDiTError as error:
        message = error.message.replace(str(fresh), str(target))
        raise StepError(message, error.fix) from error


def _keep_edited(target: Path, config: Config) -> list[str]:
    backup = target.with_name(target.name + ".bak")
    if backup.exists():
        backup = free_name(target, "bak")
    shutil.copy2(target, backup)
    rows = [f"  {row}" for row in differences(target, config)]
    return [f"{target.name} had been edited; it is kept as {backup.name}. What changed:", *rows]

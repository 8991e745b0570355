"""The arms of the study, its size, and the YAML files that follow from both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from LightningDiT.config import read_yaml
from LightningDiT.data.fashion_mnist import FASHION_MNIST_CLASSES
from LightningDiT.errors import LightningDiTError
from studies.pages import write_json

PLAIN, ALIGNED = "plain", "aligned"
CHANNELS, RATIO = 32, 8  # a 32x32 photograph becomes 4x4x32, as full of channels as VA-VAE's 16x16x32
BATCH = 128
START_PARTS = 5  # checkpoints of a quick arm up to the first one of the others
VISION_MODEL, VISION_FILE = "mobilenetv3_small_050", "vision.safetensors"
TOKENIZER_WEIGHTS, TOKENIZER_END = "tokenizer.safetensors", "training.safetensors"
TRANSFORMER = "transformer.safetensors"
#: The solver of all arms. 120 evaluations of heun change the distances of the first one by less than a hundredth.
SAMPLE = {
    "sampling_method": "ab3",
    "num_sampling_steps": 26,
    "time_grid": "graded",
    "cfg_scale": 1.0,
    "per_proc_batch_size": 250,
}

Section = Mapping[str, Any]


@dataclass(frozen=True)
class Arm:
    """One way to train the transformer.

    Attributes:
        title: in table and plot.
        tokenizer: whose latents it learns.
        quick: it passes the first arm's end before its first checkpoint, so its start is evaluated more often.
        model, transport, optimizer: keys of these sections.
    """

    name: str
    title: str
    tokenizer: str
    quick: bool = False
    model: Section = field(default_factory=dict)
    transport: Section = field(default_factory=dict)
    optimizer: Section = field(default_factory=dict)


#: Blocks and optimizer of DiT (Peebles and Xie, arXiv 2212.09748): LayerNorm, GELU, no rotary embedding.
DIT = {
    "model": {"use_swiglu": False, "use_rope": False, "use_rmsnorm": False},
    "optimizer": {"beta2": 0.999},
}
#: LightningDiT (arXiv 2501.01423); the blocks are the defaults.
LIGHTNING = {
    "transport": {"use_cosine_loss": True, "use_lognorm": True},
    "optimizer": {"beta2": 0.95},
}
#: The others are compared with the first.
ARMS = (
    Arm("dit", "DiT, plain VAE", PLAIN, **DIT, transport={"path_type": "VP", "prediction": "noise"}),
    Arm("dit-flow", "DiT as a flow, plain VAE", PLAIN, **DIT),
    Arm("lightning-plain", "LightningDiT, plain VAE", PLAIN, **LIGHTNING),
    Arm("lightning-aligned", "LightningDiT, aligned VAE", ALIGNED, quick=True, **LIGHTNING),
)


@dataclass(frozen=True)
class Plan:
    """The size of a study, and its folder."""

    folder: Path
    data_root: str
    vision_epochs: int = 4
    tokenizer_steps: int = 5000
    steps: int = 4000  # of each transformer, of 128 images
    every: int = 500  # steps between the checkpoints that are evaluated
    count: int = 2000  # images made of each checkpoint
    seeds: tuple[int, ...] = (0, 1)

    def images(self, steps: int) -> int:
        """Return the number of images that a transformer has seen after `steps`."""
        return steps * BATCH


def tokenizer_values(name: str, plan: Plan) -> dict[str, Any]:
    """Return the YAML of a tokenizer; the two differ in the alignment alone."""
    ddconfig = {"z_channels": CHANNELS, "resolution": 32, "ch": 32, "ch_mult": [1, 1, 2, 4], "num_res_blocks": 1}
    train: dict[str, Any] = {"max_steps": plan.tokenizer_steps, "kl_weight": 1e-8, "warmup_steps": 0.04}
    if name == ALIGNED:
        train |= {"vf_weight": 0.5, "vision_model": VISION_MODEL, "vision_weights": VISION_FILE}
    return {
        "ckpt_path": f"tokenizer-{name}/{TOKENIZER_WEIGHTS}",
        "model": {"params": {"embed_dim": CHANNELS, "ddconfig": ddconfig | {"attn_resolutions": []}}},
        "train": train,
    }


def transformer_values(arm: Arm, seed: int, plan: Plan) -> dict[str, Any]:
    """Return the YAML of one training of a transformer."""
    return {
        "ckpt_path": f"{run_name(arm, seed)}/{TRANSFORMER}",
        "data": {
            "data_path": f"latents-{arm.tokenizer}",
            "image_size": 32,
            "num_classes": len(FASHION_MNIST_CLASSES),
            "class_names": list(FASHION_MNIST_CLASSES),
        },
        "vae": {"model_name": f"tokenizer-{arm.tokenizer}.yaml", "downsample_ratio": RATIO},
        "model": {"model_type": "LightningDiT-XS/1", "in_chans": CHANNELS, **arm.model},
        "train": {
            "max_steps": plan.steps,
            "global_batch_size": BATCH,
            "global_seed": seed,
            "ema_decay": 0.999,
            "warmup_steps": 300,
            "ckpt_every": plan.every,
            "keep_every": plan.every,
        },
        "transport": dict(arm.transport),
        "optimizer": {"lr": 1e-3, "max_grad_norm": 1.0, **arm.optimizer},
        "sample": SAMPLE,
    }


def start_values(arm: Arm, seed: int, plan: Plan) -> dict[str, Any]:
    """Return the YAML that repeats the start of a training, bit for bit, with more checkpoints."""
    values, every = transformer_values(arm, seed, plan), plan.every // START_PARTS
    shorter = {"max_steps": plan.every, "ckpt_every": every, "keep_every": every}
    name = {"ckpt_path": f"{start_name(arm, seed)}/{TRANSFORMER}"}
    return values | name | {"train": values["train"] | shorter}


def run_name(arm: Arm, seed: int) -> str:
    """Return the name of one training: its folder, and its YAML."""
    return f"{arm.name}-{seed}"


def start_name(arm: Arm, seed: int) -> str:
    """Return the name of the repeated start of a quick arm's training."""
    return f"{run_name(arm, seed)}-start"


def write_configs(plan: Plan) -> None:
    """Write every YAML of the study into its folder.

    Raises:
        LightningDiTError: the folder holds a study of other settings.
    """
    files = {f"tokenizer-{name}": tokenizer_values(name, plan) for name in (PLAIN, ALIGNED)}
    files |= {run_name(arm, seed): transformer_values(arm, seed, plan) for arm in ARMS for seed in plan.seeds}
    quick = [arm for arm in ARMS if arm.quick]
    files |= {start_name(arm, seed): start_values(arm, seed, plan) for arm in quick for seed in plan.seeds}
    paths = {plan.folder / f"{name}.yaml": values for name, values in files.items()}
    for path, values in paths.items():
        if path.exists() and read_yaml(path) != values:
            raise LightningDiTError(f"{path} is of a study with other settings", "choose another --output")
    for path, values in paths.items():
        write_json(path, values)  # YAML reads JSON

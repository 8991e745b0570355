"""The cells of the study, its size, and the YAML files that follow from both.

A cell is one training of a network on windows of few people. It differs from the first cell in what its title says.
Each cell is trained once for each seed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from LightningDiT.config import as_yaml, read_yaml
from LightningDiT.errors import LightningDiTError
from LightningDiT.files import write_text
from LightningDiT.radar.augmentation import NAMES
from LightningDiT.verdict.adapting import PART_RATE
from LightningDiT.verdict.jobs import PROJECT

RATIO, CHANNELS = 4, 6  # of the tokenizer of models/walkers
BATCH = 32
CHOSEN, ADAPTER, LOOKS = "transformer.safetensors", "adapter.safetensors", "choice.json"
FOLD = 0
TRANSFORMER, UNET = "LightningDiT-XS/2", "UNet-S"
MODELS = PROJECT / "models"
WALKERS, TOKENIZER = (str(MODELS / "walkers" / f"{name}.safetensors") for name in ("transformer", "tokenizer"))
GARMENTS = str(MODELS / "fashion-mnist/transformer.safetensors")
WALKERS_UNET = "unet"  # stands for `Plan.unet_start`


@dataclass(frozen=True)
class Cell:
    """One training.

    Attributes:
        title: in the table.
        model: `model.model_type`.
        start: weights that it starts from; "" for random ones.
        images: of a person.
        draws: of each training window; 1 is without augmentation.
        chooses: keep the best weights and end early.
        rate: learning rate.
        train: further keys of `train`.
    """

    name: str
    title: str
    model: str = TRANSFORMER
    start: str = WALKERS
    images: int = 30
    draws: int = 8
    chooses: bool = True
    rate: float = PART_RATE
    train: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_adapter(self) -> bool:
        return "trainable" in self.train


BIAS: Mapping[str, Any] = {"trainable": "bias"}
REFERENCE = "reference"
CELLS = (
    Cell(REFERENCE, "transformer from models/walkers, biases", train=BIAS),
    Cell("lora", "LoRA", train={"trainable": "lora"}),
    Cell("all", "all weights, learning rate 2e-3", rate=2e-3),
    Cell("scratch", "all weights from random ones", start="", rate=1e-3),
    Cell("garments", "all weights from models/fashion-mnist", start=GARMENTS, rate=1e-3),
    Cell("plain", "no augmentation, no choice of weights", draws=1, chooses=False, train=BIAS),
    Cell("many", "100 images a person", images=100, train=BIAS),
    Cell("unet", "U-Net from the same walkers, biases", UNET, WALKERS_UNET, train=BIAS),
)


@dataclass(frozen=True)
class Plan:
    """The size of a study, its folder, and the U-Net that was pretrained beside models/walkers."""

    folder: Path
    unet_start: Path = Path("output/pretrain_walkers/unet/transformer.safetensors")
    people: int = 31
    windows: int = 160  # of a person
    size: int = 64  # pixels a side
    steps: int = 300  # of each training
    looks: int = 2  # at samples during a training
    seeds: int = 2

    @property
    def runs(self) -> list[tuple[Cell, int]]:
        """Every training: all cells of one seed before those of the next."""
        return [(cell, seed) for seed in range(self.seeds) for cell in CELLS]

    @property
    def levels(self) -> Path:
        return self.folder / "levels"

    @property
    def split(self) -> Path:
        return self.folder / "parts/split.json"

    def few(self, images: int) -> Path:
        """Return the split in which each person has `images` training windows."""
        return self.folder / f"few-{images}" / "split.json"

    def latents(self, cell: Cell, part: str) -> Path:
        """Return the folder of latents that a cell trains on, or is validated on."""
        return self.folder / f"few-{cell.images}" / (f"latents-{cell.draws}" if part == "training" else "validation")

    def run(self, cell: Cell, seed: int) -> Path:
        """Return the folder of a training."""
        return self.folder / f"{cell.name}-{seed}"

    def config(self, cell: Cell, seed: int) -> Path:
        return self.folder / f"{cell.name}-{seed}.yaml"


def cell_values(cell: Cell, seed: int, plan: Plan) -> dict[str, Any]:
    """Return the YAML of a training."""
    every = max(1, plan.steps // plan.looks)
    start = str(plan.unet_start) if cell.start == WALKERS_UNET else cell.start or None
    return {
        "data": {
            "data_path": str(plan.latents(cell, "training")),
            "valid_path": str(plan.latents(cell, "validation")),
            "split_file": str(plan.few(cell.images)),
            "fold": FOLD,
            "levels_path": str(plan.levels),
            "image_size": plan.size,
            "num_classes": plan.people,
        },
        "vae": {
            "model_name": "levels_f4d6",
            "ckpt_path": TOKENIZER,
            "downsample_ratio": RATIO,
        },
        "model": {
            "model_type": cell.model,
            "in_chans": CHANNELS,
            "augmentation": len(NAMES) if cell.draws > 1 else 0,
            "dropout": 0.1,
        },
        "train": {
            "max_steps": plan.steps,
            "global_batch_size": BATCH,
            "global_seed": seed,
            "ema_decay": 0.99,
            "warmup_steps": 0.05,
            "decay_steps": 0.5,
            "log_every": max(1, every // 4),
            "ckpt_every": every,
            "valid_every": every,
            "judge_every": every,
            "judge_samples": 4,
            "choose": "utility" if cell.chooses else "last",
            **({"weight_init": start} if start else {}),
            **cell.train,
        },
        "transport": {"use_cosine_loss": True, "use_lognorm": True},
        "optimizer": {"lr": cell.rate, "max_grad_norm": 1.0, "weight_decay": 0.01},
        "sample": {"sampling_method": "fast", "cfg_scale": 1.5, "guided_channels": "all", "per_proc_batch_size": 62},
    }


def write_configs(plan: Plan) -> None:
    """Write the YAML of every training into the folder of the study.

    Raises:
        LightningDiTError: the folder holds a study of other settings, or a pretrained network is missing.
    """
    for path, fix in (
        (Path(WALKERS), "python -m studies.pretrain_walkers"),
        (plan.unet_start, "python -m studies.pretrain_walkers, or name the file by --unet-start"),
    ):
        if not path.is_file():
            raise LightningDiTError(f"there is no {path}, from which trainings start", fix)
    files = {plan.config(*run): cell_values(*run, plan) for run in plan.runs}
    for path, values in files.items():
        if path.exists() and read_yaml(path) != values:
            raise LightningDiTError(f"{path} is of a study with other settings", "choose another --output")
    for path, values in files.items():
        write_text(path, as_yaml(values))

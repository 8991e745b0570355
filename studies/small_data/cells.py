"""The cells of the study, its size, and the YAML files that follow from both.

A cell is one training of a network on windows of few people. It differs from the first cell in what its title says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from LightningDiT.config import read_yaml
from LightningDiT.errors import LightningDiTError
from LightningDiT.radar.augmentation import NAMES
from LightningDiT.verdict.jobs import PROJECT
from studies.pages import write_json

RATIO, CHANNELS = 4, 6  # of the bundled tokenizer
BATCH, RATE = 64, 1e-3
CHOSEN, LOOKS = "transformer.safetensors", "choice.json"
SPLIT, FOLD = "parts/split.json", 0
TRANSFORMER, UNET = "LightningDiT-XS/2", "UNet-S"
GARMENTS = "models/fashion-mnist/transformer.safetensors"  # the bundled transformer
OTHERS = "others"  # the walkers of another population, who are in no test


@dataclass(frozen=True)
class Cell:
    """One training.

    Attributes:
        title: in the table.
        model: `model.model_type`.
        start: cell whose weights it starts from; "" for random ones, `GARMENTS` for the bundled transformer.
        draws: of each training window; 1 is without augmentation.
        chooses: keep the best weights and end early.
        others: train on the other population, as a start for other cells.
        train: further keys of `train`.
    """

    name: str
    title: str
    model: str = TRANSFORMER
    start: str = "walkers"
    draws: int = 8
    chooses: bool = True
    others: bool = False
    train: Mapping[str, Any] = field(default_factory=dict)


#: Starts first: each cell comes after that from which it starts.
CELLS = (
    Cell("walkers", "transformer, other walkers", start=GARMENTS, chooses=False, others=True),
    Cell("walkers-unet", "U-Net, other walkers", UNET, "", chooses=False, others=True),
    Cell("reference", "transformer"),
    Cell("unet", "U-Net", UNET, "walkers-unet"),
    Cell("plain", "transformer, no augmentation, no early stop", draws=1, chooses=False),
)


@dataclass(frozen=True)
class Plan:
    """The size of a study, and its folder."""

    folder: Path
    people: int = 31
    windows: int = 80  # of a person
    size: int = 32  # pixels a side
    tokenizer_steps: int = 600
    steps: int = 800  # of each training
    looks: int = 5  # at samples during a training
    patience: int = 2
    seed: int = 0

    def latents(self, cell: Cell, part: str) -> Path:
        """Return the folder of latents that a cell trains on, or is validated on."""
        whose = f"{OTHERS}-" if cell.others else ""
        return self.folder / f"{whose}latents-{part}" / (str(cell.draws) if part == "training" else "1")

    def data(self, cell: Cell) -> Path:
        """Return the folder of the walkers of a cell."""
        return self.folder / (OTHERS if cell.others else "own")


def cell_values(cell: Cell, plan: Plan) -> dict[str, Any]:
    """Return the YAML of a cell's training."""
    every = max(1, plan.steps // plan.looks)
    start = {"": None, GARMENTS: str(PROJECT / GARMENTS)}.get(cell.start, str(plan.folder / cell.start / CHOSEN))
    values: dict[str, Any] = {
        "ckpt_path": str(plan.folder / cell.name / CHOSEN),
        "data": {
            "data_path": str(plan.latents(cell, "training")),
            "valid_path": str(plan.latents(cell, "validation")),
            "split_file": str(plan.data(cell) / SPLIT),
            "fold": FOLD,
            "levels_path": str(plan.data(cell) / "levels"),
            "image_size": plan.size,
            "num_classes": plan.people,
        },
        "vae": {"model_name": str(plan.folder / "tokenizer/chosen.yaml"), "downsample_ratio": RATIO},
        "model": {"model_type": cell.model, "in_chans": CHANNELS, "augmentation": len(NAMES) if cell.draws > 1 else 0},
        "train": {
            "max_steps": plan.steps,
            "global_batch_size": BATCH,
            "global_seed": plan.seed,
            "ema_decay": 0.999,
            "warmup_steps": 0.05,
            "decay_steps": 0.5,
            "log_every": 50,
            "ckpt_every": every,
            "valid_every": every,
            **({} if cell.others else {"judge_every": every}),
            **({"choose": "utility", "patience": plan.patience} if cell.chooses else {"choose": "last"}),
            **({"weight_init": start} if start else {}),
            **cell.train,
        },
        "transport": {"use_cosine_loss": True, "use_lognorm": True},
        "optimizer": {"lr": RATE, "max_grad_norm": 1.0},
        "sample": {"sampling_method": "fast", "cfg_scale": 1.5, "guided_channels": "all", "per_proc_batch_size": 62},
    }
    return values


def write_configs(plan: Plan) -> None:
    """Write the YAML of every cell into the folder of the study.

    Raises:
        LightningDiTError: the folder holds a study of other settings.
    """
    files = {plan.folder / f"{cell.name}.yaml": cell_values(cell, plan) for cell in CELLS}
    for path, values in files.items():
        if path.exists() and read_yaml(path) != values:
            raise LightningDiTError(f"{path} is of a study with other settings", "choose another --output")
    for path, values in files.items():
        write_json(path, values)  # YAML reads JSON

"""The bundled model: in the installed package, or beside it in a clone."""

from __future__ import annotations

from pathlib import Path

from LightningDiT.errors import LightningDiTError

NAME = "fashion-mnist"
PACKAGE = Path(__file__).resolve().parents[1]
#: Where it may lie: the wheel has it as package data, a clone (or an editable installation) among its models.
PLACES = (PACKAGE / "bundled" / NAME, PACKAGE.parent / "models" / NAME)


def bundled_model() -> Path:
    """Return the folder of the bundled model: config.yaml, transformer, tokenizer, statistics.

    Raises:
        LightningDiTError: it lies at neither place.
    """
    for folder in PLACES:
        if (folder / "config.yaml").is_file():
            return folder
    raise LightningDiTError(
        f"the bundled model is neither {PLACES[0]} nor {PLACES[1]}",
        "pip install --force-reinstall --no-deps lightningdit-runnable, or clone the project again",
    )

"""What an installed package has inside and a clone beside it: the bundled model, and the folder of results."""

from __future__ import annotations

from pathlib import Path

from LightningDiT.console import is_installed
from LightningDiT.errors import LightningDiTError

NAME = "fashion-mnist"
ALIAS = "bundled"  # names the bundled model's configuration on a command line
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


def config_file(text: str) -> str:
    """Return the path of a configuration that a command line names: a file, or `bundled` for the bundled model's."""
    return str(bundled_model() / "config.yaml") if text == ALIAS and not Path(text).exists() else text


def results_folder(of_a_clone: Path) -> Path:
    """Return where results go by default: that folder of a clone, but the working directory of an installed package."""
    return Path() if is_installed() else of_a_clone

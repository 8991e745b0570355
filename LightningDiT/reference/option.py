"""`--help-config KEY`, which every entry point has: what a key of the YAML files means."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from LightningDiT.errors import LightningDiTError


class _HelpConfig(argparse.Action):
    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        """Print the keys of a name and end the process, with 2 if there are none, as usage errors do."""
        try:
            print(explain(str(values)))
        except LightningDiTError as error:
            parser.error(f"{option}: {error.message}")
        parser.exit()


def add_help_config(parser: argparse.ArgumentParser) -> None:
    """Add the option to an entry point's parser."""
    parser.add_argument(
        "--help-config",
        action=_HelpConfig,
        dest=argparse.SUPPRESS,
        default=argparse.SUPPRESS,  # the arguments hold nothing of it
        metavar="KEY",
        help="explain a key of the YAML files and exit",
    )


def explain(name: str) -> str:
    """Return what `find_keys` finds, as lines.

    Raises:
        LightningDiTError: see `find_keys`.
    """
    from LightningDiT.reference.keys import find_keys  # reads the library's source, which only this needs

    blocks: Sequence[str] = ["\n".join(key.lines()) for key in find_keys(name)]
    return "\n".join(blocks)

"""Explain the keys of the YAML files: `lightningdit config [KEY]` or `python -m LightningDiT.command.config [KEY]`.

KEY is a full name (sample.cfg_scale), its last part, or a section. Without it all keys are listed. `--write-reference`
renews docs/config.md from the code.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from LightningDiT.console import program, run_main
from LightningDiT.errors import LightningDiTError
from LightningDiT.files import write_text
from LightningDiT.reference.option import explain
from LightningDiT.reference.page import listing, page

PAGE = Path(__file__).resolve().parents[2] / "docs" / "config.md"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(prog=program("command.config"), description=__doc__)
    parser.add_argument("key", nargs="?", metavar="KEY", help="default: list all keys")
    parser.add_argument(
        "--write-reference",
        nargs="?",
        const="",
        metavar="FILE",
        help="write the page with all keys; default: docs/config.md of a clone",
    )
    args = parser.parse_args(argv)
    if args.key and args.write_reference is not None:
        parser.error("--write-reference writes all keys: omit KEY")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Parse and print, or write the page."""
    args = parse(argv)
    if args.write_reference is None:
        print(explain(args.key) if args.key else listing())
        return 0
    target = Path(args.write_reference or PAGE)
    if not target.parent.is_dir():
        raise LightningDiTError(f"{target.parent} is not there, so {target.name} has no place", "name a FILE to write")
    write_text(target, page())
    print(f"wrote {target}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))

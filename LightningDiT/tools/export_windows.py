"""Write generated windows as numbers: `python -m LightningDiT.tools.export_windows --samples FOLDER --output F.npz`.

The array `windows` (N, H, W) holds float32 levels from 0 to 1, or dB with `--db-range`, Doppler down and time across;
`person`, `condition`, `recording` and `number` say whose each is. step5_prepare_spectrograms.py reads such a file too.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from LightningDiT.console import Progress, importing, run_main

with importing(__name__):
    import numpy as np
    from numpy.typing import NDArray

    from LightningDiT.data.image_files import WHITE_16_BIT, shown
    from LightningDiT.data.numpy_files import UNREADABLE
    from LightningDiT.errors import LightningDiTError
    from LightningDiT.files import atomic_path, check_target, open_regular
    from LightningDiT.radar.level_images import raw_pixels
    from LightningDiT.verdict.generated import AGAIN, GENERATE, Files, find_generated

COLUMNS = ("person", "condition", "recording", "number")
RECORDING = "generated"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(prog="python -m LightningDiT.tools.export_windows", description=__doc__)
    parser.add_argument("--samples", type=Path, required=True, help="folder of generated windows, a folder a person")
    parser.add_argument("--output", type=Path, required=True, help="file to write (.npz)")
    parser.add_argument(
        "--db-range",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="write dB: those of the levels 0 and 1, as step 5 got them",
    )
    options = parser.parse_args(argv)
    if options.db_range and not options.db_range[0] < options.db_range[1]:
        parser.error(f"--db-range takes the lower value first, {options.db_range[0]:g} {options.db_range[1]:g} given")
    if options.output.suffix.lower() != ".npz":
        parser.error(f"--output takes a file that ends in .npz, {options.output.name} given")
    return options


def read_levels(paths: Sequence[Path]) -> NDArray[np.float32]:
    """Return the levels (N, H, W) of grey files of 8 or 16 bits, from 0 to 1.

    Raises:
        LightningDiTError: a file cannot be read, has colours, or another size than the first.
    """
    windows: list[NDArray[np.float32]] = []
    with Progress(len(paths), "window", label="reading") as progress:
        for path in paths:
            grey = raw_pixels(path, AGAIN)
            shape = windows[0].shape if windows else grey.shape
            if grey.ndim != 2 or grey.shape != shape:
                raise LightningDiTError(f"{shown(path)} has the shape {grey.shape}, {shape[:2]} is expected", GENERATE)
            white = 255 if grey.dtype == np.uint8 else WHITE_16_BIT
            windows.append((grey.astype(np.float64) / white).astype(np.float32))
            progress.update()
    return np.stack(windows)


def is_export(path: Path) -> bool:
    """Return whether a file is one of this command."""
    try:
        with open_regular(path) as stream, np.load(stream, allow_pickle=False) as archive:
            return set(archive.files) == {"windows", *COLUMNS}
    except UNREADABLE:
        return False


def save_windows(path: Path, windows: NDArray[np.float32], files: Files) -> None:
    """Write windows (N, H, W) with the names of their people and conditions, atomically."""
    values = (
        np.array(files.people),
        np.array([name or "" for name in files.conditions]),
        np.full(len(windows), RECORDING),
        np.arange(1, len(windows) + 1),
    )
    columns = dict(zip(COLUMNS, values, strict=True))
    with atomic_path(path, ours=is_export) as temporary, temporary.open("wb") as stream:
        np.savez_compressed(stream, windows=windows, **columns)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, build, run."""
    args = parse(argv)
    check_target(args.output, ours=is_export)
    files = find_generated(args.samples)
    windows = read_levels(files.paths)
    if args.db_range:
        low, high = args.db_range
        windows = np.float32(low) + windows * np.float32(high - low)
    save_windows(args.output, windows, files)
    unit = "dB" if args.db_range else "levels from 0 to 1"
    print(f"wrote {len(windows)} windows of {len(set(files.people))} people in {unit}: {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))

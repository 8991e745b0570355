"""Image files: which ones a folder holds, and their pixels as 8-bit RGB."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from LightningDiT.errors import LightningDiTError
from LightningDiT.files import LOCK, open_regular
from LightningDiT.images import WHITE_16_BIT

BAND_PIXELS = 2**20  # of 16 bits that are converted at once
#: Limit of width over height, or the reverse. The square crop of a longer image shows next to nothing of it, and
#: enlarges it to gigabytes first.
LONGEST = 256
#: Formats that are read, whatever Pillow has more of: for some others (EPS) it starts an external program.
FORMATS = ("PNG", "JPEG", "WEBP", "MPO", "JPEG2000", "AVIF", "GIF", "BMP", "DIB", "TIFF", "PPM", "TGA", "QOI", "ICO")
#: Names, beside those that begin with a dot, under which systems and tools leave things among people's files.
LITTER = frozenset(
    ("__MACOSX", "Thumbs.db", "desktop.ini", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found")
)
LISTED = 5  # kinds of files in a note
PACKED = frozenset((".zip", ".rar", ".7z", ".tar", ".gz", ".tgz"))
UNPACK = "unpack it, and name that folder"


@contextlib.contextmanager
def open_image(file: str | Path) -> Iterator[Image.Image]:
    """Open a regular file of one of `FORMATS`, whatever its name; raises as `read_image`."""
    with open_regular(file) as stream:
        try:
            image = Image.open(stream, formats=_formats())
        except UnidentifiedImageError:  # whose text has the number of the open file, which differs from run to run
            raise UnidentifiedImageError("cannot identify image file") from None
        with image as opened:
            yield opened


def _formats() -> list[str]:
    """Return those of `FORMATS` that this Pillow reads."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def read_image(file: str | Path) -> Image.Image:
    """Return the whole image in a file with 8 bits: grey ("L"), or red, green and blue; see `as_eight_bits`.

    Memory holds at most 4 bytes for each pixel, and as many again while other kinds of pixels are converted; Pillow
    refuses images of more than 179 million pixels.

    Raises:
        Exception: arbitrary bytes make Pillow's readers fail in arbitrary ways; ValueError for an image beyond
            `LONGEST`.
    """
    with open_image(file) as opened:
        if max(opened.size) > LONGEST * min(opened.size):
            raise ValueError(f"it has {opened.width}x{opened.height} pixels, which make no square")
        return as_eight_bits(opened)


def as_rgb(image: Image.Image) -> Image.Image:
    """Return an opened image with 8 bits for each of red, green and blue; see `as_eight_bits`."""
    return as_eight_bits(image).convert("RGB")


def as_eight_bits(image: Image.Image) -> Image.Image:
    """Return an opened image with 8 bits, "L" or "RGB"; the first picture of an animation.

    Grey values of 16 bits are divided by 257, so that white stays white; Pillow's own conversion cuts them at 255.

    Raises:
        ValueError: the pixels have no fixed range: fractions, or integers beyond 16 bits.
    """
    if image.mode == "F":
        raise ValueError("its pixels are fractions, for which no range is fixed")
    if not image.mode.startswith("I"):  # "I;16", or "I", as which older releases of Pillow open such files
        return image.convert(image.mode if image.mode == "L" else "RGB")
    grey, rows = Image.new("L", image.size), max(1, BAND_PIXELS // image.width)
    for top in range(0, image.height, rows):
        band = image.crop((0, top, image.width, min(top + rows, image.height)))
        values = np.asarray(band).astype(np.int64)
        if values.min() < 0 or values.max() > WHITE_16_BIT:
            raise ValueError(f"its pixels reach from {values.min()} to {values.max()}, beyond 16 bits")
        grey.paste(Image.fromarray(((values + 128) // 257).astype(np.uint8)), (0, top))
    return grey


def shown(path: str | Path) -> str:
    """Return a path as text that any terminal prints: what is no Unicode in a name becomes a question mark."""
    return str(path).encode("utf-8", "replace").decode("utf-8")


@dataclass(frozen=True)
class FoundImages:
    """The image files below a folder.

    Attributes:
        files: sorted.
        notes: a line for each kind of file and folder that is passed over, with its count.
    """

    files: list[Path]
    notes: tuple[str, ...] = ()


def find_images(folder: str | Path, known: Collection[str] = (), more: Collection[str] = ()) -> FoundImages:
    """Return every file below `folder` whose name ends like that of an image that Pillow reads.

    Links are followed. Links that lead nowhere are included, so that a reader reports them. Names that begin with a
    dot, and the litter of systems and tools, are passed over.

    Args:
        known: names of other files that belong there, which the notes do not mention.
        more: further endings of files that hold images, as ".npy".

    Raises:
        LightningDiTError: the folder does not exist, may not be read, or holds no such file.
    """
    root = Path(folder)
    if root.is_file():
        raise LightningDiTError(f"{root} is a file, a folder of images was expected", f"name {root.parent}")
    formats = _formats()
    endings = {ending for ending, kind in Image.registered_extensions().items() if kind in formats} | {*more}
    litter: list[Path] = []
    below = sorted(_files_below(root, litter)) if root.is_dir() else []
    files = [path for path in below if path.suffix.lower() in endings]
    rest = [path for path in below if path.suffix.lower() not in endings and path.name not in known]
    others = Counter(path.suffix.lower() or path.name for path in rest)
    if not files:
        named = f" ({_counted(others)} are)" if others else ""
        reason = f"no file there is called like an image{named}" if root.is_dir() else "it is not there"
        fix = UNPACK if PACKED & others.keys() else "name a folder with images (.jpg, .png, ...)"
        raise LightningDiTError(f"no images in {root}: {reason}", fix)
    notes = []
    if litter:
        names = ", ".join(
            f"{name} {count}" for name, count in Counter(path.name for path in litter).most_common(LISTED)
        )
        notes.append(f"passed over {len(litter)} hidden files and folders of systems and tools: {names}")
    if others:
        notes.append(f"passed over {sum(others.values())} files that are no images: {_counted(others)}")
    return FoundImages(files, tuple(notes))


def _counted(endings: Counter[str]) -> str:
    return ", ".join(f"{shown(ending)} {count}" for ending, count in endings.most_common(LISTED))


def _files_below(folder: Path, litter: list[Path], above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """Yield files and dead links at any depth; a link to one of the folders `above` is passed over.

    Args:
        litter: takes what is passed over by its name.
    """
    real = folder.resolve()
    if real in above:
        return
    try:
        entries = list(os.scandir(folder))
    except OSError as error:
        raise LightningDiTError(f"{folder} cannot be read ({error.strerror})", "give yourself the right to") from error
    for entry in entries:
        path = Path(entry.path)
        if entry.name.startswith(".") or entry.name in LITTER:
            litter.extend([path] if entry.name != LOCK else [])
        elif _is_folder(entry):
            yield from _files_below(path, litter, (*above, real))
        elif path.is_file() or (entry.is_symlink() and not path.exists()):
            yield path


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False

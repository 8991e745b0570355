"""Values of spectrograms: from images of any depth and from arrays, their native time columns, their size, and back."""

from __future__ import annotations

import functools
import hashlib
import io
import math
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

from LightningDiT.data.image_files import LONGEST, WHITE_16_BIT, open_image
from LightningDiT.data.numpy_files import UNREADABLE, read_header, unpacked_bytes
from LightningDiT.errors import first_line, import_package, is_out_of_memory
from LightningDiT.files import atomic_path, open_regular

ARRAYS = (".npy", ".npz", ".mat")
#: Arrays beside that of the windows that say, for each of them, whose it is.
KEYS = ("person", "condition", "recording", "number", "part")
MOST_BYTES = 2**31  # of a file of arrays, packed or not
TOO_LARGE = "it unpacks to more than 2 GB"
PIECE = 2**16  # bytes that are unpacked at once
MAT_HEADER, MAT_PACKED = 128, 15  # bytes before the first element of a .mat file; the type of packed elements
SCIPY_PIN = "scipy==1.17.1"
FEWEST = 8  # native columns that are looked for
NEAR = 2  # columns more and less that a number is compared with
SHARP = 1.2  # least `Columns.sharpness`; windows that were not enlarged have less
SHARP_HALF = 1.3  # the same from half of the columns on: JPEG files keep colours at half the resolution
TINY = 1e-9  # squared error that nobody sees
ROWS = 32  # of a window that are enough

Levels = NDArray[np.float32]


@dataclass(frozen=True)
class ArrayFile:
    """What a file of arrays holds.

    Attributes:
        windows: (N, H, W), Doppler down and time across. A .mat file has N last, as cat(3, ...) gives it, unless the
            lengths of the columns say otherwise.
        columns: by the names in `KEYS`, a text for each window.
        single: whether the file has one window, without an axis that counts.
    """

    windows: NDArray[Any]
    columns: dict[str, list[str]] = field(default_factory=dict)
    single: bool = False


@functools.lru_cache(maxsize=2)  # the windows of a file are asked for one after another
def open_arrays(path: Path) -> ArrayFile:
    """Return the windows of a .npy, .npz or .mat file.

    Raises:
        OSError, ValueError: it is damaged, or has no array of windows, or several.
        LightningDiTError: scipy, which reads .mat files, is missing.
    """
    content = _content(path)
    columns = {key: content.pop(key) for key in KEYS if key in content}
    numeric = {name: array for name, array in content.items() if array.dtype.kind in "fiuc" and array.ndim >= 2}
    if path.suffix.lower() == ".mat":  # where a number is an array of 1 x 1
        numeric = {name: array for name, array in numeric.items() if sum(side > 1 for side in array.shape) > 1}
    if len(numeric) != 1:
        raise ValueError(f"it has {len(numeric)} arrays of two or three axes, one is expected")
    [array] = numeric.values()
    if array.dtype.kind == "c":
        raise ValueError("its values are complex, write 20 log10(abs(x)) in dB")
    if array.ndim == 4 and 1 in (array.shape[1], array.shape[3]):
        array = array[:, 0] if array.shape[1] == 1 else array[..., 0]
    single = array.ndim == 2
    windows = array[None] if single else _counted_first(array, columns, path.suffix.lower() == ".mat")
    if windows.ndim != 3 or 0 in windows.shape:
        raise ValueError(f"its array has the shape {array.shape}, (H, W) or (N, H, W) is expected")
    if max(windows.shape[1:]) > LONGEST * min(windows.shape[1:]):
        raise ValueError(f"its windows have {windows.shape[2]}x{windows.shape[1]} values")
    texts = {}
    for key, column in columns.items():
        flat = [value.item() if hasattr(value, "item") else value for value in np.ravel(column)]
        if len(flat) != len(windows):
            raise ValueError(f"{key} has {len(flat)} values for {len(windows)} windows")
        texts[key] = [str(value).strip() for value in flat]
    return ArrayFile(windows, texts, single)


def _counted_first(array: NDArray[Any], columns: dict[str, NDArray[Any]], by_matlab: bool) -> NDArray[Any]:
    """Return an array whose first axis counts windows: it has the length of the columns, else it is MATLAB's last."""
    if array.ndim != 3:
        return array
    lengths = {column.size for column in columns.values()}
    last = array.shape[2] in lengths and array.shape[0] not in lengths if lengths else by_matlab
    return np.moveaxis(array, 2, 0) if last else array


def _content(path: Path) -> dict[str, NDArray[Any]]:
    """Return the arrays of a file by their names; raises as `open_arrays`."""
    with open_regular(path) as stream:
        data = stream.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise ValueError("it has more than 2 GB")
    kind, memory = path.suffix.lower(), io.BytesIO(data)
    if kind == ".mat":
        return _matlab(memory, data)
    try:
        if kind == ".npz":
            with np.load(memory, allow_pickle=False) as archive:
                members = archive.zip.infolist()
                if sum(unpacked_bytes(member, len(data)) for member in members) > MOST_BYTES:
                    raise ValueError(TOO_LARGE)
                for member in members:
                    with archive.zip.open(member) as stream:
                        read_header(stream, member.file_size)
                return {name: archive[name] for name in archive.files}
        read_header(memory, len(data))
        memory.seek(0)
        return {"array": np.lib.format.read_array(memory, allow_pickle=False)}
    except UNREADABLE as error:
        if is_out_of_memory(error) or str(error) == TOO_LARGE:
            raise
        raise ValueError(f"it is no whole {kind} file ({first_line(error)})") from error


def _matlab(memory: io.BytesIO, data: bytes) -> dict[str, NDArray[Any]]:
    scipy_io = import_package("scipy.io", "the arrays of .mat files", SCIPY_PIN)
    if data[:8] == b"\x89HDF\r\n\x1a\n" or b"MATLAB 7.3" in data[:128]:
        raise ValueError("it is a MATLAB 7.3 file, write it by save(..., '-v7')")
    try:
        if _matlab_bytes(data) > MOST_BYTES:
            raise ValueError(TOO_LARGE)
        loaded = scipy_io.loadmat(memory)
    except Exception as error:  # arbitrary bytes make scipy's reader fail in arbitrary ways
        if str(error) == TOO_LARGE:
            raise
        raise ValueError(f"it is no whole .mat file ({first_line(error)})") from error
    return {name: array for name, array in loaded.items() if isinstance(array, np.ndarray)}


def _matlab_bytes(data: bytes) -> int:
    """Return the bytes of a .mat file with its elements unpacked, counted to little more than `MOST_BYTES`.

    An element has its type and its length in two numbers of 4 bytes before it (MATLAB, MAT-File Format, version 5).
    Files of version 4 have nothing packed, and a zero in their first four bytes.
    """
    if 0 in data[:4]:
        return len(data)
    numbers = struct.Struct("<II" if data[MAT_HEADER - 2 : MAT_HEADER] == b"IM" else ">II")
    at, total = MAT_HEADER, len(data)
    while at + numbers.size <= len(data) and total <= MOST_BYTES:
        kind, length = numbers.unpack_from(data, at)
        at += numbers.size
        total += _unpacked_length(data[at : at + length], MOST_BYTES - total) if kind == MAT_PACKED else 0
        at += length
    return total


def _unpacked_length(packed: bytes, most: int) -> int:
    """Return how many bytes a zlib stream unpacks to, counted to little more than `most`, in little memory."""
    unpacker, total = zlib.decompressobj(), 0
    for start in range(0, len(packed), PIECE):
        piece = packed[start : start + PIECE]
        while piece and total <= most:
            total += len(unpacker.decompress(piece, PIECE))
            piece = unpacker.unconsumed_tail
    return total


@dataclass(frozen=True)
class Raw:
    """A window as its file has it.

    Attributes:
        pixels: (H, W, 3) uint8, of an image in colours; else None.
        values: (H, W) float32: dB of an array, levels in 0 to 1 of a grey image; else None.
        in_db: whether `values` are dB.
        digest: of the pixels or values.
        is_turned: whether the file asks viewers to turn or mirror the pixels (EXIF); they are here as stored.
    """

    pixels: NDArray[np.uint8] | None
    values: Levels | None
    in_db: bool
    digest: str
    is_turned: bool = False

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        array = self.values if self.pixels is None else self.pixels
        assert array is not None
        return array.shape[0], array.shape[1]


def read_raw(file: Path, index: int | None) -> Raw:
    """Return one window.

    Raises:
        Exception: arbitrary bytes make readers fail in arbitrary ways.
    """
    if file.suffix.lower() in ARRAYS:
        array = open_arrays(file).windows[index or 0]
        return Raw(None, array.astype(np.float32), True, _digest(array))
    with open_image(file) as image:
        if max(image.size) > LONGEST * min(image.size):
            raise ValueError(f"it has {image.width}x{image.height} pixels")
        if image.mode == "F" or image.mode.startswith("I"):
            array, is_turned = np.asarray(image), _is_turned(image)
            if image.mode == "F":
                return Raw(None, array.astype(np.float32), True, _digest(array), is_turned)
            if array.min() < 0 or array.max() > WHITE_16_BIT:
                raise ValueError(f"its pixels reach from {array.min()} to {array.max()}, beyond 16 bits")
            return Raw(None, (array / WHITE_16_BIT).astype(np.float32), False, _digest(array), is_turned)
        array, is_turned = np.asarray(image if image.mode == "L" else image.convert("RGB")), _is_turned(image)
    if array.ndim == 3 and not (array != array[..., :1]).any():
        array = array[..., 0]
    if array.ndim == 2:
        return Raw(None, (array / 255).astype(np.float32), False, _digest(array), is_turned)
    return Raw(array, None, False, _digest(array), is_turned)


def _is_turned(image: Image.Image) -> bool:
    """Return whether the EXIF data of a loaded image have an orientation other than 1, the pixels as stored."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9)
    except MemoryError:
        raise
    except Exception:  # arbitrary bytes make Pillow's reader fail in arbitrary ways; the pixels may be whole
        return False


def _digest(array: NDArray[Any]) -> str:
    found = hashlib.sha256(str(array.shape).encode())
    found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()[:16]


# ---- the time axis


#: How windows may have been enlarged: Pillow's filters, whose first and last column lie half a step from the ends.
CENTRED = {
    "nearest": Image.Resampling.NEAREST,
    "linear": Image.Resampling.BILINEAR,
    "cubic": Image.Resampling.BICUBIC,
}
#: The same with the first and last column on the ends, as interp2, pcolor and scipy's zoom have them.
ON_ENDS = ("nearest between the ends", "linear between the ends")
WAYS = (*CENTRED, *ON_ENDS)


@dataclass(frozen=True)
class Columns:
    """Native time columns of windows that were enlarged.

    Attributes:
        count: of a window.
        way: of `WAYS`.
        sharpness: error of the windows made again from a few columns more or less, over that from these.
        error: root mean square of that from these, in levels.
    """

    count: int
    way: str
    sharpness: float
    error: float


def native_columns(windows: Sequence[Levels]) -> Columns | None:
    """Return the number of time columns that windows (of one size) had before they were enlarged; None if unchanged.

    A window that was enlarged comes back from its native columns up to the noise of its file, and from any other
    number near it with a larger error.
    """
    width, rows = windows[0].shape[1], max(1, windows[0].shape[0] // ROWS)
    counts = range(FEWEST, width)
    if len(counts) <= 2 * NEAR:
        return None
    errors = {way: np.zeros(len(counts)) for way in WAYS}
    for levels in windows:
        thin = np.ascontiguousarray(levels[::rows])
        for at, count in enumerate(counts):
            for way, again in _enlarged_again(thin, count):
                errors[way][at] += float(((again - thin) ** 2).mean())
    found = []
    for way, squares in errors.items():
        inner, around = squares[NEAR:-NEAR], np.minimum(squares[: -2 * NEAR], squares[2 * NEAR :])
        ratio = np.sqrt(around / np.maximum(inner, TINY))
        for at in np.flatnonzero(ratio > SHARP):
            count, error = counts[int(at) + NEAR], math.sqrt(inner[at] / len(windows))
            if 2 * count < width or ratio[at] > SHARP_HALF:
                found.append(Columns(count, way, float(ratio[at]), error))
    # nearest pixels also come back from some larger numbers, the smallest is what they hold
    sharpest = max((columns.sharpness for columns in found), default=0.0)
    clear = [columns for columns in found if columns.sharpness - 1 >= 0.7 * (sharpest - 1)]
    return min(clear, key=lambda columns: (columns.count, -columns.sharpness), default=None)


def _enlarged_again(levels: Levels, count: int) -> Iterator[tuple[str, Levels]]:
    """Yield levels (H, W) made again from `count` columns, for each of `WAYS`."""
    height, width = levels.shape
    columns = Image.fromarray(sample_columns(levels, count, next(iter(CENTRED))))
    for way, kernel in CENTRED.items():
        yield way, np.asarray(columns.resize((width, height), kernel))
    on_ends = sample_columns(levels, count, ON_ENDS[0])
    at = np.linspace(0, count - 1, width)
    yield ON_ENDS[0], on_ends[:, np.rint(at).astype(np.intp)]
    yield ON_ENDS[1], _between(on_ends, at)


def sample_columns(levels: Levels, count: int, way: str) -> Levels:
    """Return the native columns (H, count) of a window (H, W) that was enlarged in one of `WAYS`.

    Each is taken where its own value lies, between the two nearest pixels.
    """
    width = levels.shape[1]
    if way in ON_ENDS:
        return _between(levels, np.linspace(0, width - 1, count))
    return _between(levels, np.clip((np.arange(count) + 0.5) * width / count - 0.5, 0, width - 1))


def _between(levels: Levels, at: NDArray[np.float64]) -> Levels:
    """Return columns at fractional places, by linear interpolation."""
    left = np.minimum(at.astype(np.intp), levels.shape[1] - 2)
    share = (at - left).astype(np.float32)
    return levels[:, left] * (1 - share) + levels[:, left + 1] * share


# ---- size and files


def fitted(levels: Levels, size: tuple[int, int], fit: str) -> Levels:
    """Return levels (H, W) in another size; nothing is cut.

    Args:
        size: height and width.
        fit: "resize" keeps both ends of each axis; "pad" keeps the proportions of a larger window and fills the rest
            with the lowest level of the window, at the bottom and at the end.
    """
    height, width = size
    if levels.shape == size:
        return levels
    if fit == "pad":
        scale = min(1.0, height / levels.shape[0], width / levels.shape[1])
        inner = (max(1, math.floor(levels.shape[0] * scale)), max(1, math.floor(levels.shape[1] * scale)))
        padded = np.full(size, levels.min(), np.float32)
        padded[: inner[0], : inner[1]] = fitted(levels, inner, "resize")
        return padded
    image = Image.fromarray(np.ascontiguousarray(levels)).resize((width, height), Image.Resampling.BICUBIC)
    return np.clip(np.asarray(image), levels.min(), levels.max())


def save_levels(levels: Levels, path: Path) -> None:
    """Write levels in 0 to 1 as a grey PNG of 16 bits."""
    with atomic_path(path) as temporary:
        Image.fromarray(grey_levels(levels)).save(temporary, "PNG")


def grey_levels(levels: Levels) -> NDArray[np.uint16]:
    """Return levels in 0 to 1 as whole numbers up to 65535."""
    return np.rint(np.clip(levels, 0, 1) * WHITE_16_BIT).astype(np.uint16)


def save_view(pixels: NDArray[np.uint8], path: Path) -> None:
    """Write RGB pixels (H, W, 3) as a PNG."""
    with atomic_path(path) as temporary:
        Image.fromarray(pixels).save(temporary, "PNG")

"""Files of NumPy from anywhere: what reading a damaged one raises, and headers that claim more than is there.

NumPy allocates what a header claims before it reads. Nothing here needs torch.
"""

from __future__ import annotations

import math
import struct
import tokenize
import zipfile
import zlib
from typing import IO

import numpy as np

try:
    from lzma import LZMAError
except ImportError:  # a Python without it, which has no such members to read
    LZMAError = zipfile.BadZipFile  # type: ignore[misc, assignment]

#: What reading a damaged .npy or .npz file raises, members that are encrypted or packed in an unknown way among them
#: (RuntimeError and NotImplementedError); NumPy reads a header as if it were Python.
UNREADABLE = (
    *(OSError, EOFError, ValueError, TypeError, AttributeError, LookupError, RuntimeError, SyntaxError),
    *(struct.error, tokenize.TokenError, zipfile.BadZipFile, zipfile.LargeZipFile, zlib.error, LZMAError),
)
VERSIONS = ((1, 0), (2, 0), (3, 0))  # of the format
#: Bytes that one packed byte can become, by method: deflate by zlib's documentation; bzip2, the most of all others,
#: packs 900 kB of runs of 255 bytes, each as 5, into 45 bytes.
RATIOS, LARGEST_RATIO = {zipfile.ZIP_STORED: 1, zipfile.ZIP_DEFLATED: 1032}, 2**20

Header = tuple[tuple[int, ...], bool, np.dtype]


def read_header(stream: IO[bytes], size: int) -> Header:
    """Return shape, whether columns are contiguous, and type of an array, from the beginning of its file.

    Args:
        size: bytes of the file.

    Raises:
        ValueError: it is no header, or the file has fewer bytes than an array of it.
    """
    version = np.lib.format.read_magic(stream)
    if version not in VERSIONS:
        raise ValueError(f"version {version} of the format is unknown")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, by_columns, dtype = read(stream)
    needed, held = math.prod(shape) * dtype.itemsize, size - stream.tell()
    if needed > held and not dtype.hasobject:
        raise ValueError(f"its header claims {dtype} {shape}, {needed} bytes, and {held} are there")
    return shape, by_columns, dtype


def unpacked_bytes(member: zipfile.ZipInfo, archive_bytes: int) -> int:
    """Return the size of a member; raises ValueError if it cannot be so large in an archive of that size."""
    most = RATIOS.get(member.compress_type, LARGEST_RATIO) * min(member.compress_size, archive_bytes)
    if member.file_size > most:
        raise ValueError(f"{member.filename} claims {member.file_size} bytes, and {most} are the most that it can hold")
    return member.file_size

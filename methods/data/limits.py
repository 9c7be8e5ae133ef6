"""How much a source of data may hold, and of what kind: refused before memory is asked for."""

import math
import zipfile
from pathlib import Path

import numpy as np

from bilevel.files import amount

GIGABYTES = 16.0  # of a decoded set: ImageNet at 64 pixels, the largest in common use, has 15.7
FILE = 2**28  # bytes of one image file, unpacked
FOLDERS = 1_000_000
_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def refuse_large(size: float, gigabytes: float, what: str) -> None:
    """Refuse data that need more memory than is allowed.

    Args:
        size: bytes they would take.
        gigabytes: what is allowed.
        what: they are called.

    Raises:
        ValueError: with both numbers.
    """
    if size > gigabytes * 1e9:
        raise ValueError(
            f"{what} would take {amount(size)} of memory, more than {gigabytes:g} GB; give "
            "fewer images, or allow more with `max_gigabytes`"
        )


def refuse_array(path: Path, archive: zipfile.ZipFile, name: str, gigabytes: float) -> None:
    """Refuse an array of an `.npz` file by its header alone.

    Args:
        path: of the file.
        archive: the file.
        name: of the array.
        gigabytes: the largest size.

    Raises:
        ValueError: if it is no plain array of numbers or texts, is larger, or not all there.
    """
    what = f"`{name}` in `{path}`"
    entry = archive.getinfo(f"{name}.npy" if f"{name}.npy" in archive.namelist() else name)
    with archive.open(entry) as stream:
        read = _HEADERS.get(np.lib.format.read_magic(stream))
        if read is None:
            raise ValueError(
                f"{what} is a structured array; save numbers, as one array of one shape"
            )
        shape, _, kind = read(stream)
        begins = stream.tell()
    if kind.hasobject:
        raise ValueError(f"{what} is an object array; save numbers, as one array of one shape")
    if kind.kind not in "biufcSU":
        raise ValueError(f"{what} is of type `{kind}`; save numbers, as one array of one shape")
    size = math.prod(shape) * kind.itemsize
    if min(shape, default=0) < 0 or size != entry.file_size - begins:
        raise ValueError(
            f"{what} promises {amount(size)} in an array of shape {shape}, but holds "
            f"{amount(entry.file_size - begins)}; it is damaged, restore it from a copy"
        )
    refuse_large(size, gigabytes, what)


def told(error: Exception) -> str:
    """Why something could not be unpacked or decoded, in a few words."""
    text = str(error)
    if "encrypted" in text:
        return "it is encrypted; unpack it with its password first"
    return text or type(error).__name__

"""Checkpoint files: written whole or not at all, checked, and read without running what is in them.

A checkpoint is what `torch.save` writes, a zip archive, with the SHA-256 of that as its comment.
`torch.load` reads it like any other archive; it checks neither this checksum nor the archive's own.
"""

import hashlib
import os
import re
import struct
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import optree
import torch
from torch import nn

from bilevel.errors import CheckpointError
from bilevel.files import Writer, amount, regular, replacing

FORMAT = "bilevel-checkpoint-1"
_COMMENT = b"sha256:"
_END = struct.Struct("<H")  # an archive ends with the length of its comment, and the comment
_DIGITS = 64


def write_atomically(content: Any, path: str | os.PathLike[str]) -> None:
    """`torch.save` into a temporary file beside `path`, flushed to disk, then renamed over it.

    Temporary files that a killed process left there more than an hour ago are removed.

    Raises:
        WriteError: if it cannot be written; the file before is whole.
    """
    tensors = [leaf for leaf in optree.tree_leaves(content) if isinstance(leaf, torch.Tensor)]
    with replacing(path, sum(t.numel() * t.element_size() for t in tensors)) as file:
        torch.save(content, cast(BinaryIO, file))
        _seal(file)


def read_checkpoint(
    path: str | os.PathLike[str], map_location: torch.device | str | None = None
) -> dict[str, Any]:
    """A checkpoint's content, loaded with `weights_only=True` after its checksum was verified.

    Checkpoints of earlier versions have none; the archive's own, a CRC-32 per entry, is verified then.

    Raises:
        CheckpointError: if the file is missing, truncated, damaged or something else.
    """
    return _read(Path(path), verified=True, map_location=map_location)


def glance(path: str | os.PathLike[str]) -> dict[str, Any]:
    """`read_checkpoint` without reading the tensors, and so without verifying the checksum.

    Raises:
        CheckpointError: as `read_checkpoint`, as far as can be seen.
    """
    return _read(Path(path), verified=False, mmap=True, map_location="cpu")


def loadable(value: Any, path: str) -> Any:
    """The value with NumPy scalars as Python numbers; anything `weights_only` refuses is an error.

    Args:
        value: tensors, plain values, and containers of them.
        path: where it stands in the checkpoint, for the message.

    Raises:
        CheckpointError: naming what could be saved but not loaded again.
    """
    if isinstance(value, np.generic):
        return value.item()
    if type(value) is dict:
        return {key: loadable(entry, f"{path}.{key}") for key, entry in value.items()}
    if type(value) in (list, tuple):
        return type(value)(loadable(entry, f"{path}.{i}") for i, entry in enumerate(value))
    numbers = (torch.Tensor, str, bytes, bool, int, float, complex, Counter, OrderedDict)
    known = (*numbers, torch.dtype, torch.device, torch.Size)
    if value is not None and not isinstance(value, known):
        raise CheckpointError(
            f"`{path}` is a `{type(value).__name__}`, which a checkpoint cannot hold; "
            "keep tensors and plain numbers in the state"
        )
    return value


def refuse_not_finite(module: nn.Module, step: int) -> None:
    """Refuse to write a module from which no run could go on.

    Args:
        module: what is to be written.
        step: the number of steps it has taken, for the message.

    Raises:
        CheckpointError: if a parameter is not finite, or a buffer holds NaN.
    """
    good = {name: p.isfinite().all() for name, p in module.named_parameters()}
    # infinite buffers are legitimate masks
    good |= {name: ~b.isnan().any() for name, b in module.named_buffers()}
    bad = next((name for name, is_good in good.items() if not bool(is_good)), None)
    if bad is not None:
        raise CheckpointError(
            f"`{bad}` holds NaN or infinite numbers after step {step}; "
            "the checkpoint was not written and the previous one was kept"
        )


def _read(path: Path, verified: bool, **options: Any) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint at `{path}`")
    try:
        if verified:
            _verify(path)
        content = torch.load(path, weights_only=True, **options)
    except CheckpointError:
        raise
    except Exception as error:  # torch raises a dozen kinds of error here
        raise CheckpointError(
            f"`{path}` ({amount(path.stat().st_size)}) is truncated or not a checkpoint; "
            f"use an earlier one ({type(error).__name__})"
        ) from error
    if (
        not isinstance(content, dict)
        or content.get("format") != FORMAT
        or not isinstance(content.get("step"), int)
    ):
        raise CheckpointError(f"`{path}` is not a checkpoint of `bilevel.train`")
    return content


def _seal(file: Writer) -> None:
    """Write the checksum of what was written into the archive's comment, the last thing in it."""
    comment = _COMMENT + file.digest.hexdigest().encode()
    file.raw.seek(file.count - _END.size)
    file.raw.write(_END.pack(len(comment)) + comment)


def _verify(path: Path) -> None:
    """Refuse a file whose content is not what was written.

    Raises:
        CheckpointError: if it is not.
    """
    size, tail = regular(path), _END.size + len(_COMMENT) + _DIGITS
    with open(path, "rb") as file:
        file.seek(max(0, size - tail))
        found = re.fullmatch(rb"(..)sha256:([0-9a-f]{64})", file.read(), re.DOTALL)
        if found is not None:
            file.seek(0)
            # of what `torch.save` wrote: an archive without comment ends with a length of 0
            whole = _digest(file, size - tail, _END.pack(0)).encode() == found[2]
            whole = whole and _END.unpack(found[1])[0] == tail - _END.size
        else:  # of an earlier version, or damaged in these few bytes
            file.seek(0)
            with zipfile.ZipFile(file) as archive:
                whole = archive.testzip() is None and not archive.comment
    if not whole:
        raise CheckpointError(
            f"`{path}` ({amount(size)}) is truncated or not a checkpoint as it was written: its "
            "checksum does not fit; use an earlier one"
        )


def _digest(file: BinaryIO, size: int, end: bytes) -> str:
    """SHA-256 of the first `size` bytes and an end."""
    digest = hashlib.sha256()
    while size > 0:
        piece = file.read(min(size, 2**20))
        if not piece:
            break
        digest.update(piece)
        size -= len(piece)
    digest.update(end)
    return digest.hexdigest()

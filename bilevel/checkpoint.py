"""Checkpoint files: written whole or not at all, and read without running what is in them."""

import contextlib
import os
import time
from pathlib import Path
from typing import Any

import torch

from bilevel.errors import CheckpointError

FORMAT = "bilevel-checkpoint-1"


def write_atomically(content: Any, path: str | os.PathLike[str]) -> None:
    """`torch.save` into a temporary file beside `path`, flushed to disk, then renamed over it.

    Temporary files that a killed process left there more than an hour ago are removed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{path.name}.*.tmp"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - left.stat().st_mtime > 3600:
                left.unlink()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()


def read_checkpoint(
    path: str | os.PathLike[str], map_location: torch.device | str | None = None
) -> dict[str, Any]:
    """A checkpoint's content, loaded with `weights_only=True`.

    Raises:
        CheckpointError: if the file is missing, truncated or something else.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint at `{path}`")
    try:
        content = torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:  # torch raises a dozen kinds of error here
        raise CheckpointError(
            f"`{path}` ({path.stat().st_size} bytes) is truncated or not a checkpoint; "
            f"use an earlier one ({type(error).__name__})"
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"`{path}` is not a checkpoint of `bilevel.train`")
    return content

"""Weights in safetensors files, with a checksum that covers what the tensors are and belong to."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from bilevel.files import regular, replacing

_CHECKSUM = "sha256"


def write_weights(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    about: Mapping[str, Any],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Replace a file of weights, whole or not at all.

    Args:
        path: the file.
        tensors: by name; copied to the processor.
        about: plain values the checksum covers too: what the weights belong to.
        metadata: texts to keep in the file.

    Raises:
        WriteError: if it cannot be written; the file before is whole.
    """
    # copies: safetensors stores neither shared memory (a posterior in both levels) nor strides
    copies = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    content = save(copies, {**(metadata or {}), _CHECKSUM: _digest(copies, about)})
    with replacing(path, len(content)) as file:
        file.write(content)


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The texts in a file of weights.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is no such file.
    """
    try:
        regular(path)
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except SafetensorError as error:
        raise _damaged(path, f"it is truncated or no file of weights ({error})") from None


def read_weights(path: str | os.PathLike[str], about: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a file of weights, after their checksum was verified.

    Files of earlier versions have none: their tensors are taken as they are.

    Args:
        path: the file.
        about: what the weights should belong to.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is no such file, damaged, or belongs to something else.
    """
    known = read_metadata(path).get(_CHECKSUM)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise _damaged(path, str(error)) from None
    if known is not None and known != _digest(tensors, about):
        raise _damaged(path, "its checksum fits neither its content nor what it belongs to")
    return tensors


def fill_module(module: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Load weights into a module.

    Raises:
        ValueError: if they are of another architecture.
    """
    try:
        module.load_state_dict(dict(tensors))
    except RuntimeError as error:
        told = " ".join(str(error).split())
        raise ValueError(
            f"the weights in `{path}` are not those of this model: {told[:300]}"
        ) from None


def _damaged(path: str | os.PathLike[str], why: str) -> ValueError:
    return ValueError(
        f"the weights in `{os.fspath(path)}` cannot be read: {why}; save the model again, or "
        "restore the file from a copy"
    )


def _digest(tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(cast(Any, tensor.reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()

"""Batches and answers as lists of tensors and constants, records taken apart."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import optree
import torch
from torch import Tensor
from torch.nn.modules import module as everywhere


def flatten(tree: Any) -> tuple[list[Any], Any]:
    """The tensors and constants of a tree, dataclasses and dict-likes taken apart, too."""
    leaves, structure = optree.tree_flatten(tree, namespace="bilevel")
    if any(_take_apart(type(leaf)) for leaf in leaves):
        return flatten(tree)
    return list(leaves), structure


_whole: set[type] = {Tensor, torch.nn.Parameter, float, int, bool, str}


def _take_apart(kind: type) -> bool:
    """Register a class of records with `optree`; returns whether it was new."""
    if kind in _whole:
        return False
    _whole.add(kind)
    if dataclasses.is_dataclass(kind) and not issubclass(kind, Mapping):
        names = [field.name for field in dataclasses.fields(kind)]
    elif issubclass(kind, Mapping) and not issubclass(kind, dict):
        names = []
    else:
        return False

    def parts(record: Any) -> tuple[list[Any], tuple[str, ...]]:
        held = {
            **{name: getattr(record, name) for name in names},
            **getattr(record, "__dict__", {}),
        }
        return list(held.values()), tuple(held)

    def whole(held: tuple[str, ...], values: Any) -> Any:
        record = object.__new__(
            kind
        )  # `__init__` has run before, and frozen records allow no other way
        for name, value in zip(held, values, strict=True):
            object.__setattr__(record, name, value)
        return record

    optree.register_pytree_node(cast(Any, kind), parts, cast(Any, whole), namespace="bilevel")
    return True


def signature(tensor: Tensor) -> Any:
    """What a graph is made for of a tensor.

    Raises:
        TypeError: for a layout that no graph can hold.
    """
    if tensor.layout is not torch.strided:
        raise TypeError(f"a batch holds a tensor of layout `{tensor.layout}`")
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad


def constant(leaf: Any) -> Any:
    """What a graph is made for; 1, 1.0 and True are not the same.

    Raises:
        TypeError: for something that a graph can neither read nor hold.
    """
    if isinstance(leaf, np.ndarray):
        raise TypeError("the batch holds a NumPy array; make it a tensor, `torch.as_tensor(...)`")
    try:
        hash(leaf)
    except TypeError:
        raise TypeError(
            f"the batch holds a `{type(leaf).__name__}`, which a graph cannot look into; use "
            "tensors in tuples, dicts or dataclasses"
        ) from None
    return type(leaf), leaf


_HOOKS_OF_ALL: list[Any] = [
    getattr(everywhere, f"_global_{kind}_hooks")
    for kind in ("forward_pre", "forward", "backward_pre", "backward")
]


def modes(device: str) -> tuple[Any, ...]:
    """The parts of torch's global state that decide how a step is computed."""
    return (
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(),
        torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device),
        *map(tuple, _HOOKS_OF_ALL),
    )


def kinds(leaves: Sequence[Any]) -> tuple[Any, ...]:
    """What a graph is made for of tensors and constants."""
    return tuple(signature(leaf) if isinstance(leaf, Tensor) else constant(leaf) for leaf in leaves)


def laid_out(tensor: Tensor, stride: Sequence[int]) -> Tensor:
    """The tensor with these strides: a graph reads memory as it lies."""
    if tensor.stride() == stride:
        return tensor
    new = torch.empty_strided(tensor.shape, tuple(stride), dtype=tensor.dtype, device=tensor.device)
    return new.copy_(tensor)

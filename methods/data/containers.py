"""Rows of numbers in whatever container, as one dense tensor; the rest refused with advice."""

from collections.abc import Mapping, Sized
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset


def as_tensor(data: Any) -> Tensor:
    """Rows as a dense tensor: of a tensor, an array, a sparse matrix, a data frame or nested lists.

    Raises:
        TypeError: for anything else, and for values that are no real numbers.
        ValueError: for rows of different lengths, and masked values.

    Example:
        >>> as_tensor([[0, 1], [1, 1]])
        tensor([[0, 1],
                [1, 1]])
    """
    if isinstance(data, Tensor):
        return _dense(data)
    if callable(getattr(data, "toarray", None)):  # a sparse matrix of SciPy
        data = data.toarray()
    elif callable(getattr(data, "to_numpy", None)):  # a data frame
        data = data.to_numpy()
    if isinstance(data, (list, tuple)) and data and all(isinstance(x, Tensor) for x in data):
        if len({x.shape for x in data}) > 1:
            raise TypeError(
                f"visibles must be a tensor, got a {type(data).__name__} of {len(data)} tensors of "
                f"different shapes; pass the one that holds the visibles, such as `data[0]`"
            )
        return _dense(torch.stack(list(data)))
    if isinstance(data, (list, tuple)) or hasattr(data, "__array__"):
        return torch.from_numpy(_plain(data))
    raise TypeError(_no_array(data))


def _dense(data: Tensor) -> Tensor:
    """A tensor as the networks take it, outside of any graph."""
    if data.is_nested:
        raise TypeError(
            "visibles must be a tensor of one shape, got a nested one; pad its rows to one length with "
            "`data.to_padded_tensor(0.0)`"
        )
    if data.is_complex():
        raise TypeError("visibles must be real numbers, got complex ones; pass `data.real`")
    rows: Tensor = data.detach()
    if rows.is_quantized:
        return rows.dequantize()
    return rows if rows.layout == torch.strided else rows.to_dense()


def _plain(data: Any) -> NDArray[Any]:
    """An array of a type torch knows."""
    if isinstance(data, np.ma.MaskedArray) and np.ma.is_masked(data):
        count = int(np.ma.getmaskarray(data).sum())
        raise ValueError(
            f"{count} of {data.size} values are masked; drop their rows, or fill them with "
            "`data.filled(value)`"
        )
    try:
        array = np.asarray(data)
    except ValueError:
        raise ValueError("the rows of the data differ in length; cut or pad them to one") from None
    kind = array.dtype.kind
    if kind == "c":
        raise TypeError("visibles must be real numbers, got complex ones; pass `data.real`")
    if kind not in "biuf":
        raise TypeError(
            f"visibles must be a tensor of real numbers, got values of type `{array.dtype}`; leave out "
            "or encode what is no number, then convert with `.astype(float)`"
        )
    if kind == "u" and array.itemsize > 1:
        array = array.astype(np.float64 if array.itemsize == 8 else np.int64)
    if kind == "f" and array.itemsize > 8:
        array = array.astype(np.float64)
    return np.require(array, array.dtype.newbyteorder("="), ["C", "W"])


def _no_array(data: Any) -> str:
    """Why something is no data, and what to pass instead."""
    name = type(data).__name__
    said = f"visibles must be a tensor or an array, got {name}"
    if isinstance(data, (str, bytes)) or hasattr(data, "__fspath__"):
        return (
            f"{said}; read files with `bilevel.methods.data.images.load_images` or "
            "`bilevel.methods.data.tables.load_table`, and pass the `train` part of what they return"
        )
    if isinstance(data, (DataLoader, Dataset)):
        loader = isinstance(data, DataLoader)
        source: Any = cast(Any, data).dataset if loader else data
        rows = "data.dataset" if loader else "data"
        if not (isinstance(source, Sized) and len(source) and hasattr(source, "__getitem__")):
            return (
                f"{said}, whose rows come as a stream; `fit` takes it, and here some of its rows go "
                "into one tensor, such as with `torch.stack`"
            )
        row = source[0]
        first = "row[0]" if isinstance(row, (tuple, list)) else "row"
        return (
            f"{said}; `fit` takes it, and here its rows go into one tensor: pass "
            f"`torch.stack([{first} for row in {rows}])`"
        )
    if isinstance(getattr(data, "train", None), Tensor):
        return f"{said}; pass its training part, `data.train`"
    if isinstance(data, Mapping):
        return f"{said}; pass the entry that holds the visibles"
    return f"{said}; pass rows of numbers, one tensor of shape (n, ...)"

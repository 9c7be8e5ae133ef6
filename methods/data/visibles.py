"""What a model takes for visibles: other containers made tensors, the rest refused with advice."""

import math
from collections.abc import Mapping, Sized
from typing import Any, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bilevel.batches import not_finite

_SLACK = 1e-6  # beyond the range, for numbers that were rounded on their way


class Takes(Protocol):
    """What visibles a model, or a machine, takes.

    Attributes:
        visible_range: smallest and largest value, `None` if unbounded.
        binary: whether they must be exactly 0 or 1.
    """

    visible_range: tuple[float, float] | None
    binary: bool


# ---------------------------------------------------------------------- other containers


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
                f"{said}, whose rows come as a stream; collect those to train on in one tensor, such as "
                "with `torch.stack`"
            )
        row = source[0]
        first = "row[0]" if isinstance(row, (tuple, list)) else "row"
        return (
            f"{said}; a model draws batches of its own from one tensor that holds all rows: pass "
            f"`torch.stack([{first} for row in {rows}])`"
        )
    if isinstance(getattr(data, "train", None), Tensor):
        return f"{said}; pass its training part, `data.train`"
    if isinstance(data, Mapping):
        return f"{said}; pass the entry that holds the visibles"
    return f"{said}; pass rows of numbers, one tensor of shape (n, ...)"


def row_numbers(v: Any, count: int, name: str) -> Tensor:
    """Visibles of an energy that is a table: the numbers of its rows, int64, shape (n,).

    Args:
        v: the visibles.
        count: of the table's rows.
        name: of the energy.

    Raises:
        TypeError: if they are no whole numbers in one dimension.
        ValueError: if there is no such row.
    """
    v = as_tensor(v)
    said = f"the visibles of this `{name}` are whole numbers from 0 to {count - 1}, shape (n,); got"
    if v.is_floating_point() or v.dtype == torch.bool or v.ndim != 1 or len(v) == 0:
        raise TypeError(f"{said} {_name(v.dtype)} of shape {tuple(v.shape)}")
    if int(v.min()) < 0 or int(v.max()) >= count:
        raise ValueError(f"{said} numbers from {int(v.min())} to {int(v.max())}")
    numbers: Tensor = v.long()
    return numbers


def latents(h: Any, width: int, like: Tensor) -> Tensor:
    """Latents of real numbers that were looked at, on the device and in the dtype of `like`.

    Raises:
        TypeError: if they are no tensor.
        ValueError: if they are not of shape (n, width), or not finite.
    """
    rows: Tensor = as_tensor(h).to(like)
    if rows.ndim != 2 or rows.shape[1] != width or len(rows) == 0:
        raise ValueError(f"the latents have shape (n, {width}), got {tuple(rows.shape)}")
    count, which = not_finite(rows)
    if count:
        raise ValueError(f"{count} of {len(rows)} latents hold NaN or infinity ({which})")
    return rows


# ---------------------------------------------------------------------- refusals


def refuse_shape(v: Tensor, wanted: tuple[int, ...] | None) -> None:
    """Refuse visibles of another shape, or none.

    Raises:
        ValueError: with both shapes and how to get from one to the other, if that is known.
    """
    if v.ndim == 0 or len(v) == 0:
        raise ValueError("there are no visibles: the first dimension is 0")
    if v[0].numel() == 0:
        raise ValueError(f"the visibles hold no values: their shape is {tuple(v.shape)}")
    if wanted is not None and tuple(v.shape[1:]) != wanted:
        raise ValueError(
            f"this model takes visibles of shape (n, {', '.join(map(str, wanted))}), "
            f"got {tuple(v.shape)}{_reshaped(tuple(v.shape), wanted)}"
        )


def refuse_holes(v: Tensor, seen: str = "") -> None:
    """Refuse NaN and infinity.

    Raises:
        ValueError: with the number of rows that hold any, and which.
    """
    count, which = not_finite(v)
    if count:
        raise ValueError(f"{count} of {len(v)} visibles hold NaN or infinity{seen} ({which})")


def refuse_values(v: Tensor, model: Takes) -> None:
    """Refuse values outside the range, or not binary where they must be.

    Raises:
        ValueError: with the values and what to do.
    """
    if model.visible_range is None:
        return
    low, high = model.visible_range
    least, most = float(v.min()), float(v.max())
    outside = least < low - _SLACK or most > high + _SLACK
    if model.binary:
        wrong = int(((v != 0) & (v != 1)).sum())
        if wrong:
            place = "in [0, 1] " if outside else ""
            grey = ", or make the model with `grey=True`, which takes greys for probabilities"
            raise ValueError(
                f"this model takes visibles {place}that are exactly 0 or 1, but {wrong} of {v.numel()} "
                f"values are not, which lie from {least:g} to {most:g}; binarise them"
                f"{_cut(least, most)}{'' if outside else grey}"
            )
    elif outside:
        raise ValueError(
            f"this model takes visibles in [{low:g}, {high:g}], got values from {least:g} to "
            f"{most:g}; rescale them{_rescaled(least, most, low, high)}"
        )


def refuse_integers(v: Tensor, model: Takes) -> None:
    """Refuse whole numbers that cannot be meant as they stand; truth values count as 0 and 1.

    They are taken where they are 0 and 1 and the model's visibles lie there, and as rows of a table by
    a model whose visibles are unbounded. Images of whole numbers need a scale.

    Raises:
        TypeError: with a scale that works.
    """
    if model.visible_range is None and v.ndim == 2:
        return
    low, high = model.visible_range or (-1.0, 1.0)
    least, most = float(v.min()), float(v.max())
    if (low, high) == (0, 1) and least >= 0 and most <= 1:
        return
    said = f"whole numbers from {least:g} to {most:g} ({_name(v.dtype)})"
    if model.binary:
        raise TypeError(
            f"this model takes visibles that are exactly 0 or 1, got {said}; binarise them"
            f"{_cut(least, most)}"
        )
    if least >= 0 and (most == 0 or 16 < most < 255):  # bytes, as it seems
        most = 255.0
    raise TypeError(
        f"visibles must be floating point, got {said}; scale them to [{low:g}, {high:g}]"
        f"{_rescaled(least if least < 0 else 0.0, most, low, high)}"
    )


def admitted(data: Any, model: Takes, shape: tuple[int, ...] | None, like: Tensor) -> Tensor:
    """Visibles that were looked at, on the device and in the dtype of `like`.

    It looks at every value, for which a GPU has to wait: it is for what a person asks, not for losses.

    Args:
        data: a tensor, or what `as_tensor` makes one of.
        model: says what values it takes.
        shape: of one visible, `None` if any will do.
        like: a parameter of the model.

    Raises:
        TypeError: if they are no tensor, or whole numbers that need a scale.
        ValueError: if they are empty, of the wrong shape or range, or not finite (by index).
    """
    data = as_tensor(data)
    refuse_shape(data, shape)
    if not data.is_floating_point():
        refuse_integers(data, model)
        whole: Tensor = data.to(like)
        return whole
    refuse_holes(data)
    rows: Tensor = data.to(like)
    if torch.finfo(rows.dtype).max < torch.finfo(data.dtype).max:
        refuse_holes(rows, f" as {_name(rows.dtype)}, which has no room for them")
    refuse_values(rows, model)
    return rows


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _cut(least: float, most: float) -> str:
    """How values are made truth values, as an expression for tensors and arrays."""
    return f", such as with `rows > {(least + most) / 2:.6g}`" if most > least else ""


def _rescaled(least: float, most: float, low: float, high: float) -> str:
    """How values of one range are brought to another, as an expression for tensors and arrays."""
    if most <= least:
        return ""
    width = (most - least) / (high - low)
    shift = least / width - low
    less = f" - {shift:.9g}" if shift > 0 else f" + {-shift:.9g}" if shift < 0 else ""
    return f", such as with `rows / {width:.9g}{less}`"


def _reshaped(shape: tuple[int, ...], wanted: tuple[int, ...]) -> str:
    """How visibles of one shape are made those of another, if that is what they are."""
    own = shape[1:]
    if shape == wanted:
        return "; that is a single one: pass `rows[None]`"
    if len(wanted) == 1 and math.prod(own) == wanted[0]:
        return "; flatten them with `rows.reshape(len(rows), -1)`"
    if len(own) != 3 or len(wanted) != 3:
        return ""
    options = [f"channels={wanted[0]}"] if own[0] != wanted[0] else []
    options += [f"side={wanted[2]}"] if own[1:] != wanted[1:] else []
    return f"; load the images with `{', '.join(options)}`"

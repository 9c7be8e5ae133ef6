"""What visibles a model takes: `Visibles`, a record that admits them or refuses them with advice."""

import math
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from bilevel.batches import indices, not_finite
from bilevel.devices import brought
from bilevel.methods.data.containers import as_tensor
from bilevel.methods.data.images import scaled
from bilevel.refusals import a_tensor, shown

_SLACK = 1e-6  # beyond the range, for numbers that were rounded on their way


@final
@dataclass(frozen=True)
class Visibles:
    """The visibles of a model.

    Attributes:
        shape: of one visible, `None` if any will do.
        range: smallest and largest value, `None` if unbounded.
        binary: whether they must be exactly 0 or 1.
        bits: whether the model's distribution is one of bits; values between stand for probabilities.
        table: of an energy that is a table: how many rows it has; visibles are their numbers.

    Example:
        >>> Visibles((2,), (0, 1), binary=True).admitted([[0, 1]], torch.zeros(1))
        tensor([[0., 1.]])
    """

    shape: tuple[int, ...] | None = None
    range: tuple[float, float] | None = None
    binary: bool = False
    table: int | None = None
    bits: bool = False

    @property
    def real(self) -> bool:
        """Whether the model is a density over real numbers, which has a gradient."""
        return self.table is None and not (self.binary or self.bits)

    def __post_init__(self) -> None:
        if self.shape is not None and not isinstance(self.shape, (tuple, list, torch.Size)):
            raise TypeError(
                f"`visible_shape` must be a tuple such as `(1, 8, 8)`, got {shown(self.shape)}"
            )
        if self.range is not None and (
            not isinstance(self.range, (tuple, list))
            or len(self.range) != 2
            or not self.range[0] < self.range[1]
        ):
            raise ValueError(
                f"`visible_range` must be a smallest and a largest value, got {self.range!r}"
            )

    def admitted(self, data: Any, like: Tensor, numbers: list[int] | None = None) -> Tensor:
        """Visibles that were looked at, on the device and in the dtype of `like`.

        It looks at every value, for which a GPU has to wait: it is for what a person asks, not for
        losses.

        Args:
            data: a tensor, or what `as_tensor` makes one of.
            like: a parameter of the model.
            numbers: of these rows, where they are some of a data set's.

        Raises:
            TypeError: if they are no tensor, or whole numbers that need a scale.
            ValueError: if they are empty, of the wrong shape or range, or not finite (by index).
        """
        data = as_tensor(data)
        if data.is_meta:
            raise ValueError("the visibles are on the meta device, which holds no numbers")
        if self.table is not None:
            return row_numbers(data, self.table).to(like.device)
        refuse_shape(data, self.shape)
        if not data.is_floating_point():
            refuse_integers(data, self)
            whole: Tensor = data.to(like)
            return whole
        refuse_holes(data, numbers=numbers)
        # looked at where they are: a GPU that they go to would have to wait
        rows: Tensor = data.to(like.dtype)
        if torch.finfo(rows.dtype).max < torch.finfo(data.dtype).max:
            narrow = f" as {_name(rows.dtype)}, which has no room for them"
            refuse_holes(rows, narrow, numbers)
        refuse_values(rows, self)
        there: Tensor = brought(rows, like.device)
        return there

    def admitted_bytes(self, data: Any, like: Tensor, numbers: list[int] | None = None) -> Tensor:
        """As `admitted`, but images of bytes stay bytes where the model's values lie in [-1, 1].

        Raises:
            TypeError: as `admitted`.
            ValueError: as `admitted`.
        """
        rows = as_tensor(data)
        images = self.range == (-1, 1) or (self.range is None and rows.ndim == 4)
        if rows.dtype == torch.uint8 and self.table is None and images:
            refuse_shape(rows, self.shape)
            there: Tensor = brought(rows, like.device)
            return there
        return self.admitted(rows, like, numbers)

    def as_numbers(self, rows: Tensor, like: Tensor) -> Tensor:
        """Admitted rows as the networks take them: bytes scaled to [-1, 1], in the dtype of `like`."""
        return rows if self.table is not None else scaled(rows).to(like.dtype)


def row_numbers(v: Any, count: int) -> Tensor:
    """Visibles of an energy that is a table: the numbers of its rows, int64, shape (n,).

    Args:
        v: the visibles.
        count: of the table's rows.

    Raises:
        TypeError: if they are no whole numbers in one dimension.
        ValueError: if there is no such row.
    """
    v = as_tensor(v)
    said = f"the visibles of this model are whole numbers from 0 to {count - 1}, shape (n,); got"
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


def paired(v: Any, h: Any) -> tuple[Tensor, Tensor]:
    """Visibles and latents, if both are tensors, with as many rows.

    Raises:
        TypeError: for arrays and lists: the energy is differentiable, so nothing is converted.
        ValueError: if they differ in their number of rows.
    """
    a_tensor("v", v)
    a_tensor("h", h)
    if v.ndim and h.ndim and len(v) != len(h):
        raise ValueError(f"each visible has one latent, got {len(v)} and {len(h)} rows")
    return v, h


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


def refuse_holes(v: Tensor, seen: str = "", numbers: list[int] | None = None) -> None:
    """Refuse NaN and infinity.

    Args:
        v: the visibles.
        seen: what is to be said of where they were seen.
        numbers: of the rows, if they are not 0, 1, 2 and so on.

    Raises:
        ValueError: with the number of rows that hold any, and which.
    """
    count, which = not_finite(v)
    if count and numbers is not None:
        bad = [not_finite(row[None])[0] > 0 for row in v]
        which = indices(sorted(n for n, wrong in zip(numbers, bad, strict=True) if wrong))
    if count:
        raise ValueError(f"{count} of {len(v)} visibles hold NaN or infinity{seen} ({which})")


def refuse_values(v: Tensor, taken: Visibles) -> None:
    """Refuse values outside the range, or not binary where they must be.

    Raises:
        ValueError: with the values and what to do.
    """
    if taken.range is None:
        return
    low, high = taken.range
    least, most = float(v.min()), float(v.max())
    outside = least < low - _SLACK or most > high + _SLACK
    if taken.binary:
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


def refuse_integers(v: Tensor, taken: Visibles) -> None:
    """Refuse whole numbers that cannot be meant as they stand; truth values count as 0 and 1.

    They are taken where they are 0 and 1 and the model's visibles lie there, and as rows of a table by
    a model whose visibles are unbounded. Images of whole numbers need a scale.

    Raises:
        TypeError: with a scale that works.
    """
    if taken.range is None and v.ndim == 2:
        return
    low, high = taken.range or (-1.0, 1.0)
    least, most = float(v.min()), float(v.max())
    if (low, high) == (0, 1) and least >= 0 and most <= 1:
        return
    said = f"whole numbers from {least:g} to {most:g} ({_name(v.dtype)})"
    if taken.binary:
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

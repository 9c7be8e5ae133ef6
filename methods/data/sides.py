"""Sides of square images that networks halve down to a few pixels."""

from collections.abc import Sequence
from numbers import Integral
from typing import Any, NamedTuple, final

from torch import Tensor

from bilevel.refusals import shown

_LARGEST_BASE = 8


@final
class Scale(NamedTuple):
    """How an image side is halved: `halvings` times, down to `base` pixels."""

    halvings: int
    base: int


def image_shape(shape: Any) -> tuple[int, int, int]:
    """The shape of images, if it is one.

    Raises:
        TypeError: if it is not three whole numbers.

    Example:
        >>> image_shape([1, 8, 8])
        (1, 8, 8)
    """
    several = isinstance(shape, Sequence) and not isinstance(shape, str)
    if not several or not all(isinstance(n, Integral) for n in shape):
        one = shape[0] if isinstance(shape, Tensor) and shape.ndim == 4 and len(shape) else shape
        hint = f"; of these images it is `{tuple(one.shape)}`" if isinstance(one, Tensor) else ""
        raise TypeError(
            f"`shape` must be three whole numbers, (channels, side, side), got {shown(shape)}{hint}"
        )
    if len(shape) != 3:
        raise ValueError(
            f"`shape` must be three whole numbers, (channels, side, side), got {tuple(shape)}"
        )
    channels, height, width = map(int, shape)
    return channels, height, width


def scale_of(shape: tuple[int, int, int]) -> Scale:
    """The halvings of a square image of shape (channels, side, side).

    Raises:
        ValueError: if the shape is not that of a square image, or its side cannot be halved down to
            at most 8 pixels.

    Example:
        >>> scale_of((3, 32, 32)), scale_of((1, 28, 28)), scale_of((1, 8, 8))
        (Scale(halvings=3, base=4), Scale(halvings=2, base=7), Scale(halvings=1, base=4))
    """
    if len(shape) != 3 or shape[1] != shape[2] or min(shape) < 1:
        raise ValueError(
            f"`shape` must be (channels, side, side) of square images, got {tuple(shape)}; crop or "
            "pad the images to a square"
        )
    side, halvings = shape[1], 0
    while side % 2 == 0 and side > 4:
        side, halvings = side // 2, halvings + 1
    if halvings == 0 or side > _LARGEST_BASE:
        raise ValueError(
            f"images of side {shape[1]} cannot be halved down to 4-{_LARGEST_BASE} pixels; pad or "
            "resize them to 8, 16, 28, 32, 64 or 128 pixels"
        )
    return Scale(halvings, side)

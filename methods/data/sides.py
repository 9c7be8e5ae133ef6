"""Sides of square images that networks halve down to a few pixels."""

from typing import NamedTuple, final

_LARGEST_BASE = 8


@final
class Scale(NamedTuple):
    """How an image side is halved: `halvings` times, down to `base` pixels."""

    halvings: int
    base: int


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

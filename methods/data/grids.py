"""Images beside and above each other: the pixels of a grid, before anything is written or shown."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from bilevel.methods.data.images import scaled

_SMALLEST = 48  # pixels of an image's side in a picture, at least
_GAP = 232  # light grey: images on black and on white stand out from it


def grid(images: Tensor, columns: int | None = None, scale: int | None = None) -> NDArray[np.uint8]:
    """Images in rows, left to right and top to bottom, in a frame, shape (height, width, 3).

    Args:
        images: bytes or in [-1, 1], shape (n, 1 or 3, height, width).
        columns: images in a row; as many as make the picture a little wider than high by default.
        scale: whole factor each pixel is enlarged by; small images are made visible by default.

    Raises:
        ValueError: if there are no images, or not of 1 or 3 channels.
    """
    parts = tiles(images, scale)
    columns = columns if columns is not None else math.ceil(math.sqrt(1.6 * len(parts)))
    columns = max(1, min(columns, len(parts)))
    gap = max(2, parts.shape[1] // 16)
    rows = [beside(parts[i : i + columns], gap, columns) for i in range(0, len(parts), columns)]
    return framed(above(rows, gap), gap)


def tiles(images: Tensor, scale: int | None) -> NDArray[np.uint8]:
    """Enlarged images as bytes, shape (n, height, width, 3)."""
    if images.ndim != 4 or len(images) == 0 or images.shape[1] not in (1, 3):
        raise ValueError(
            "a picture is made of images of shape (n, 1 or 3, height, width), n at least 1, "
            f"got {tuple(images.shape)}"
        )
    if scale is None:
        scale = max(1, math.ceil(_SMALLEST / max(images.shape[2:])))
    values = (
        scaled(images).detach().cpu().float().clamp(-1, 1).add(1).mul(127.5).round().byte().numpy()
    )
    values = np.broadcast_to(
        values.transpose(0, 2, 3, 1), (*values.shape[:1], *values.shape[2:], 3)
    )
    return values.repeat(scale, axis=1).repeat(scale, axis=2)


def beside(parts: NDArray[np.uint8], gap: int, columns: int) -> NDArray[np.uint8]:
    """A row, filled up with nothing to `columns` tiles."""
    _, height, width, _ = parts.shape
    row = np.full((height, columns * (width + gap) - gap, 3), _GAP, np.uint8)
    for k, tile in enumerate(parts):
        row[:, k * (width + gap) : k * (width + gap) + width] = tile
    return row


def above(rows: Sequence[NDArray[np.uint8]], gap: int) -> NDArray[np.uint8]:
    """Rows below each other, the first on top."""
    space = np.full((gap, rows[0].shape[1], 3), _GAP, np.uint8)
    return np.concatenate([part for row in rows for part in (row, space)][:-1])


def framed(picture: NDArray[np.uint8], gap: int) -> NDArray[np.uint8]:
    """A picture with an edge around it."""
    return np.pad(picture, ((gap, gap), (gap, gap), (0, 0)), constant_values=_GAP)

"""`show`: images as one picture, for a notebook or to be saved."""

import base64
import io
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bilevel.extras import MISSING
from bilevel.methods.data.containers import as_tensor
from bilevel.methods.data.grids import grid
from bilevel.refusals import whole

if TYPE_CHECKING:
    from PIL.Image import Image

_MOST = 1024  # images in one picture
_FIRST = 64  # of a data set
_SLACK = 1e-3  # beyond the range, for numbers that were rounded on their way


def show(
    images: Any,
    columns: int | None = None,
    *,
    limits: tuple[float, float] | None = None,
    scale: int | None = None,
) -> "Image":
    """Images in rows as one picture, which a notebook shows and `.save("images.png")` writes.

    Args:
        images: a tensor or an array, shape (n, channels, height, width), (n, height, width, channels)
            or (n, height, width), with 1 or 3 channels: bytes, truth values, or floats in [-1, 1] or
            [0, 1]. Floats of which none is negative are taken to lie in [0, 1]. Of `Images` the first 64
            to train on are shown.
        columns: images in a row; as many as make the picture a little wider than high by default.
        limits: values that are black and white, where they are others; what lies beyond is cut off.
        scale: whole factor each pixel is enlarged by; small images are made visible by default.

    Returns:
        A picture of Pillow.

    Raises:
        ValueError: for another shape, more than 1,024 images, values beyond the limits or no numbers.
        TypeError: if they are no images.
        ImportError: if Pillow is not installed.

    Example:
        >>> picture = show(torch.rand(6, 8, 8), columns=3)
        >>> picture.size, picture.mode
        ((156, 105), 'RGB')
    """
    try:
        from PIL import Image
    except ImportError:
        raise ImportError(MISSING.format("Pillow")) from None
    for name, value in (("columns", columns), ("scale", scale)):
        if value is not None:
            whole(name, value)
    train = getattr(images, "train", None)
    rows = as_tensor(train[:_FIRST] if isinstance(train, Tensor) else images)
    pixels = _in_range(_with_channels(rows), limits)
    return Image.fromarray(grid(pixels, columns, scale))


def strip(images: Tensor, columns: int = 16) -> str:
    """The first images as HTML with a picture inside; empty without Pillow, or if they are none."""
    try:
        picture = show(images[:columns], columns)
    except (ImportError, ValueError):
        return ""
    file = io.BytesIO()
    picture.save(file, format="PNG")
    data = base64.b64encode(file.getvalue()).decode()
    alt = f'alt="{min(columns, len(images))} images" style="image-rendering:pixelated"'
    return f'<div><img {alt} src="data:image/png;base64,{data}"></div>'


def _with_channels(images: Tensor) -> Tensor:
    """Images of shape (n, 1 or 3, height, width)."""
    shape = tuple(images.shape)
    if images.ndim == 4 and shape[1] not in (1, 3) and shape[3] in (1, 3):
        images = images.permute(0, 3, 1, 2)
    if images.ndim == 3:
        images = images[:, None]
    if images.ndim == 4 and len(images) and images.shape[1] in (1, 3):
        if len(images) > _MOST:
            raise ValueError(
                f"{len(images):,} images are too many for a picture; show `images[:64]`"
            )
        return images
    raise ValueError(
        "images have shape (n, height, width) or (n, 1 or 3, height, width), n at least 1, "
        f"got {shape}{_advice(shape)}"
    )


def _advice(shape: tuple[int, ...]) -> str:
    """What may have been meant."""
    if len(shape) == 2 and math.isqrt(shape[1]) ** 2 == shape[1] > 1:
        side = math.isqrt(shape[1])
        return f"; rows of pixels become images by `rows.reshape(-1, {side}, {side})`"
    if len(shape) == 2:
        return "; give one image as `image[None]`, and rows of pixels their height and width"
    if len(shape) == 4 and len(shape) and 0 not in shape:
        return "; choose one channel or three, such as `images[:, :1]`"
    return ""


def _in_range(images: Tensor, limits: tuple[float, float] | None) -> Tensor:
    """Images in [-1, 1], or bytes."""
    if limits is None and images.dtype == torch.uint8:
        return images
    values = images.detach().float()
    if not bool(values.isfinite().all()):
        raise ValueError("the images hold NaN or infinity; show those that do not")
    least, most = float(values.min()), float(values.max())
    if limits is None:
        limits = (0.0, 1.0) if least >= 0 else (-1.0, 1.0)
        if least < limits[0] - _SLACK or most > limits[1] + _SLACK:
            raise ValueError(
                f"images are bytes or lie in [0, 1] or [-1, 1], got values from {least:g} to {most:g}; "
                f"say which are black and white, such as `limits=({math.floor(least)}, "
                f"{math.ceil(most)})`"
            )
    low, high = limits
    if not low < high:
        raise ValueError(f"`limits` are two numbers, the smaller first, got {limits!r}")
    return ((values - low) * (2 / (high - low)) - 1).clamp(-1, 1)

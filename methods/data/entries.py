"""One entry of a data set or one batch of a loader: where the visibles are in it, as a tensor."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bilevel.methods.data.containers import as_tensor

KEYS = ("image", "images", "img", "pixel_values", "visibles", "v", "x")
"""What the entry of a mapping that holds the visibles may be called."""

_GREY = ("1", "L", "LA", "La")
_DEEP = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")


def visibles_of(entry: Any) -> Any:
    """The visibles of an entry or a batch: without labels and whatever else comes along.

    Of a tuple or list that is the first part, of a mapping its only entry or the one named by one of
    `KEYS`, of an object with attributes (a batch of a tokenizer, a dataclass) likewise.

    Raises:
        TypeError: if a mapping has none of them, or several.

    Example:
        >>> visibles_of(({"image": 3, "label": 1}, "more"))
        3
    """
    if isinstance(entry, (tuple, list)) and len(entry) and not _is_number(entry[0]):
        return visibles_of(entry[0])
    if not isinstance(entry, Mapping):
        return entry
    found = list(entry) if len(entry) == 1 else [key for key in KEYS if key in entry]
    if len(found) == 1:
        return visibles_of(entry[found[0]])
    names = ", ".join(f"`{key}`" for key in list(entry)[:8])
    if all(_is_number(value) for value in entry.values()):
        raise TypeError(
            f"each column is an entry of its own ({names}); put those to train on into one vector, or "
            "give them as a data frame"
        )
    which = "several could be" if found else "none is known to be"
    raise TypeError(
        f"of the entries {names} {which} the visibles; leave one with a name of {', '.join(KEYS)}, or "
        "one alone"
    )


def row_of(value: Any) -> Tensor:
    """One visible as a tensor; a picture as bytes of shape (channels, height, width).

    Raises:
        TypeError: for what is no number, array or picture, and pictures of more than 8 bits.

    Example:
        >>> row_of(np.zeros((1, 2), np.float32))
        tensor([[0., 0.]])
    """
    if isinstance(value, Tensor):
        return value.detach()
    if callable(getattr(value, "getbands", None)):
        return _picture(value)
    if isinstance(value, (list, tuple)) or callable(getattr(value, "__array__", None)):
        return as_tensor(value)
    if _is_number(value):
        return torch.as_tensor(value)
    raise TypeError(
        f"a row must be a tensor, an array or a picture, or a tuple or a mapping that holds one, got a "
        f"`{type(value).__name__}`"
    )


def listed_shapes(rows: list[Tensor], numbers: list[int] | None) -> str:
    """What to say of rows of different shapes."""
    other = next(i for i, row in enumerate(rows) if row.shape != rows[0].shape)
    first, second = (0, other) if numbers is None else (numbers[0], numbers[other])
    return (
        f"row {first} has the shape {tuple(rows[0].shape)}, row {second} {tuple(rows[other].shape)}; "
        "bring them to one where they are read (for images, `torchvision.transforms.Resize((32, 32))`)"
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, (bool, int, float, np.generic))


def _picture(image: Any) -> Tensor:
    if image.mode in _DEEP:
        raise TypeError(f"a picture has more than 8 bits per pixel (mode {image.mode}); convert it")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        from PIL import Image

        see_through = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image, grey = Image.alpha_composite(white, see_through), image.mode in _GREY
    else:
        grey = image.mode in _GREY
    pixels = np.array(image.convert("L" if grey else "RGB"))
    return torch.from_numpy(pixels).reshape(*pixels.shape[:2], -1).permute(2, 0, 1)

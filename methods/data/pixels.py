"""What is made of pixels before they are a set: layout, levels, crop, size, channels and classes."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

from bilevel.batches import indices
from bilevel.methods.data.sides import scale_of

Array: TypeAlias = NDArray[Any]

_AT_ONCE = 4096  # images worked on together: no step makes a float copy of a whole set
_LIMIT_SEED = 0
_GREY = (0.299, 0.587, 0.114)  # the luma of ITU-R BT.601, which Pillow takes too


@final
@dataclass(frozen=True)
class Frame:
    """How images of any size are brought to one shape.

    The centre is cut out (`crop`). Then, if a `side` is asked for: where the shorter edge is at least
    as long, the centre square is resized to it (bilinear, antialiased); where it is shorter nothing is
    enlarged, and the image is padded with the median colour of its own border. So 28x28 digits become
    32x32 with their strokes as they were, and photographs become small squares.

    Attributes:
        side: height and width to end with; `None` keeps what there is.
        crop: height and width of the centre to cut out; `None` cuts nothing.
        channels: 1 makes colours grey, 3 repeats grey in three channels; `None` keeps them.

    Raises:
        ValueError: if one of them is no such number.
    """

    side: int | None = None
    crop: int | None = None
    channels: int | None = None

    def __post_init__(self) -> None:
        for name, pixels in (("side", self.side), ("crop", self.crop)):
            if pixels is not None and not (isinstance(pixels, int) and pixels >= 1):
                raise ValueError(f"`{name}` is a number of pixels of at least 1, got {pixels!r}")
        if self.channels not in (None, 1, 3):
            raise ValueError(f"`channels` is 1 for grey or 3 for colour, got {self.channels!r}")

    def steps(self, height: int, width: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """What is cut out of an image, and the size this is brought to before any padding.

        Raises:
            ValueError: if `crop` is larger than the image.
        """
        if self.crop is not None and self.crop > min(height, width):
            raise ValueError(
                f"`crop={self.crop}` is larger than an image of {width}x{height} pixels; give a "
                "smaller one, or `side` alone"
            )
        cut = (height, width) if self.crop is None else (self.crop, self.crop)
        if self.side is None:
            return cut, cut
        shorter = min(cut)
        if shorter >= self.side:
            return (shorter, shorter), (self.side, self.side)
        cut = min(cut[0], self.side), min(cut[1], self.side)
        return cut, cut

    def of_file(self, image: Any) -> NDArray[np.uint8]:
        """A Pillow image (mode L or RGB) as bytes of shape (channels, height, width)."""
        cut, size = self.steps(image.height, image.width)
        if cut != (image.height, image.width):
            top, left = _corner((image.height, image.width), cut)
            image = image.crop((left, top, left + cut[1], top + cut[0]))
        if size != cut:
            image = image.resize(size[::-1], 2)  # 2: bilinear, which shrinks with antialiasing
        pixels: NDArray[np.uint8] = np.asarray(image)
        pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
        if self.side is None or size == (self.side, self.side):
            return pixels
        padded: NDArray[np.uint8] = with_border(torch.tensor(pixels)[None], self.side)[0].numpy()
        return padded

    def of_images(self, images: Tensor) -> Tensor:
        """Images of shape (n, channels, height, width), bytes or floats, a piece at a time."""
        cut, size = self.steps(*images.shape[2:])
        top, left = _corner((images.shape[2], images.shape[3]), cut)
        images = images[:, :, top : top + cut[0], left : left + cut[1]]
        if size != cut:
            images = _by_pieces(images, lambda part: _resized(part, size))
        if self.channels not in (None, images.shape[1]):
            images = _by_pieces(images, _coloured if self.channels == 3 else _grey)
        if self.side is not None and size != (self.side, self.side):
            images = with_border(images, self.side)
        return images.contiguous()

    def note(self, sizes: set[tuple[int, int]]) -> str:
        """What was done to images of these heights and widths, in words; nothing if nothing was."""
        several = len(sizes) > 1
        height, width = next(iter(sizes))
        cut, size = self.steps(height, width)
        done = []
        if self.crop is not None:
            done.append(f"cut to the centre's {self.crop}x{self.crop}")
        if self.side is not None and several:
            done.append(f"brought to {self.side}x{self.side}")
        elif self.side is not None:
            if size != cut:
                done.append(f"resized to {self.side}x{self.side}")
            elif size != (self.side, self.side):
                done.append(f"padded to {self.side}x{self.side} with the colour of their border")
        what = "images of several sizes" if several else f"{height}x{width} pixels"
        return f"{what} {', '.join(done)}" if done else ""


@final
@dataclass(frozen=True, eq=False)
class Raw:
    """What a source held.

    Attributes:
        parts: bytes, or floats in [-1, 1], of shape (n, channels, height, width): training and test
            images, or all of them.
        classes: of the images of each part, as numbers from 0, if known.
        notes: what was done to them.
    """

    parts: list[Tensor]
    classes: list[Tensor] | None
    notes: list[str]


def of_arrays(
    arrays: Sequence[Array],
    labels: Sequence[Array] | None,
    name: str,
    frame: Frame,
    limit: int | None,
) -> Raw:
    """Arrays of numbers in any layout and of any range as images.

    Raises:
        ValueError: if they are no images, or the labels do not fit them.
    """
    arrays = [_channels_first(array, name) for array in arrays]
    shapes = {array.shape[1:] for array in arrays}
    if len(shapes) > 1:
        raise ValueError(f"training and test images differ in shape: {sorted(shapes)}")
    classes = None if labels is None else coded(labels, [len(array) for array in arrays], name)
    parts, levels = _levels(arrays)
    ((channels, height, width),) = shapes
    if limit is not None:
        rows = [torch.from_numpy(chosen(len(part), limit)) for part in parts]
        parts = [part[those] for part, those in zip(parts, rows, strict=True)]
        if classes is not None:
            classes = [part[those] for part, those in zip(classes, rows, strict=True)]
    notes = [levels, frame.note({(height, width)})]
    if frame.channels is not None and frame.channels != channels:
        notes.append("grey repeated in 3 channels" if channels == 1 else "colours made grey")
    return Raw([frame.of_images(part) for part in parts], classes, notes)


def coded(labels: Sequence[Array], lengths: Sequence[int], name: str) -> list[Tensor]:
    """Labels of any kind as numbers from 0, the same ones in all parts.

    Raises:
        ValueError: if there is not one label per image.
    """
    for those, length in zip(labels, lengths, strict=True):
        if those.shape != (length,):
            raise ValueError(
                f"`{name}` has {length} images but labels of shape {those.shape}; "
                "give one label per image"
            )
    _, codes = np.unique(np.concatenate(labels), return_inverse=True)
    return list(torch.from_numpy(codes.astype(np.int64)).split(list(lengths)))


def chosen(count: int, limit: int | None) -> NDArray[np.int64]:
    """The rows that `limit` leaves of so many, always the same ones, in their order."""
    if limit is None or limit >= count:
        return np.arange(count)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(_LIMIT_SEED))
    rows: NDArray[np.int64] = order[:limit].sort().values.numpy()
    return rows


def squared(parts: list[Tensor]) -> tuple[list[Tensor], str]:
    """Square images of a side the networks accept, and what that took."""
    channels, height, width = parts[0].shape[1:]
    side = max(height, width)
    while not _acceptable(channels, side):
        side += 1
    if (height, width) == (side, side):
        return parts, ""
    note = f"{height}x{width} pixels padded to {side}x{side} with the colour of their border"
    return [with_border(part, side) for part in parts], note


def with_border(images: Tensor, side: int) -> Tensor:
    """Images padded to a square, each with the median colour of its own outermost pixels."""
    n, channels, height, width = images.shape
    rows, columns = images[:, :, [0, -1], :], images[:, :, :, [0, -1]]
    border = torch.cat([rows.flatten(2), columns.flatten(2)], dim=2)
    colours = border.median(dim=2).values[:, :, None, None]
    padded = colours.expand(n, channels, side, side).clone(memory_format=torch.contiguous_format)
    top, left = (side - height) // 2, (side - width) // 2
    padded[:, :, top : top + height, left : left + width] = images
    return padded


def _acceptable(channels: int, side: int) -> bool:
    try:
        scale_of((channels, side, side))
    except ValueError:
        if side > 1024:
            raise
        return False
    return True


def _corner(whole: tuple[int, int], part: tuple[int, int]) -> tuple[int, int]:
    """Top and left of what is cut from the middle, halves rounded to even as torchvision does."""
    return round((whole[0] - part[0]) / 2), round((whole[1] - part[1]) / 2)


def _by_pieces(images: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """A change of each image; the whole set exists once as it was and once as it becomes."""
    changed, start = None, 0
    for part in images.split(_AT_ONCE):
        new = change(part)
        if changed is None:
            changed = new.new_empty((len(images), *new.shape[1:]))
        changed[start : start + len(part)] = new
        start += len(part)
    assert changed is not None
    return changed


def _resized(images: Tensor, size: tuple[int, int]) -> Tensor:
    return interpolate(images, size, mode="bilinear", antialias=True, align_corners=False)


def _coloured(images: Tensor) -> Tensor:
    return images.expand(-1, 3, -1, -1)


def _grey(images: Tensor) -> Tensor:
    weights = torch.tensor(_GREY, device=images.device).view(1, 3, 1, 1)
    grey = (images * weights).sum(dim=1, keepdim=True)
    return grey.round().to(torch.uint8) if images.dtype == torch.uint8 else grey.clamp(-1, 1)


# ---------------------------------------------------------------------- arrays


def _channels_first(array: Array, name: str) -> Array:
    """Numbers of shape (n, c, h, w), or an error."""
    if array.dtype.kind not in "biufc":  # timedelta64 is a subtype of the integers
        raise ValueError(
            f"the images of `{name}` are of type `{array.dtype}`; save numbers, as one array "
            "of one shape"
        )
    if np.issubdtype(array.dtype, np.complexfloating):
        raise ValueError(f"the images of `{name}` are complex; save their real part")
    if array.size == 0:
        raise ValueError(f"`{name}` holds no images: its shape is {array.shape}")
    if array.ndim == 3:
        return array[:, None]
    if array.ndim == 4 and array.shape[3] in (1, 3):
        return array.transpose(0, 3, 1, 2)
    if array.ndim == 4 and array.shape[1] in (1, 3):
        return array
    raise ValueError(
        f"the images of `{name}` have shape {array.shape}; expected (n, height, width) or that with "
        "1 or 3 channels; reshape the array"
    )


def _levels(arrays: Sequence[Array]) -> tuple[list[Tensor], str]:
    """All parts by one rule, and the rule: bytes stay bytes, the rest becomes floats in [-1, 1]."""
    least = min(float(a.min()) for a in arrays)
    most = max(float(a.max()) for a in arrays)
    if all(np.issubdtype(a.dtype, np.floating) for a in arrays):
        for array in arrays:
            _refuse_holes(array)
        low, high = (0, 1) if least >= 0 else (-1, 1)
        if least < low - 1e-6 or most > high + 1e-6:
            raise ValueError(
                "images of floating-point numbers must lie in [-1, 1] or [0, 1], got values from "
                f"{least:g} to {most:g}; rescale them"
            )
        numbers = f"[{low}, {high}]"
    else:
        low, high = 0, next((top for top in (1, 16, 255) if most <= top), 0)
        if least < 0 or high == 0:
            raise ValueError(
                f"images of whole numbers must lie in 0..255, got {least:g} to {most:g}; rescale them"
            )
        numbers = f"0..{high}"
    if high == 255:
        return [bytes_of(array) for array in arrays], "values 0..255 kept as bytes"
    tensors = [torch.from_numpy(np.array(a, dtype=np.float32, order="C")) for a in arrays]
    if (low, high) == (-1, 1):
        return [t.clamp_(-1, 1) for t in tensors], "values in [-1, 1] kept"
    scale, shift = 2 / (high - low), -1 - 2 * low / (high - low)
    in_range = [t.mul_(scale).add_(shift).clamp_(-1, 1) for t in tensors]
    return in_range, f"values {numbers} scaled to [-1, 1]"


def bytes_of(array: Array) -> Tensor:
    """An array of values 0..255 as a tensor of bytes, not copied where it is one already."""
    return torch.from_numpy(np.require(array, np.uint8, ["C", "W"]))


def _refuse_holes(array: Array) -> None:
    # in numpy: torch takes neither every byte order nor every width
    whole = [np.isfinite(part).reshape(len(part), -1).min(axis=1) for part in _pieces(array)]
    bad = np.flatnonzero(~np.concatenate(whole)).tolist()
    if bad:
        raise ValueError(
            f"{len(bad)} of {len(array)} images hold NaN or infinity ({indices(bad)}); drop "
            "or repair them"
        )


def _pieces(array: Array) -> Iterator[Array]:
    yield from (array[start : start + _AT_ONCE] for start in range(0, len(array), _AT_ONCE))

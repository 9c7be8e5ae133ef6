"""Image data: the embedded digits, `.npz` files and folders of images, and sets that are none of them.

Whatever the source, images come out as float32 of shape (n, channels, side, side) in [-1, 1], split
into a training and a test part, with a note that says what was done to them.
"""

import difflib
import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from bilevel.batches import indices
from bilevel.methods.folders import read_folder
from bilevel.methods.networks import scale_of

Array: TypeAlias = NDArray[Any]

NAMES = ("digits",)
_TEST_SHARE = 0.2
_SPLIT_SEED = 0
_ARRAYS = (("train_images", "test_images"), ("tra_images", "tes_images"), ("images", None))


@dataclass(frozen=True, eq=False)
class Images:
    """A set of images, split.

    Attributes:
        name: short name: "digits", or that of the file or folder.
        source: what `load_images` can be called with again: a name or an absolute path.
        train: training images in [-1, 1], float32, shape (n, channels, side, side).
        test: held-out images, likewise.
        train_labels: classes of the training images, int64, if known.
        test_labels: classes of the test images, if known.
        note: how the values were scaled, the images padded and the set split.
    """

    name: str
    source: str
    train: Tensor
    test: Tensor
    train_labels: Tensor | None
    test_labels: Tensor | None
    note: str

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, side, side) of one image."""
        _, channels, height, width = self.train.shape
        return channels, height, width


def load_images(source: str | os.PathLike[str]) -> Images:
    """Images by name, from an `.npz` file or from a folder.

    Args:
        source: one of
            "digits": scikit-learn's 1,797 digits of 8x8 pixels;
            an `.npz` file with `train_images` and `test_images`, or `tra_images` and `tes_images`
            (and `..._labels`), or `images` alone; shape (n, height, width), with 1 or 3 channels in
            front of these two or behind them; integers 0..255, 0..16 or 0..1, floats in [-1, 1] or
            [0, 1];
            a folder of PNG or JPEG files of one size, searched recursively. Sub-folders `train` and
            `test` are the split; folders within are the classes.
            Without a split of their own, 20% of the images are held out, always the same ones.

    Returns:
        The images. If they are not square, or of a side the networks cannot halve, they are padded
        with the colour of their border, and the note says so.

    Raises:
        ValueError: if the name is unknown, or what is there cannot be read as images.
        FileNotFoundError: if there is no such file or folder.
        ImportError: if a folder is to be read and Pillow is missing.

    Example:
        >>> images = load_images("digits")
        >>> images.train.shape, images.test.shape, images.note
        (torch.Size([1438, 1, 8, 8]), torch.Size([359, 1, 8, 8]),
        'values 0..16 scaled to [-1, 1]; 20% of the images held out')
    """
    text, path = os.fspath(source), Path(source).expanduser()
    if text == "digits":
        return _digits()
    if path.is_dir():
        parts, labels = read_folder(path)
        return _images(path.resolve().name, str(path.resolve()), parts, labels)
    if path.is_file():
        if path.suffix.lower() != ".npz":
            hint = (
                "unpack it and give the folder" if path.suffix.lower() == ".zip" else "convert it"
            )
            raise ValueError(f"`{source}` is neither an `.npz` file nor a folder of images; {hint}")
        parts, labels = _read_npz(path)
        return _images(path.stem, str(path.resolve()), parts, labels)
    raise unknown_source(text, path, NAMES, "of an `.npz` file or of a folder of images")


def scaled(images: Tensor) -> Tensor:
    """Images in [-1, 1]: bytes b become b / 127.5 - 1, float32; others are returned as they are.

    Example:
        >>> scaled(torch.tensor([0, 51, 255], dtype=torch.uint8))
        tensor([-1.0000, -0.6000,  1.0000])
    """
    return images.float().div_(127.5).sub_(1) if images.dtype == torch.uint8 else images


def unknown_source(text: str, path: Path, names: Sequence[str], elsewhere: str) -> Exception:
    """What to raise for data that are not there, naming the nearest that are.

    Args:
        text: what was asked for.
        path: the same as a path.
        names: of the data sets known by name.
        elsewhere: what else may be given the path of, "of a ...".
    """
    if path.parent == Path() and not path.suffix:
        close = difflib.get_close_matches(text, names, n=1)
        known = ", ".join(f"`{name}`" for name in names)
        hint = f"did you mean `{close[0]}`?" if close else f"known by name: {known}."
        return ValueError(
            f"there is no data set `{text}`; {hint} Other data are given by the path {elsewhere}"
        )
    near = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, near, n=1)
    hint = f"; did you mean `{path.parent / close[0]}`?" if close else "; check the path"
    return FileNotFoundError(f"there is no file or folder `{text}`{hint}")


def shuffled_pixels(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image with its pixels in a random order of its own: same values, no structure."""
    n, channels = images.shape[:2]
    images = scaled(images)
    flat = images.flatten(2)
    order = torch.rand(n, 1, flat.shape[2], generator=generator).argsort(dim=2)
    return flat.gather(2, order.to(images.device).expand(-1, channels, -1)).view_as(images)


def inverted(images: Tensor) -> Tensor:
    """The negatives: same structure, values of the opposite sign."""
    return -scaled(images)


def uniform_noise(images: Tensor, generator: torch.Generator) -> Tensor:
    """Pixels drawn from U[-1, 1], in the shape of `images`."""
    return torch.rand(images.shape, generator=generator).to(scaled(images[:1])) * 2 - 1


def constant_images(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images of one colour each, drawn from U[-1, 1] by channel, in the shape of `images`."""
    colours = torch.rand(*images.shape[:2], 1, 1, generator=generator).to(scaled(images[:1]))
    return (colours * 2 - 1).expand(images.shape).contiguous()


def _digits() -> Images:
    from sklearn.datasets import load_digits  # half a second that a path does not need

    digits = load_digits()
    return _images("digits", "digits", [digits.images.astype(np.uint8)], [digits.target])


# ---------------------------------------------------------------------- arrays in a file


def open_npz(path: Path) -> np.lib.npyio.NpzFile:
    """An archive of arrays, opened; to be closed by the caller, read with `read_array`.

    Raises:
        ValueError: if the file cannot be read, or holds a single array without a name.
    """
    try:
        file = np.load(path, allow_pickle=False)
    except (zipfile.BadZipFile, OSError, EOFError, ValueError) as error:
        reason = "it is no archive of arrays" if "pickle" in str(error) else str(error)
        raise ValueError(f"`{path}` cannot be read as an `.npz` file: {reason}") from None
    if not isinstance(file, np.lib.npyio.NpzFile):
        raise ValueError(
            f"`{path}` holds a single array; save it by name, `np.savez(path, images=...)`"
        )
    return file


def read_array(path: Path, file: np.lib.npyio.NpzFile, name: str) -> Array:
    """The array `name` of an open archive.

    Raises:
        ValueError: if it is an object array, or the archive is damaged.
    """
    try:
        array: Array = file[name]
    except ValueError:  # numpy refuses to unpickle
        raise ValueError(
            f"`{name}` in `{path}` is an object array; save numbers, as one array of one shape"
        ) from None
    except (zipfile.BadZipFile, OSError, EOFError) as error:
        raise ValueError(f"`{name}` in `{path}` cannot be read: {error}") from None
    return array


def _read_npz(path: Path) -> tuple[list[Array], list[Array] | None]:
    """One or two arrays of images, and as many of labels if there are any."""
    with open_npz(path) as file:
        names = list(file.files)
        train, test = next((pair for pair in _ARRAYS if pair[0] in names), (None, None))
        if train is None:
            raise ValueError(
                f"`{path}` holds no `train_images`, `tra_images` or `images`, but "
                f"{', '.join(f'`{name}`' for name in names[:8]) or 'nothing'}; rename the array"
            )
        wanted = [train, *([test] if test in names else [])]
        parts = [read_array(path, file, name) for name in wanted]
        known = [name.replace("images", "labels") for name in wanted]
        if not all(name in names for name in known):
            return parts, None
        return parts, [read_array(path, file, name) for name in known]


# ---------------------------------------------------------------------- from arrays to images


def _images(
    name: str, source: str, arrays: Sequence[Array], labels: Sequence[Array] | None
) -> Images:
    parts, scaling = _scaled([_channels_first(array, name) for array in arrays])
    parts, padding = _padded(parts)
    classes = _classes(parts, labels, name) if labels is not None else None
    if len(parts) == 2:
        split = "the set's own split"
    else:
        parts, classes, split = _split(parts[0], None if classes is None else classes[0], name)
    train_labels, test_labels = classes if classes is not None else (None, None)
    note = "; ".join(part for part in (scaling, padding, split) if part)
    return Images(name, source, parts[0], parts[1], train_labels, test_labels, note)


def _channels_first(array: Array, name: str) -> Array:
    """Numbers of shape (n, c, h, w), or an error."""
    if array.dtype == object or not (
        np.issubdtype(array.dtype, np.number) or array.dtype == np.bool_
    ):
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


def _scaled(arrays: list[Array]) -> tuple[list[Tensor], str]:
    """All parts in [-1, 1] by one rule, and the rule."""
    least = min(float(a.min()) for a in arrays)
    most = max(float(a.max()) for a in arrays)
    if all(np.issubdtype(a.dtype, np.floating) for a in arrays):
        for array in arrays:
            # in numpy: torch takes neither every byte order nor every width
            bad = np.flatnonzero(~np.isfinite(array).reshape(len(array), -1).all(axis=1)).tolist()
            if bad:
                raise ValueError(
                    f"{len(bad)} of {len(array)} images hold NaN or infinity ({indices(bad)}); drop "
                    "or repair them"
                )
        low, high = (0, 1) if least >= 0 else (-1, 1)
        if least < low - 1e-6 or most > high + 1e-6:
            raise ValueError(
                "images of floating-point numbers must lie in [-1, 1] or [0, 1], got values from "
                f"{least:g} to {most:g}; rescale them"
            )
        numbers = f"[{low}, {high}]"
    else:
        high = next((top for top in (1, 16, 255) if most <= top), 0)
        if least < 0 or high == 0:
            raise ValueError(
                f"images of whole numbers must lie in 0..255, got {least:g} to {most:g}; rescale them"
            )
        low, numbers = 0, f"0..{high}"
    scale, shift = 2 / (high - low), -1 - 2 * low / (high - low)
    tensors = [torch.from_numpy(np.array(a, dtype=np.float32)) for a in arrays]
    if (low, high) == (-1, 1):
        return [t.clamp_(-1, 1) for t in tensors], "values in [-1, 1] kept"
    return [
        t.mul_(scale).add_(shift).clamp_(-1, 1) for t in tensors
    ], f"values {numbers} scaled to [-1, 1]"


def _padded(parts: list[Tensor]) -> tuple[list[Tensor], str]:
    """Square images of a side the networks accept, and what that took."""
    shapes = {tuple(part.shape[1:]) for part in parts}
    if len(shapes) > 1:
        raise ValueError(f"training and test images differ in shape: {sorted(shapes)}")
    ((channels, height, width),) = shapes
    side = max(height, width)
    while not _acceptable(channels, side):
        side += 1
    if (height, width) == (side, side):
        return parts, ""
    top, left = (side - height) // 2, (side - width) // 2
    sides = (left, side - width - left, top, side - height - top)
    colour = _border(parts[0])
    padded = [pad(part - colour, sides) + colour for part in parts]
    note = f"{height}x{width} pixels padded to {side}x{side} with the border's median colour"
    return padded, note


def _acceptable(channels: int, side: int) -> bool:
    try:
        scale_of((channels, side, side))
    except ValueError:
        if side > 1024:
            raise
        return False
    return True


def _border(images: Tensor) -> Tensor:
    """Median of the outermost pixels by channel, shape (1, c, 1, 1)."""
    rows, columns = images[:1000, :, [0, -1], :], images[:1000, :, :, [0, -1]]
    pixels = torch.cat([rows.flatten(2), columns.flatten(2)], dim=2).transpose(0, 1).flatten(1)
    return pixels.median(dim=1).values.view(1, -1, 1, 1)


def _classes(parts: list[Tensor], labels: Sequence[Array], name: str) -> list[Tensor]:
    """Labels of any kind as numbers from 0, the same ones in all parts."""
    for part, those in zip(parts, labels, strict=True):
        if those.shape != (len(part),):
            raise ValueError(
                f"`{name}` has {len(part)} images but labels of shape {those.shape}; "
                "give one label per image"
            )
    _, codes = np.unique(np.concatenate(labels), return_inverse=True)
    sizes = [len(those) for those in labels]
    return list(torch.from_numpy(codes.astype(np.int64)).split(sizes))


def _split(
    images: Tensor, labels: Tensor | None, name: str
) -> tuple[list[Tensor], list[Tensor] | None, str]:
    if len(images) < 2:
        raise ValueError(f"`{name}` holds one image; at least two are needed, one to test on")
    generator = torch.Generator().manual_seed(_SPLIT_SEED)
    order = torch.randperm(len(images), generator=generator)
    held = max(1, int(_TEST_SHARE * len(images)))
    rows = [order[held:], order[:held]]
    classes = None if labels is None else [labels[those] for those in rows]
    return [images[those] for those in rows], classes, "20% of the images held out"

"""Image data: sets known by name, `.npz` files, folders and archives, and images that are none of it.

Whatever the source, images come out as one tensor of shape (n, channels, side, side) per part, training
and test, with a note that says what was done to them. Values 0..255 stay bytes, a quarter of the memory
of floats, and models scale a batch at a time; others are float32 in [-1, 1].
"""

import difflib
import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from bilevel.arguments import explained
from bilevel.cards import Card
from bilevel.files import regular
from bilevel.methods.data import published
from bilevel.methods.data.folders import read_files
from bilevel.methods.data.limits import GIGABYTES, refuse_array, told
from bilevel.methods.data.pixels import Array, Frame, Raw, of_arrays, squared
from bilevel.refusals import flag, path_of, positive, shown
from bilevel.reporting import Report, silent

NAMES = ("digits", *published.PUBLISHED_SETS)
_TEST_SHARE = 0.2
_SPLIT_SEED = 0
_ARRAYS = (("train_images", "test_images"), ("tra_images", "tes_images"), ("images", None))


@final
@dataclass(frozen=True, eq=False)
class Images:
    """A set of images, split.

    Attributes:
        name: short name: "digits", or that of the file or folder.
        source: what `load_images` can be called with again: a name or an absolute path.
        train: training images, shape (n, channels, side, side): bytes (uint8) where the source has
            values 0..255, float32 in [-1, 1] otherwise; `scaled` makes either floats.
        test: held-out images, likewise.
        train_labels: classes of the training images, int64, if known.
        test_labels: classes of the test images, if known.
        note: how the values were scaled, the images brought to size and the set split.
        options: the other arguments `load_images` was called with, to load the same images again.
    """

    name: str
    source: str
    train: Tensor
    test: Tensor
    train_labels: Tensor | None
    test_labels: Tensor | None
    note: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, side, side) of one image."""
        _, channels, height, width = self.train.shape
        return channels, height, width

    def __repr__(self) -> str:
        return str(self._card())

    def _repr_html_(self) -> str:
        from bilevel.methods.data.showing import strip  # it imports this module

        return self._card(strip(self.train)).html()

    def _card(self, picture: str = "") -> Card:
        whole = self.train.dtype == torch.uint8
        values = "bytes" if whole else f"{str(self.train.dtype).removeprefix('torch.')} in [-1, 1]"
        rows = [
            ("train", f"{len(self.train):,} images {self.shape}, {values}"),
            ("test", f"{len(self.test):,} images"),
        ]
        if self.train_labels is not None:
            rows.append(("classes", str(len(self.train_labels.unique()))))
        return Card(f"Images `{self.name}`", [*rows, ("note", self.note)], picture)


@explained
def load_images(
    source: str | os.PathLike[str],
    *,
    side: int | None = None,
    crop: int | None = None,
    channels: int | None = None,
    skip_unreadable: bool = False,
    limit: int | None = None,
    max_gigabytes: float = GIGABYTES,
    report: Report = silent,
) -> Images:
    """Images by name, from an `.npz` file, a folder or a zip archive.

    Args:
        source: one of
            "digits": scikit-learn's 1,797 digits of 8x8 pixels;
            "mnist", "fashion-mnist", "cifar10", "svhn", "celeba32", "celeba64", "celeba128": downloaded
            once, see `bilevel.methods.data.published`;
            an `.npz` file with `train_images` and `test_images`, or `tra_images` and `tes_images`
            (and `..._labels`), or `images` alone; shape (n, height, width), with 1 or 3 channels in
            front of these two or behind them; integers 0..255, 0..16 or 0..1, floats in [-1, 1] or
            [0, 1];
            a folder or a zip archive (which is read as it is) of PNG, JPEG, WebP or BMP files,
            searched recursively. Sub-folders `train` and `test` are the split, or archives of that
            name side by side; folders within are the classes.
            Without a split of their own, 20% of the images are held out, always the same ones.
        side: height and width to bring the images to: larger ones lose what is outside their centre
            square and are resized, smaller ones are padded with the median colour of their border.
        crop: height and width of the centre to cut out first.
        channels: 1 makes colours grey, 3 repeats grey in three channels.
        skip_unreadable: leave out files that cannot be read, instead of refusing the first of them.
        limit: most images to take of each part, always the same ones.
        max_gigabytes: most memory that the images may take; what a file promises beyond is refused
            before it is read.
        report: told how far it is.

    Returns:
        The images. Without `side`, those that are not square or of a side the networks cannot halve
        are padded too, and the note says so.

    Raises:
        ValueError: if the name is unknown, an option makes no sense, or what is there cannot be read as
            images of one size.
        FileNotFoundError: if there is no such file or folder, or a download is not possible.
        ImportError: if files are to be read and Pillow is missing, or a published set and torchvision.

    Example:
        >>> images = load_images("digits")
        >>> images.train.shape, images.test.shape, images.note
        (torch.Size([1438, 1, 8, 8]), torch.Size([359, 1, 8, 8]),
        'values 0..16 scaled to [-1, 1]; 20% of the images held out')
        >>> load_images("digits", side=16, limit=10).train.shape
        torch.Size([8, 1, 16, 16])
    """
    options: dict[str, Any] = {"side": side, "crop": crop, "channels": channels, "limit": limit}
    options = {name: value for name, value in options.items() if value is not None}
    options |= {"skip_unreadable": True} if skip_unreadable else {}
    options |= {"max_gigabytes": max_gigabytes} if max_gigabytes != GIGABYTES else {}
    positive("max_gigabytes", max_gigabytes)
    flag("skip_unreadable", skip_unreadable)
    if limit is not None and not isinstance(limit, Integral):
        raise TypeError(f"`limit` must be a whole number, got {shown(limit)}")
    if limit is not None and not limit >= 1:
        raise ValueError(f"`limit` is a number of images of at least 1, got {limit!r}")
    given = path_of("source", source)
    frame = Frame(side, crop, channels)
    text, path = os.fspath(source), given.expanduser()
    report(f"reading {text}", 0, 0)
    if text in NAMES:
        raw = _digits(frame, limit) if text == "digits" else published.read(text, frame, limit)
        return _assembled(text, text, options, raw, fits=side is not None)
    if not path.exists():
        raise unknown_source(
            text, path, NAMES, "of an `.npz` file, or of a folder or zip archive of images"
        )
    if path.is_dir() or path.suffix.lower() == ".zip":
        raw = read_files(
            path,
            frame,
            skip_unreadable=skip_unreadable,
            limit=limit,
            gigabytes=max_gigabytes,
            report=report,
        )
    elif path.suffix.lower() == ".npz":
        arrays, labels = _read_npz(path, max_gigabytes)
        raw = of_arrays(arrays, labels, path.stem, frame, limit)
    else:
        raise ValueError(
            f"`{source}` is neither an `.npz` file nor a folder or zip archive of images; convert it"
        )
    name = path.resolve().name if path.is_dir() else path.stem
    return _assembled(name, str(path.resolve()), options, raw, fits=side is not None)


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
    if path.is_symlink():
        return FileNotFoundError(f"`{text}` is a link that leads nowhere; mend or remove it")
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


def _digits(frame: Frame, limit: int | None) -> Raw:
    from sklearn.datasets import load_digits  # half a second that a path does not need

    digits = load_digits()
    return of_arrays([digits.images.astype(np.uint8)], [digits.target], "digits", frame, limit)


# ---------------------------------------------------------------------- arrays in a file


def open_npz(path: Path) -> np.lib.npyio.NpzFile:
    """An archive of arrays, opened; to be closed by the caller, read with `read_array`.

    Raises:
        ValueError: if the file cannot be read, or holds a single array without a name.
    """
    regular(path)
    try:
        if zipfile.is_zipfile(path):
            zipfile.ZipFile(path).close()  # numpy leaves open what zipfile refuses
        file = np.load(path, allow_pickle=False)
    except Exception as error:  # zipfile and numpy raise a dozen kinds
        reason = "it is no archive of arrays" if "pickle" in str(error) else str(error)
        raise ValueError(f"`{path}` cannot be read as an `.npz` file: {reason}") from None
    if not isinstance(file, np.lib.npyio.NpzFile):
        raise ValueError(
            f"`{path}` holds a single array; save it by name, `np.savez(path, images=...)`"
        )
    return file


def read_array(
    path: Path, file: np.lib.npyio.NpzFile, name: str, gigabytes: float = GIGABYTES
) -> Array:
    """The array `name` of an open archive.

    Raises:
        ValueError: if it is no plain array, too large, or the archive is damaged or encrypted.
    """
    try:
        assert file.zip is not None  # it is open
        refuse_array(path, file.zip, name, gigabytes)
        array: Array = file[name]
    except Exception as error:  # of the header, of unpacking, of a codec that is not there
        if isinstance(error, ValueError) and str(error).startswith(f"`{name}` in "):
            raise
        raise ValueError(f"`{name}` in `{path}` cannot be read: {told(error)}") from None
    return array


def _read_npz(path: Path, gigabytes: float) -> tuple[list[Array], list[Array] | None]:
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
        parts = [read_array(path, file, name, gigabytes) for name in wanted]
        known = [name.replace("images", "labels") for name in wanted]
        if not all(name in names for name in known):
            return parts, None
        return parts, [read_array(path, file, name, gigabytes) for name in known]


# ---------------------------------------------------------------------- from parts to images


def _assembled(name: str, source: str, options: dict[str, Any], raw: Raw, *, fits: bool) -> Images:
    """Two parts of square images: padded to a side the networks accept if none was asked for."""
    parts, padding = (raw.parts, "") if fits else squared(raw.parts)
    classes, split = raw.classes, "the set's own split"
    if len(parts) == 1:
        parts, classes, split = _split(parts[0], None if classes is None else classes[0], name)
    train_labels, test_labels = classes if classes is not None else (None, None)
    note = "; ".join(part for part in (*raw.notes, padding, split) if part)
    return Images(name, source, parts[0], parts[1], train_labels, test_labels, note, options)


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

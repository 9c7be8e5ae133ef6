"""Files of images, in a folder or a zip archive: decoded by threads, one array for the whole set."""

import os
import re
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray

from bilevel.files import amount, read_bytes, regular
from bilevel.methods.data.limits import FILE, FOLDERS, GIGABYTES, refuse_large, told
from bilevel.methods.data.pixels import Array, Frame, Raw, chosen, coded
from bilevel.reporting import Report, silent

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_GREY = {"1", "L", "LA"}
_DEEP = {"I", "F", "I;16", "I;16L", "I;16B", "I;16N"}
_SEE_THROUGH = {"RGBA", "RGBa", "LA", "La", "PA"}
_ORIENTATION = 274  # the EXIF tag
_TOGETHER = 32  # files a thread takes at a time: handing over one by one costs as much as decoding
_AHEAD = 32  # how often, before the pixels are written to their place


@final
@dataclass(frozen=True)
class Store:
    """The images of a folder or of an archive.

    Attributes:
        path: of the folder or archive.
        names: of the image files within, with slashes, sorted.
        read: the content of a file by its name; may be called by several threads.
    """

    path: Path
    names: list[str]
    read: Callable[[str], bytes]


@contextmanager
def opened(path: Path) -> Iterator[Store]:
    """A folder, or a zip archive that is read without being unpacked; hidden files are left out.

    Raises:
        ValueError: if it holds no images, or is no archive.
    """
    if path.is_dir():
        names = sorted(_files(path))
        yield Store(path, _images_among(names, path), lambda name: read_bytes(path / name, FILE))
        return
    regular(path)
    try:
        archive = zipfile.ZipFile(path)
    except Exception as error:  # an unknown version and names that are no text too
        raise ValueError(f"`{path}` cannot be read as a zip archive: {error}") from None
    with archive:
        names = [entry for entry in archive.namelist() if not entry.endswith("/")]
        _refuse_names(names, path)
        yield Store(path, _images_among(names, path), lambda name: _unpacked(archive, name))


def _files(top: Path) -> Iterator[str]:
    """The files below a folder, links followed.

    A link to a folder that it lies in shows nothing new and would never end: it is not followed.

    Raises:
        OSError: if a folder cannot be read.
        ValueError: if there are more folders than anybody has: links to each other, in layers.
    """
    above = {os.fspath(top): {_identity(top)}}
    for count, (folder, inner, files) in enumerate(os.walk(top, True, _refuse, followlinks=True)):
        if count > FOLDERS:
            raise ValueError(
                f"`{top}` holds more than {FOLDERS:,} folders; look at the links in it"
            )
        mine = above.pop(folder)
        kept = {name: _identity(Path(folder, name)) for name in inner}
        inner[:] = [name for name in inner if kept[name] not in mine]
        above |= {os.path.join(folder, name): mine | {kept[name]} for name in inner}
        yield from ((Path(folder) / file).relative_to(top).as_posix() for file in files)


def _identity(folder: Path) -> tuple[int, int]:
    found = folder.stat()
    return found.st_dev, found.st_ino


def _refuse(error: OSError) -> None:
    raise error


def _refuse_names(names: Sequence[str], path: Path) -> None:
    """Refuse an archive whose names lead out of it, or are there twice."""
    for name in names:
        if name.startswith(("/", "\\")) or ".." in name.split("/") or name[1:3] == ":\\":
            raise ValueError(f"`{path}` holds `{name}`, a name that leads out of it; pack it anew")
    if len(set(names)) < len(names):
        twice = next(name for name, count in Counter(names).items() if count > 1)
        raise ValueError(f"`{path}` holds `{twice}` twice; pack it anew")


def _unpacked(archive: zipfile.ZipFile, name: str) -> bytes:
    """The content of an entry.

    Raises:
        ValueError: if it is larger than a file of an image is.
    """
    size = archive.getinfo(name).file_size
    if size > FILE:
        raise ValueError(f"it holds {amount(size)}, and an image at most {amount(FILE)}")
    return archive.read(name)


def read_files(
    path: Path,
    frame: Frame,
    *,
    skip_unreadable: bool,
    limit: int | None,
    gigabytes: float = GIGABYTES,
    report: Report = silent,
) -> Raw:
    """The images of a folder or zip archive as bytes, and their classes.

    Args:
        path: of the folder, searched recursively, or of the archive; a single folder that everything
            lies in does not count. Sub-folders `train` and `test` are two parts, anything else is
            one; where there is `train` alone, and beside it a folder or archive of the same name with
            `test` in place of `train`, that is the other part. The folders of a part, if there is
            more than one, are its classes.
        frame: what each image is brought to.
        skip_unreadable: leave out what cannot be read, and count it in the notes.
        limit: most images of a part.
        gigabytes: most memory that a part may take.
        report: told how far it is.

    Raises:
        ValueError: if there are no images, too many, one cannot be read or they differ in size.
        ImportError: if Pillow is not installed.
    """
    with opened(path) as store:
        rooms = _rooms(store)
        beside = _sibling(path)
        if set(rooms) == {"train"} and beside is not None:
            with opened(beside) as other:
                theirs = _rooms(other)
                if "test" in theirs:
                    parts = [(store, rooms["train"]), (other, theirs["test"])]
                    raw = _decoded(parts, Reading(frame, skip_unreadable, gigabytes, report), limit)
                    return Raw(
                        raw.parts, raw.classes, [*raw.notes, f"test images of `{beside.name}`"]
                    )
        rooms_in_order = [rooms[part] for part in ("train", "test") if part in rooms]
        two = rooms_in_order if len(rooms_in_order) == 2 else [store.names]
        reading = Reading(frame, skip_unreadable, gigabytes, report)
        return _decoded([(store, names) for names in two], reading, limit)


def _decoded(
    parts: Sequence[tuple[Store, list[str]]], reading: "Reading", limit: int | None
) -> Raw:
    """Each part decoded, its classes told by its folders."""
    folders = [_classes(names) for _, names in parts]
    known = all(len(those) for those in folders)
    lengths = [len(names) for _, names in parts]
    classes = coded(folders, lengths, str(parts[0][0].path)) if known else None
    arrays, kept = [], []
    for store, names in parts:
        rows = chosen(len(names), limit)
        array, which = reading.decode(store, [names[row] for row in rows])
        arrays.append(array)
        kept.append(torch.from_numpy(rows[which]))
    if classes is not None:
        classes = [part[rows] for part, rows in zip(classes, kept, strict=True)]
    return Raw([torch.from_numpy(a) for a in reading.alike(arrays)], classes, reading.notes())


@final
class Reading:
    """The decoding of one set: what its images have in common, and what could not be read.

    Args:
        frame: what each image is brought to.
        skip_unreadable: count images that cannot be read, instead of refusing them by name.
        gigabytes: most memory of a part.
        report: told how far it is.
    """

    def __init__(
        self,
        frame: Frame,
        skip_unreadable: bool,
        gigabytes: float = GIGABYTES,
        report: Report = silent,
    ) -> None:
        self._report = report
        self._gigabytes = gigabytes
        self._frame = frame
        self._skip = skip_unreadable
        self._pillow, self._ops = _pillow()
        self._sizes: set[tuple[int, int]] = set()
        self._first: tuple[Path, tuple[int, ...]] | None = None
        self._skipped: list[str] = []
        self._moving: list[str] = []
        self._turned: list[str] = []
        self._transparent: list[str] = []

    def decode(
        self, store: Store, names: Sequence[str]
    ) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Files as bytes of shape (n, 1 or 3, height, width), and which of them these are.

        Each image is written into its place as it comes: nothing is held twice.

        Raises:
            ValueError: if an image cannot be read or differs from the first one in size.
        """
        array: NDArray[np.uint8] | None = None
        kept: list[int] = []
        for index, (name, pixels) in enumerate(zip(names, self._stream(store, names), strict=True)):
            self._report(f"reading images in {store.path.name}", index, len(names))
            if isinstance(pixels, str):
                self._unreadable(store, name, pixels)
                continue
            self._refuse_other_size(store, name, pixels.shape[1:])
            if array is None:
                size = len(names) * pixels.size
                refuse_large(size, self._gigabytes, f"the {len(names):,} images in `{store.path}`")
                array = np.empty((len(names), *pixels.shape), np.uint8)
            elif len(pixels) > array.shape[1]:  # the first colours after greys
                array = np.repeat(array, 3, axis=1)
            array[len(kept)] = pixels  # greys among colours are repeated
            kept.append(index)
        if array is None:
            raise ValueError(f"none of the {len(names)} images in `{store.path}` can be read")
        return array[: len(kept)], np.array(kept)

    def alike(self, arrays: list[NDArray[np.uint8]]) -> list[NDArray[np.uint8]]:
        """The parts with as many channels as the one with the most."""
        channels = max(array.shape[1] for array in arrays)
        return [a if a.shape[1] == channels else np.repeat(a, channels, axis=1) for a in arrays]

    def notes(self) -> list[str]:
        """What was done, and how many files were skipped."""
        notes = ["values 0..255 kept as bytes", self._frame.note(self._sizes)]
        if self._frame.channels is not None:
            notes.append("all made grey" if self._frame.channels == 1 else "greys as colours")
        for names, what in (
            (self._turned, "turned as their EXIF data say"),
            (self._transparent, "with transparent pixels, laid on white"),
            (self._moving, "of several frames, of which the first was taken"),
        ):
            if names:
                notes.append(f"{len(names)} {what}")
        if self._skipped:
            count, first = len(self._skipped), self._skipped[0]
            files = "file that cannot be read" if count == 1 else "files that cannot be read"
            notes.append(f"{count} {files} skipped, the first `{first}`")
        return notes

    def _stream(self, store: Store, names: Sequence[str]) -> Iterator[NDArray[np.uint8] | str]:
        """What comes of each file, in order; the threads are never far ahead."""

        def several(start: int) -> list[NDArray[np.uint8] | str]:
            return [self._attempt(store, name) for name in names[start : start + _TOGETHER]]

        with warnings.catch_warnings(), ThreadPoolExecutor(_threads()) as pool:
            warnings.simplefilter("ignore")  # of odd metadata; the pixels are what counts
            starts = range(0, len(names), _TOGETHER)
            for first in range(0, len(starts), _AHEAD):
                yield from chain.from_iterable(pool.map(several, starts[first : first + _AHEAD]))

    def _attempt(self, store: Store, name: str) -> NDArray[np.uint8] | str:
        """The pixels of a file, or why there are none."""
        try:
            with self._pillow.open(BytesIO(store.read(name))) as image:
                if image.mode in _DEEP:
                    return f"it has more than 8 bits per pixel (mode {image.mode})"
                opaque = self._opaque(image, name)
        except Exception as error:  # decoders and archives raise two dozen kinds
            reason = re.split(r" '| <", told(error))[0]
            return reason or type(error).__name__
        self._sizes.add((opaque.height, opaque.width))
        try:
            return self._frame.of_file(opaque)
        except ValueError as error:
            raise ValueError(f"`{store.path / name}`: {error}") from None

    def _opaque(self, image: Any, name: str) -> Any:
        """The picture as it is seen: turned as its EXIF data say, on white where it is transparent."""
        if getattr(image, "n_frames", 1) > 1:
            self._moving.append(name)
        is_grey = image.mode in _GREY
        grey = is_grey if self._frame.channels is None else self._frame.channels == 1
        if image.getexif().get(_ORIENTATION, 1) != 1:
            image = self._ops.exif_transpose(image)
            self._turned.append(name)
        if image.mode in _SEE_THROUGH or "transparency" in image.info:
            image = image.convert("RGBA")
            if image.getextrema()[3][0] < 255:
                self._transparent.append(name)
                white = self._pillow.new("RGBA", image.size, "white")
                image = self._pillow.alpha_composite(white, image)
        return image.convert("L" if grey else "RGB")

    def _unreadable(self, store: Store, name: str, reason: str) -> None:
        if not self._skip:
            raise ValueError(
                f"`{store.path / name}` cannot be read as an image: {reason}; remove or convert it, or "
                "leave out what cannot be read with `skip_unreadable=True`"
            )
        self._skipped.append(name)

    def _refuse_other_size(self, store: Store, name: str, size: tuple[int, ...]) -> None:
        if self._first is None:
            self._first = store.path / name, size
        first, expected = self._first
        if size != expected:
            raise ValueError(
                f"the images differ in size: `{first}` is {expected[1]}x{expected[0]} pixels, "
                f"`{store.path / name}` {size[1]}x{size[0]}; bring them to one with `side=32`, or "
                "another side"
            )


def _pillow() -> tuple[ModuleType, ModuleType]:
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise ImportError(
            "reading files of images needs Pillow; install it with `pip install 'bilevel[report]'`"
        ) from None
    return Image, ImageOps


def _threads() -> int:
    return min(16, os.cpu_count() or 1)


# ---------------------------------------------------------------------- names


def _images_among(names: list[str], path: Path) -> list[str]:
    shown = [
        name
        for name in names
        if not any(part.startswith((".", "__MACOSX")) for part in name.split("/"))
    ]
    images = sorted(name for name in shown if name.lower().endswith(_SUFFIXES))
    if not images:
        raise ValueError(
            f"`{path}` holds no PNG or JPEG image (nor WebP or BMP) among its {len(shown)} files; "
            "convert them, or save the images as an array in an `.npz` file"
        )
    return images


def _rooms(store: Store) -> dict[str, list[str]]:
    """Names by the first folder that tells any apart: `train` and `test` at best, "" for none."""
    depth = 0
    while True:
        rooms: dict[str, list[str]] = {}
        for name in store.names:
            folders = name.split("/")[:-1]
            rooms.setdefault(folders[depth] if depth < len(folders) else "", []).append(name)
        only = next(iter(rooms))
        if len(rooms) > 1 or only in ("", "train", "test"):
            return rooms
        depth += 1


def _sibling(path: Path) -> Path | None:
    """What lies beside `path` under its name with `test` in place of `train`."""
    if "train" not in path.name:
        return None
    beside = path.with_name("test".join(path.name.rsplit("train", 1)))
    return beside if beside.exists() else None


def _classes(names: list[str]) -> Array:
    """The first folders in which the files differ; nothing if some file lies in none."""
    parents = [name.split("/")[:-1] for name in names]
    for level in range(min(map(len, parents))):
        kinds = [parent[level] for parent in parents]
        if len(set(kinds)) > 1:
            return np.array(kinds)
    return np.array([])

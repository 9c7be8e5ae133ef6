"""Folders of images: files to arrays, sub-folders to split and classes."""

import warnings
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_SUFFIXES = {".png", ".jpg", ".jpeg"}
_GREY = {"1", "L", "LA"}
_DEEP = {"I", "F", "I;16", "I;16L", "I;16B", "I;16N"}


def read_folder(folder: Path) -> tuple[list[NDArray[Any]], list[NDArray[Any]] | None]:
    """The images of a folder as arrays of bytes, and their classes.

    Args:
        folder: searched recursively for PNG and JPEG files; hidden ones are left out. Sub-folders
            `train` and `test` are two parts, anything else is one. The folders of a part, if there
            is more than one, are its classes.

    Returns:
        One array per part, shape (n, height, width) if all files are grey and (n, height, width, 3)
        otherwise; and the names of the classes per part, or `None` without folders.

    Raises:
        ValueError: if there are no images, one cannot be read or they differ in size.
        ImportError: if Pillow is not installed.
    """
    own_split = (folder / "train").is_dir() and (folder / "test").is_dir()
    rooms = [folder / "train", folder / "test"] if own_split else [folder]
    files = [_files(room) for room in rooms]
    parts = [[_read(path) for path in those] for those in files]
    _refuse_mixed_sizes(list(zip(chain(*files), chain(*parts), strict=True)))
    colour = any(image.ndim == 3 for part in parts for image in part)
    if colour:
        parts = [[_coloured(image) for image in part] for part in parts]
    arrays = [np.stack(part) for part in parts]
    classes = [_classes(room, those) for room, those in zip(rooms, files, strict=True)]
    return arrays, None if any(len(names) == 0 for names in classes) else classes


def _classes(room: Path, files: list[Path]) -> NDArray[Any]:
    """The first folders in which the files differ; nothing if some file lies in none."""
    parents = [path.relative_to(room).parts[:-1] for path in files]
    for level in range(min(map(len, parents))):
        names = [parent[level] for parent in parents]
        if len(set(names)) > 1:
            return np.array(names)
    return np.array([])


def _files(folder: Path) -> list[Path]:
    def shown(path: Path) -> bool:
        return not any(part.startswith(".") for part in path.relative_to(folder).parts)

    files = sorted(path for path in folder.rglob("*") if path.is_file() and shown(path))
    images = [path for path in files if path.suffix.lower() in _SUFFIXES]
    if not images:
        raise ValueError(
            f"`{folder}` holds no PNG or JPEG image among its {len(files)} files; convert them, or "
            "save the images as an array in an `.npz` file"
        )
    return images


def _read(path: Path) -> NDArray[np.uint8]:
    try:
        from PIL import Image
    except ImportError:
        raise ImportError(
            "reading a folder of images needs Pillow; install it with `pip install 'bilevel[report]'`"
        ) from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata; the pixels are what counts
            with Image.open(path) as image:
                if image.mode in _DEEP:
                    raise ValueError(f"it has more than 8 bits per pixel (mode {image.mode})")
                return np.asarray(image.convert("L" if image.mode in _GREY else "RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = str(error).split(" '")[0] or type(error).__name__
        raise ValueError(
            f"`{path}` cannot be read as an image: {reason}; remove or convert it"
        ) from None


def _coloured(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return image if image.ndim == 3 else np.repeat(image[:, :, None], 3, axis=2)


def _refuse_mixed_sizes(images: list[tuple[Path, NDArray[np.uint8]]]) -> None:
    first, image = images[0]
    size = image.shape[:2]
    others = [(path, other.shape[:2]) for path, other in images if other.shape[:2] != size]
    if others:
        path, other = others[0]
        raise ValueError(
            f"the images differ in size: `{first}` is {size[1]}x{size[0]} pixels, `{path}` "
            f"{other[1]}x{other[0]}; resize or crop them all to one square size, such as 32x32"
        )

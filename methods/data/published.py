"""Published image sets by name, read through torchvision and downloaded once.

| name | images | split | files, where a download is impossible |
| --- | --- | --- | --- |
| `mnist` | grey, 28x28 | 60,000 / 10,000 | four `.gz` files in `MNIST/raw` |
| `fashion-mnist` | grey, 28x28 | 60,000 / 10,000 | four `.gz` files in `FashionMNIST/raw` |
| `cifar10` | colour, 32x32 | 50,000 / 10,000 | `cifar-10-python.tar.gz` |
| `svhn` | colour, 32x32 | 73,257 / 26,032 | `train_32x32.mat`, `test_32x32.mat` |
| `celeba32`, `celeba64`, `celeba128` | colour | 50,000 / 1,000 | `celeba/img_align_celeba.zip` |

All of it lies in one folder: `~/.cache/bilevel`, or what the environment variable `BILEVEL_CACHE` names
(a folder that torchvision has downloaded to before will do).

CelebA is cut and split as BiDVL's official code does: the centre's 160x160 pixels, resized to the side
in the name, then 50,000 training and 1,000 test images drawn at random from all 202,599. The draw there
depends on the run's seed; here it is always the same one.

References:
    MNIST (LeCun, Cortes, Burges, 1998); Fashion-MNIST (Xiao, Rasul, Vollgraf, 2017),
    https://arxiv.org/abs/1708.07747; Learning multiple layers of features from tiny images
    (Krizhevsky, 2009); Reading digits in natural images with unsupervised feature learning (Netzer et
    al., 2011); Deep learning face attributes in the wild (Liu, Luo, Wang, Tang, 2015),
    https://arxiv.org/abs/1411.7766; Bi-level doubly variational learning for energy-based latent
    variable models (Kan et al., 2022), https://arxiv.org/abs/2203.14702. Differs from BiDVL in: the
    draw of CelebA's split has its own seed.
"""

import importlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

import numpy as np
import torch

from bilevel.methods.data.folders import Reading, opened
from bilevel.methods.data.pixels import Frame, Raw, chosen, of_arrays

_GZ = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
FACES = (50_000, 1_000)
"""Training and test images drawn from CelebA."""

_FACES_CROP = 160
_SPLIT_SEED = 0
_INSTALL = "`pip install 'bilevel[images]'`"


@final
@dataclass(frozen=True)
class _Set:
    """A class of torchvision.datasets, its arguments for the two parts, and the files it takes."""

    reader: str
    parts: tuple[Mapping[str, Any], Mapping[str, Any]]
    labels: str
    files: tuple[str, ...]


def _idx(reader: str) -> _Set:
    files = tuple(f"{reader}/raw/{name}-ubyte.gz" for name in _GZ)
    return _Set(reader, ({"train": True}, {"train": False}), "targets", files)


_SETS = {
    "mnist": _idx("MNIST"),
    "fashion-mnist": _idx("FashionMNIST"),
    "cifar10": _Set(
        "CIFAR10", ({"train": True}, {"train": False}), "targets", ("cifar-10-python.tar.gz",)
    ),
    "svhn": _Set(
        "SVHN",
        ({"split": "train"}, {"split": "test"}),
        "labels",
        ("train_32x32.mat", "test_32x32.mat"),
    ),
}
_FACES = {f"celeba{side}": side for side in (32, 64, 128)}
PUBLISHED_SETS = (*_SETS, *_FACES)


def cache_folder() -> Path:
    """Where published sets are kept: `BILEVEL_CACHE`, or `~/.cache/bilevel`."""
    return Path(os.environ.get("BILEVEL_CACHE") or "~/.cache/bilevel").expanduser()


def read(name: str, frame: Frame, limit: int | None, *, faces: tuple[int, int] = FACES) -> Raw:
    """A published set, downloaded if it is not in the cache folder.

    Args:
        name: one of `PUBLISHED_SETS`.
        frame: what each image is brought to; faces are cut to 160x160 if it does not say otherwise.
        limit: most images of a part.
        faces: how many training and test images are drawn from CelebA.

    Raises:
        ImportError: if torchvision is missing or broken.
        FileNotFoundError: if the set is not there and cannot be downloaded, naming the files to place.
        ValueError: if a side is asked for that the name contradicts, or the set is not whole.
    """
    if name in _FACES:
        return _faces(name, frame, limit, faces)
    known = _SETS[name]
    arrays, labels = [], []
    for part in known.parts:
        held = _downloaded(name, known.reader, part, known.files)
        arrays.append(np.asarray(held.data))
        labels.append(np.asarray(getattr(held, known.labels)))
    return of_arrays(arrays, labels, name, frame, limit)


def _faces(name: str, frame: Frame, limit: int | None, count: tuple[int, int]) -> Raw:
    side = _FACES[name]
    if frame.side not in (None, side):
        raise ValueError(
            f"`{name}` says how large the images are; leave `side={frame.side}` out, or choose one of "
            f"{', '.join(f'`{other}`' for other in _FACES)}"
        )
    frame = replace(frame, side=side, crop=frame.crop if frame.crop is not None else _FACES_CROP)
    archive = cache_folder() / "celeba" / "img_align_celeba.zip"
    unpacked = archive.with_suffix("")
    if not archive.exists() and not unpacked.exists():
        _downloaded(name, "CelebA", {"split": "all"}, ("celeba/img_align_celeba.zip",))
    reading = Reading(frame, skip_unreadable=False)
    with opened(archive if archive.exists() else unpacked) as store:
        if len(store.names) < sum(count):
            raise ValueError(
                f"`{store.path}` holds {len(store.names):,} images, fewer than the "
                f"{sum(count):,} that are used; it is not whole: delete it and try again"
            )
        generator = torch.Generator().manual_seed(_SPLIT_SEED)
        order = torch.randperm(len(store.names), generator=generator).numpy()
        first, second = count
        parts = []
        for rows in (order[:first], order[first : first + second]):
            some = rows[chosen(len(rows), limit)]
            array, _ = reading.decode(store, [store.names[row] for row in some])
            parts.append(torch.from_numpy(array))
    drawn = f"{first:,} training and {second:,} test images drawn with seed {_SPLIT_SEED}"
    return Raw(parts, None, [*reading.notes(), drawn])


def _downloaded(name: str, reader: str, part: Mapping[str, Any], files: tuple[str, ...]) -> Any:
    """A set as torchvision holds it, taken from the cache folder or downloaded to it."""
    folder = cache_folder()
    make = getattr(_torchvision_datasets(name), reader)
    try:
        return make(root=str(folder), download=True, **part)
    except (OSError, RuntimeError, ImportError, EOFError) as error:
        where = ", ".join(f"`{folder / file}`" for file in files)
        raise FileNotFoundError(
            f"`{name}` is not in `{folder}` and cannot be downloaded ({_first_line(error)}); fetch it "
            f"elsewhere and place it as {where}, or name another folder by `BILEVEL_CACHE`"
        ) from None


def _torchvision_datasets(name: str) -> Any:
    try:
        return importlib.import_module("torchvision.datasets")
    except Exception as error:  # a build for another torch fails in more ways than an ImportError
        absent = error.name if isinstance(error, ModuleNotFoundError) else None
        missing = absent in ("torchvision", "torchvision.datasets")
        problem = (
            f"which is not installed; install it with {_INSTALL}"
            if missing
            else f"which does not load with torch {torch.__version__} ({_first_line(error)}); install "
            "builds that belong together with `pip install --force-reinstall torch 'bilevel[images]'`"
        )
        raise ImportError(
            f"`{name}` is read by torchvision, {problem}, or give the images as a folder, a zip archive "
            "or an `.npz` file"
        ) from None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

"""Tables: the rows a restricted or deep Boltzmann machine is trained on, split, from one entry point.

Digits as AdvIL prepares them, densities on the plane with known entropy, binary tables and faces from
`.npz` files, and tables of one's own: arrays in `.npz` files, CSV and Parquet files. A row is a vector;
what is split is split before anything is augmented or scaled.
"""

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import final

import numpy as np
import torch
from numpy.lib.npyio import NpzFile
from torch import Tensor
from torch.nn.functional import pad

from bilevel.arguments import explained
from bilevel.cards import Card
from bilevel.methods.data.densities import DENSITIES, Density2D, density
from bilevel.methods.data.images import open_npz, read_array, unknown_source
from bilevel.methods.data.own_tables import READERS, Split, own_rows, read_rows
from bilevel.methods.data.pixels import Array
from bilevel.refusals import SEEDS, flag, path_of, shown, whole

TABLES = ("digits", *DENSITIES)
_ROWS = 50_000
_HELD_ROWS = 10_000
_SPLITS = ("train", "valid", "test")
_OF_ROWS = ("test", "holdout", "standardised")  # options of rows that are not split yet
_FACES = (1400, 300, 265)  # the 1,965 Frey faces as BiSM splits them


@final
@dataclass(frozen=True, eq=False)
class Table:
    """Rows, split.

    Attributes:
        name: short name: "digits", that of a density, of a table in a file or of the file.
        source: what `load_table` can be called with again: a name, an absolute path or `PATH:NAME`.
        train: training rows, float32, shape (n, d).
        valid: rows to select models and steps on, `None` if there are none.
        test: rows to report on and never to select on.
        binary: whether every value is exactly 0 or 1.
        note: how the rows were split, augmented and scaled, and what is missing.
        density: where the rows are drawn from, if that is known; its `entropy` bounds every
            log-likelihood.
    """

    name: str
    source: str
    train: Tensor
    valid: Tensor | None
    test: Tensor
    binary: bool
    note: str
    density: Density2D | None = None

    def __repr__(self) -> str:
        return str(self._card())

    def _repr_html_(self) -> str:
        return self._card().html()

    def _card(self) -> Card:
        parts = {"train": self.train, "valid": self.valid, "test": self.test}
        rows = [
            (name, "none" if part is None else f"{len(part):,} rows of {part.shape[1]:,}")
            for name, part in parts.items()
        ]
        rows.append(("values", "each 0 or 1" if self.binary else "real numbers"))
        if self.density is not None:
            rows.append(("entropy", f"{self.density.entropy:.4f} nats"))
        return Card(f"Table `{self.name}`", [*rows, ("note", self.note)])


@explained
def load_table(
    source: str | os.PathLike[str],
    *,
    seed: int = 0,
    size: int | None = None,
    holdout: float = 0.0,
    standardised: bool = False,
    test: float | None = None,
    columns: Sequence[str] | None = None,
) -> Table:
    """A table by name or from a file.

    Args:
        source: one of
            "digits": scikit-learn's 1,797 digits of 8x8 pixels as in AdvIL: 20% of the images held
            out, then each part joined by its images shifted by one pixel to the four sides, 7,185
            and 1,800 rows; each pixel scaled to [0, 1) by (x - min) / (max + 1e-4) with the range it
            has in the training part; not binarised;
            the name of a density, one of `bilevel.methods.data.densities.DENSITIES`: 50,000 training,
            10,000 validation and 10,000 test points;
            `PATH.npz:NAME`: a binary table, the arrays `NAME_train`, `NAME_valid` and `NAME_test` of
            that file, shape (n, d). If one of train and test is missing, valid takes its place, and
            the note says so;
            `PATH.npz` with an array `images` of bytes, shape (n, height, width): split by order as
            1400/300/265 (BiSM's Frey faces), pixels divided by 255;
            `PATH.npz:NAME`, an array NAME of numbers, or `PATH.csv` or `PATH.parquet`, whose first line
            names the columns: rows of one's own, shape (n, d), binary if all values are 0 or 1, real
            otherwise; shuffled and split;
            `PATH.npz` with arrays `train`, `test` and perhaps `valid`: such rows that are split.
        seed: of all that is drawn: points of a density, the images of `holdout`, the noise of
            `standardised`, the order of one's own rows.
        size: number of training points of a density; validation and test points do not depend on it.
        holdout: share of the training rows to set aside as `valid`: of the digits, before they are
            shifted, or of one's own rows. Train shrinks by as much; test stays as it is.
        standardised: give each column of one's own rows mean 0 and standard deviation 1 on the training
            rows. For `images`, instead of the division: add uniform noise of one grey level, then do so
            (AdvIL's Frey faces).
        test: share of one's own rows to test on, 0.2 by default.
        columns: columns of a CSV or Parquet file to take, all by default.

    Returns:
        The table.

    Raises:
        ValueError: if the name is unknown, an option means nothing for this source, or what is there is
            no such table: wrong shapes, values that are not 0 or 1, objects, NaN.
        FileNotFoundError: if there is no such file.
        ImportError: for CSV and Parquet files, if pandas is missing.

    Example:
        >>> table = load_table("digits")
        >>> table.train.shape, table.test.shape, table.valid is None
        (torch.Size([7185, 64]), torch.Size([1800, 64]), True)
        >>> board = load_table("checkerboard", size=100)
        >>> board.train.shape, board.density
        (torch.Size([100, 2]), UniformSquares(name='checkerboard', side=0.5))

    References:
        To Relieve Your Headache of Training an MRF, Take AdVIL (Li, Du, Xu, Welling, Zhu, Zhang,
        2020), https://arxiv.org/abs/1901.08400; Bi-level Score Matching for Learning Energy-based
        Latent Variable Models (Bao, Li, Xu, Su, Zhu, Zhang, 2020), https://arxiv.org/abs/2010.07856.
        Differs from the papers in: AdvIL's code validates on the test digits, here `holdout` sets
        training images aside for that; of BiSM's two-dimensional data only the checkerboard is the
        same, the others are densities of known entropy in place of scikit-learn's generators.
    """
    text = os.fspath(path_of("source", source) if not isinstance(source, str) else source)
    seed = whole("seed", seed, *SEEDS)
    if not isinstance(holdout, Real) or isinstance(holdout, bool):
        raise TypeError(f"`holdout` must be a share, such as 0.1, got {shown(holdout)}")
    flag("standardised", standardised)
    if size is not None and not isinstance(size, Integral):
        raise TypeError(f"`size` must be a whole number, got {shown(size)}")
    given = {
        "size": size is not None,
        "holdout": holdout != 0,
        "standardised": standardised,
        "test": test is not None,
        "columns": columns is not None,
    }
    split = Split(0.2 if test is None else test, holdout, standardised, seed)
    if text == "digits":
        _refuse_others(text, given, "holdout")
        return _digits(holdout, seed)
    if text in DENSITIES:
        _refuse_others(text, given, "size")
        return _points(density(text), _ROWS if size is None else size, seed)
    head, _, name = text.rpartition(":")
    is_named = head.lower().endswith(".npz")
    path = Path(head if is_named else text).expanduser()
    shape = (
        "of an `.npz` file, as `PATH.npz:NAME` for a table in it, or of a `.csv` or `.parquet` file"
    )
    if not path.exists():
        raise unknown_source(str(path), path, TABLES, shape)
    if not path.is_dir() and path.suffix.lower() in READERS:
        _refuse_others(text, given, *_OF_ROWS, "columns")
        path = path.resolve()
        return Table(path.stem, str(path), *own_rows(f"`{path}`", read_rows(path, columns), split))
    if path.is_dir() or path.suffix.lower() != ".npz":
        raise ValueError(f"`{path}` is no `.npz` file; give the path {shape}")
    path, name = path.resolve(), name if is_named else ""
    with open_npz(path) as file:
        if "images" in file.files and name in ("", "images"):
            _refuse_others(text, given, "standardised")
            return _faces(path, read_array(path, file, "images"), seed if standardised else None)
        if name in file.files:
            _refuse_others(text, given, *_OF_ROWS)
            rows = own_rows(f"`{name}` in `{path}`", read_array(path, file, name), split)
            return Table(name, f"{path}:{name}", *rows)
        if not name and {"train", "test"} <= set(file.files):
            _refuse_others(text, given, "standardised")
            parts = {part: read_array(path, file, part) for part in _SPLITS if part in file.files}
            return Table(path.stem, str(path), *own_rows(f"`{path}`", parts, split))
        _refuse_others(text, given)
        return _binary(path, file, name)


def _refuse_others(text: str, given: Mapping[str, bool], *meant: str) -> None:
    for option, is_given in given.items():
        if is_given and option not in meant:
            hint = f"; what it takes is {', '.join(f'`{each}`' for each in meant)}" if meant else ""
            raise ValueError(f"`{option}` means nothing for `{text}`, leave it out{hint}")


# ---------------------------------------------------------------------- by name


def _digits(holdout: float, seed: int) -> Table:
    from sklearn.datasets import load_digits  # half a second that a path does not need
    from sklearn.model_selection import train_test_split

    parts = train_test_split(load_digits().images, test_size=0.2, random_state=0)
    train, test = (torch.from_numpy(part).float() for part in parts)
    # The range of all training images, so that test rows are the same whatever is set aside.
    shifted = _with_shifts(train)
    low, high = shifted.amin(dim=0), shifted.amax(dim=0)

    def rows(images: Tensor) -> Tensor:
        return (_with_shifts(images) - low) / (high + 1e-4)

    note = (
        "20% of the images held out for test; each image and its four one-pixel shifts; each pixel "
        "scaled to [0, 1) by its range in training"
    )
    if not holdout:
        return Table("digits", "digits", rows(train), None, rows(test), False, note)
    held = round(holdout * len(train)) if 0 < holdout < 1 else 0
    if not 0 < held < len(train):
        raise ValueError(
            f"`holdout` is a share of the {len(train)} training images, between 0 and 1, that leaves "
            f"some on either side; got {holdout}"
        )
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    note += f"; {held} training images set aside for validation before the shifts"
    kept, aside = rows(train[order[held:]]), rows(train[order[:held]])
    return Table("digits", "digits", kept, aside, rows(test), False, note)


def _with_shifts(images: Tensor) -> Tensor:
    """The images, then all of them one pixel left, right, up and down; shape (5 n, h w)."""
    height, width = images.shape[1:]
    padded = pad(images, (1, 1, 1, 1))
    corners = ((1, 1), (1, 2), (1, 0), (2, 1), (0, 1))
    shifts = [padded[:, y : y + height, x : x + width].flatten(1) for y, x in corners]
    return torch.cat(shifts)


def _points(truth: Density2D, size: int, seed: int) -> Table:
    if size < 1:
        raise ValueError(f"`size` must be at least 1, got {size}")
    generator = torch.Generator().manual_seed(seed)
    # Training points come last, so that the others stay when `size` changes.
    test, valid, train = (truth.sample(n, generator) for n in (_HELD_ROWS, _HELD_ROWS, size))
    note = f"drawn with seed {seed} from a density of entropy {truth.entropy:.4f} nats"
    return Table(truth.name, truth.name, train, valid, test, False, note, truth)


# ---------------------------------------------------------------------- from a file


def _faces(path: Path, images: Array, noise_seed: int | None) -> Table:
    """Rows of bytes, split by order; standardised if there is a seed for the noise."""
    if images.dtype != np.uint8 or images.ndim != 3:
        raise ValueError(
            f"`images` in `{path}` are {images.dtype} of shape {images.shape}; expected bytes "
            "(uint8) of shape (n, height, width)"
        )
    ends = [round(len(images) * end / sum(_FACES)) for end in np.cumsum(_FACES).tolist()]
    counts = np.diff([0, *ends]).tolist()
    if min(counts) < 1 or images[0].size == 0:
        raise ValueError(
            f"`images` in `{path}` of shape {images.shape} split into {counts} rows; none may be empty"
        )
    pixels = torch.from_numpy(images).flatten(1).float()
    if noise_seed is None:
        pixels, scaling = pixels / 255, "pixels divided by 255"
    else:
        generator = torch.Generator().manual_seed(noise_seed)
        pixels = pixels + torch.rand(pixels.shape, generator=generator)
        known = pixels[: counts[0]]
        pixels = (pixels - known.mean(dim=0)) / known.std(dim=0, correction=0)
        scaling = (
            f"dequantised with seed {noise_seed}, each pixel standardised on the training rows"
        )
    train, valid, test = pixels.split(counts)
    note = f"{scaling}; split by order {'/'.join(map(str, counts))}"
    return Table(path.stem, str(path), train, valid, test, False, note)


def _binary(path: Path, file: NpzFile, name: str) -> Table:
    present = _present(path, file.files, name)
    rows = {
        split: _bits(read_array(path, file, f"{name}_{split}"), f"`{name}_{split}` in `{path}`")
        for split in present
    }
    widths = {split: part.shape[1] for split, part in rows.items()}
    if len(set(widths.values())) > 1:
        raise ValueError(f"the splits of `{name}` in `{path}` differ in width: {widths}")
    note = "the file's own split"
    for split in _SPLITS:
        if split not in rows and split != "valid":
            note += (
                f"; there is no `{name}_{split}`: `valid` takes its place, nothing is left to select "
                "on, and figures do not compare with published ones"
            )
    if "valid" not in rows:
        note += f"; there is no `{name}_valid`"
    train, test = (rows[split if split in rows else "valid"] for split in ("train", "test"))
    valid = rows["valid"] if len(rows) == 3 else None
    return Table(name, f"{path}:{name}", train, valid, test, True, note)


def _present(path: Path, entries: Sequence[str], name: str) -> list[str]:
    """The splits of a table, at least two of them."""
    found = [re.fullmatch(rf"(.+)_({'|'.join(_SPLITS)})", entry) for entry in entries]
    tables = sorted({match[1] for match in found if match})
    arrays = [entry for entry in entries if entry not in _SPLITS]
    if not tables and arrays:
        close = difflib.get_close_matches(name, arrays, n=1) or (arrays if len(arrays) == 1 else [])
        hint = f"did you mean `{path.name}:{close[0]}`?" if close else "name another one."
        problem = (
            f"holds no array `{name}`; {hint}" if name else "holds arrays; say which, by name."
        )
        listed = ", ".join(f"`:{entry}`" for entry in arrays[:8])
        raise ValueError(f"`{path}` {problem} There is {listed}")
    if not tables:
        raise ValueError(
            f"`{path}` holds no binary table, that is arrays `NAME_train`, `NAME_valid` and "
            f"`NAME_test`, but {', '.join(f'`{entry}`' for entry in entries[:8]) or 'nothing'}; rename "
            "the arrays, or give the path alone if there are `images`"
        )
    if name not in tables:
        close = difflib.get_close_matches(name, tables, n=1)
        hint = f"did you mean `{path.name}:{close[0]}`?" if close else "name another one."
        problem = (
            f"holds no table `{name}`; {hint}" if name else "holds tables; say which, by name."
        )
        raise ValueError(
            f"`{path}` {problem} There is {', '.join(f'`:{each}`' for each in tables)}"
        )
    present = [split for split in _SPLITS if f"{name}_{split}" in entries]
    if len(present) == 1:
        missing = "test" if present == ["train"] else "train"
        raise ValueError(
            f"the table `{name}` in `{path}` has no split but `{present[0]}`; two are needed, to train "
            f"and to test: add `{name}_{missing}`"
        )
    return present


def _bits(array: Array, what: str) -> Tensor:
    """A matrix of zeros and ones, float32, or an error."""
    if array.ndim != 2 or array.size == 0:
        raise ValueError(
            f"{what} has shape {array.shape}; expected (rows, columns), neither of them 0"
        )
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{what} is of type `{array.dtype}`; save numbers, 0 or 1")
    wrong = array[(array != 0) & (array != 1)]
    if wrong.size:
        numbers = array[array == array]  # NaN is not
        span = (
            f"values from {numbers.min():g} to {numbers.max():g}" if numbers.size else "no number"
        )
        undefined = array.size - numbers.size
        raise ValueError(
            f"{what} is not binary: {wrong.size} of {array.size} values are neither 0 nor 1, "
            f"{undefined} of these NaN; it holds {span}; binarise it"
        )
    return torch.from_numpy(array.astype(np.float32))

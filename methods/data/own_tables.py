"""Tables of one's own: rows in memory or in CSV and Parquet files, split and scaled; binary or real."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from bilevel.methods.data.containers import as_tensor
from bilevel.refusals import nearest

READERS: Mapping[str, str] = {".csv": "read_csv", ".parquet": "read_parquet"}
"""Endings of files, and what pandas reads them by."""

_LEAST = 2  # rows of a split


@final
class Rows(NamedTuple):
    """Rows, split: the fields of a `Table` that its rows decide."""

    train: Tensor
    valid: Tensor | None
    test: Tensor
    binary: bool
    note: str


@final
class Split(NamedTuple):
    """How rows are split and scaled.

    Attributes:
        test: share of the rows to test on.
        holdout: share of the others to set aside as `valid`.
        standardised: whether each column gets mean 0 and standard deviation 1 on the training rows.
        seed: of the shuffle before the split.
    """

    test: float = 0.2
    holdout: float = 0.0
    standardised: bool = False
    seed: int = 0


def own_rows(what: str, given: Any, split: Split) -> Rows:
    """Rows from memory.

    Args:
        what: what to call them in a refusal.
        given: rows in any container, shape (n, d), which are shuffled and split; or a mapping of
            `train`, `test` and perhaps `valid` to rows, or the pair of training and test rows.
        split: how; of what is split already only `standardised` counts.

    Raises:
        ValueError: if they are no rows of finite numbers, differ in width, or are too few.

    Example:
        >>> rows = own_rows("mine", [[0.5, 1.0]] * 10, Split())
        >>> rows.train.shape, rows.test.shape, rows.binary
        (torch.Size([8, 2]), torch.Size([2, 2]), False)
    """
    parts = given
    if isinstance(given, tuple) and len(given) == 2 and not isinstance(given[0], (int, float)):
        parts = dict(zip(("train", "test"), given, strict=True))
    if isinstance(parts, Mapping):
        odd = sorted(set(parts) - {"train", "valid", "test"})
        if odd or not {"train", "test"} <= set(parts):
            wrong = f"got {', '.join(f'`{name}`' for name in parts) or 'nothing'}"
            raise ValueError(
                f"{what} must map `train`, `test` and perhaps `valid` to rows; {wrong}"
            )
        split_parts = {name: _numbers(f"{what}, `{name}`", parts[name]) for name in parts}
        note = "split by its maker"
    else:
        split_parts, note = _shuffled(what, _numbers(what, parts), split)
    widths = {name: part.shape[1] for name, part in split_parts.items()}
    if len(set(widths.values())) > 1:
        raise ValueError(f"the splits of {what} differ in width: {widths}")
    binary = all(bool(((part == 0) | (part == 1)).all()) for part in split_parts.values())
    if split.standardised:
        split_parts, binary = _standardised(what, split_parts), False
        note += "; each column standardised on the training rows"
    train, valid, test = (split_parts.get(name) for name in ("train", "valid", "test"))
    assert train is not None
    assert test is not None
    return Rows(train, valid, test, binary, note)


def read_rows(path: Path, columns: Sequence[str] | None = None) -> Tensor:
    """The rows of a CSV or Parquet file, float32, shape (n, d).

    Args:
        path: the file.
        columns: those to take, in this order; all by default.

    Raises:
        ImportError: if pandas, or what it reads Parquet by, is missing.
        ValueError: if there is no such column, or one holds something else than finite numbers.
    """
    try:
        import pandas
    except ImportError:
        raise ImportError(
            f"`{path}` is read by pandas; install it with `pip install 'bilevel[tables]'`"
        ) from None
    try:
        frame = getattr(pandas, READERS[path.suffix.lower()])(path)
    except ImportError:
        raise ImportError(
            f"`{path}`: pandas reads Parquet by pyarrow; install it with `pip install pyarrow`"
        ) from None
    except (ValueError, UnicodeDecodeError) as error:  # pandas' own errors are among these
        raise ValueError(f"`{path}` cannot be read: {' '.join(str(error).split())}") from None
    names = [str(name) for name in frame.columns]
    frame.columns = names
    _refuse_names(path, names)
    for name in columns or ():
        if name not in names:
            raise ValueError(f"`{path}` has no column `{name}`; {nearest(name, names)}")
    frame = frame if columns is None else frame[list(columns)]
    for name in frame.columns:
        kind = frame[name].dtype
        if getattr(kind, "kind", "O") not in "biuf":
            rest = [other for other in frame.columns if frame[other].dtype.kind in "biuf"]
            others = (
                f", or name those to take: `columns={rest[:5]}` of `load_table`" if rest else ""
            )
            raise ValueError(
                f"the column `{name}` of `{path}` holds no numbers (`{kind}`); encode it{others}"
            )
        missing = int(frame[name].isna().sum())
        if missing:
            raise ValueError(
                f"the column `{name}` of `{path}` lacks {missing} of its {len(frame)} values; fill "
                "them, or drop those rows"
            )
    return _numbers(f"`{path}`", frame.to_numpy("float64"))


def _refuse_names(path: Path, names: Sequence[str]) -> None:
    """Refuse a first line that names no columns: another separator than commas, or numbers."""
    if path.suffix.lower() != ".csv":
        return
    for mark, called in ((";", "semicolons"), ("\t", "tabs")):
        if len(names) == 1 and mark in names[0]:
            raise ValueError(
                f"the columns of `{path}` seem to be separated by {called}; separate them by commas"
            )
    counted = [str(place) for place in range(len(names))]
    if len(names) > 2 and names == counted:
        return  # what pandas writes above columns without names
    if all(_is_number(name) for name in names):
        shown = ",".join(names[:3]) + (",..." if len(names) > 3 else "")
        raise ValueError(
            f"the first line of `{path}`, `{shown}`, holds numbers, where the names of the columns are "
            "expected; put a line of names above it"
        )


def _is_number(name: str) -> bool:
    try:
        float(name)
    except ValueError:
        return False
    return True


def _numbers(what: str, given: Any) -> Tensor:
    try:
        rows = as_tensor(given).float()
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what}: {error}") from None
    if rows.dim() != 2 or rows.numel() == 0:
        raise ValueError(
            f"{what} has shape {tuple(rows.shape)}; a table has (rows, columns), neither of them 0"
        )
    if wrong := int((~rows.isfinite()).sum()):
        first = (~rows.isfinite()).nonzero()[0].tolist()
        raise ValueError(
            f"{what} holds {wrong} values that are not finite, the first in row {first[0]}, column "
            f"{first[1]}; fill them, or drop those rows"
        )
    return rows


def _shuffled(what: str, rows: Tensor, split: Split) -> tuple[dict[str, Tensor], str]:
    for name, share in (("test", split.test), ("holdout", split.holdout)):
        if not 0 <= share < 1 or (name == "test" and share == 0):
            raise ValueError(f"`{name}` is a share of the rows, between 0 and 1; got {share}")
    held = max(1, round(split.test * len(rows)))
    aside = round(split.holdout * (len(rows) - held))
    kept = len(rows) - held - aside
    if kept < _LEAST:
        raise ValueError(f"{what} has {len(rows)} rows, too few to train and to test")
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(split.seed))
    test, valid, train = rows[order].split([held, aside, kept])
    note = f"shuffled with seed {split.seed}, then split {kept}/{aside}/{held}"
    parts = {"train": train, "test": test}
    return ({**parts, "valid": valid} if aside else parts), note


def _standardised(what: str, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    train = parts["train"].double()
    mean, scale = train.mean(0), train.std(0, correction=0)
    constant = (scale == 0).nonzero().flatten().tolist()
    if constant:
        raise ValueError(
            f"{what}: column {constant[0]} is constant in the training rows and cannot be standardised; "
            "leave it out"
        )
    return {name: ((part.double() - mean) / scale).float() for name, part in parts.items()}

"""Visibles that are read as they are needed: of data sets, loaders and other iterables of batches.

A row may be a tensor, an array or a picture; of a tuple (image, label) the first entry is the row, of a
mapping its only entry or the one called by one of `KEYS`. Labels are left out. Nothing is held but the
batch at hand, and each is looked at as it comes, as data in memory are before a training.
"""

import itertools
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Any, Protocol, TypeAlias, final

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from bilevel.batches import Batches, Source
from bilevel.errors import CheckpointError
from bilevel.global_random import reseeded
from bilevel.loaders import (
    Repeated,
    Stateful,
    knows_its_place,
    random_parts,
    restore_parts,
    unresumable,
)
from bilevel.methods.data.entries import listed_shapes, row_of, visibles_of

Admit: TypeAlias = Callable[[Any, list[int] | None], Tensor]
"""Looks at visibles, which it is given with their row numbers if they have any."""


class BatchReader(Protocol):
    """What a stream is read from: a source that counts its epochs."""

    @property
    def epochs(self) -> int: ...

    def __next__(self) -> Any: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...
    def close(self) -> None: ...


@final
class RowReader:
    """Batches of a data set whose rows have numbers, in a fresh random order every epoch.

    It is the order of `Batches`. What a row draws from global generators is seeded batch by batch.

    Args:
        data: with a length and rows by number.
        batch_size: rows per batch; the last, smaller batch of an epoch is left out.
        seed: of the order.

    Attributes:
        epochs: how many have ended.
    """

    def __init__(self, data: Any, batch_size: int, seed: int) -> None:
        self._data = data
        self._seed = seed
        self._order = Batches(torch.arange(len(data)), batch_size, seed=seed)
        self._per_epoch = len(data) // batch_size
        self._taken = 0

    @property
    def epochs(self) -> int:
        return max(0, self._taken - 1) // self._per_epoch

    def __next__(self) -> tuple[list[int], list[Any]]:
        numbers: list[int] = next(self._order).tolist()
        together = getattr(self._data, "__getitems__", None)
        with reseeded(self._seed, self._taken):
            read = [self._data[i] for i in numbers] if together is None else together(numbers)
        self._taken += 1
        return numbers, list(read)

    def state_dict(self) -> dict[str, Any]:
        reason = unresumable(self._data, seeded=True)
        if reason is not None:
            raise CheckpointError(reason)
        order = self._order.state_dict()
        return {"order": order, "taken": self._taken, "random": random_parts(self._data)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._order.load_state_dict(state["order"])
        restore_parts(self._data, state["random"])
        self._taken = state["taken"]

    def close(self) -> None:
        """Nothing is held."""


@final
class Groups(IterableDataset[Any]):
    """The rows of a stream, so many at a time; the last, smaller group of an epoch is left out."""

    def __init__(self, data: Iterable[Any], batch_size: int) -> None:
        self.data = data
        self.batch_size = batch_size
        self._read = False

    def __iter__(self) -> Iterator[list[Any]]:
        rows = iter(self.data)
        group = list(itertools.islice(rows, self.batch_size))
        if self._read and not group:
            raise ValueError(
                "the data could be read once only; each call of `__iter__` must begin them again, such "
                "as a method `__iter__` that has the `yield` in it"
            )
        self._read = True
        if len(group) < self.batch_size:
            raise ValueError(
                f"`batch_size` is {self.batch_size}, but an epoch of the data has only {len(group)} rows"
            )
        while len(group) == self.batch_size:
            yield group
            group = list(itertools.islice(rows, self.batch_size))


@final
class Stream:
    """An endless source of visibles, each batch looked at when it is drawn.

    Args:
        reading: gives batches as they come.
        taken: makes visibles and row numbers of one.
        admit: looks at visibles.
        convert: makes of admitted visibles what the networks take.
        kind: what the data are, in words.
        rows: how many there are, if that is known.
        per_epoch: batches of an epoch, if that is known.
        batches: whether the data come in batches of their own.
        once: whether they can be read once only.
    """

    def __init__(
        self,
        reading: BatchReader,
        taken: Callable[[Any], tuple[Any, list[int] | None]],
        admit: Admit,
        convert: Callable[[Tensor], Tensor],
        *,
        kind: str,
        rows: int | None = None,
        per_epoch: int | None = None,
        batches: bool = False,
        once: bool = False,
    ) -> None:
        self._once = once
        self.kind, self.rows, self.per_epoch, self.batches = kind, rows, per_epoch, batches
        self._reading = reading
        self._taken, self._admit, self._convert = taken, admit, convert
        self._number = 0
        self._ahead: Tensor | None = None
        self._before: dict[str, Any] | None = None
        self._last: Tensor | None = None

    @property
    def epochs(self) -> int:
        """How many epochs have ended."""
        return self._reading.epochs

    def peek(self) -> Tensor:
        """The first batch, which is given again as the first."""
        if self._ahead is None:
            try:
                self._before = self.state_dict()
            except CheckpointError:
                self._before = None
            self._ahead = self._read()
        return self._ahead

    def refuse_unresumable(self) -> None:
        """Refuse a stream that could not be read again in the same order, as far as can be seen.

        Raises:
            CheckpointError: with what to change.
        """
        if self._once:
            raise CheckpointError(
                f"a {self.kind} can be read once only, so the run could not be resumed from a "
                "checkpoint; give an object whose `__iter__` starts it again, or leave out `run`"
            )
        self._reading.state_dict()

    def close(self) -> None:
        """Let go of what is held: workers of a loader are gone before another training begins."""
        self._ahead = self._last = None
        self._reading.close()

    def __next__(self) -> Tensor:
        batch, self._ahead = self._ahead, None
        return self._read() if batch is None else batch

    def state_dict(self) -> dict[str, Any]:
        """The place in the data, and a checksum of the last batch."""
        if self._ahead is not None and self._before is not None:
            return self._before
        last = None if self._last is None else _checksum(self._last)
        return {"reading": self._reading.state_dict(), "number": self._number, "last": last}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a place.

        Raises:
            CheckpointError: if the data are not what they were.
        """
        if "reading" not in state:
            raise CheckpointError(
                "the checkpoint was written with data of another kind, in memory or augmented; resume "
                "with the same data and arguments"
            )
        self._ahead = self._last = None
        self._reading.load_state_dict(state["reading"])
        self._number = state["number"]
        again = getattr(self._reading, "last", None)
        if again is None or state["last"] is None:
            return
        self._last = self._admitted(again)
        if _checksum(self._last) != state["last"]:
            raise CheckpointError(
                f"the {self.kind} does not give the batches again that it gave before the checkpoint, "
                "so the run cannot be resumed to the bit; give its shuffling a seed, and the same data"
            )

    def _read(self) -> Tensor:
        self._number += 1
        try:
            given = next(self._reading)
        except TypeError as error:
            if "default_collate" not in str(error):
                raise
            raise TypeError(
                "the loader cannot make a batch of its rows "
                f"({str(error).split(';')[-1].strip()}); give `fit` the data set itself, which may hold "
                "pictures, or make them tensors first"
            ) from error
        self._last = self._admitted(given)
        return self._convert(self._last)

    def _admitted(self, given: Any) -> Tensor:
        numbers: list[int] | None = None
        try:
            rows, numbers = self._taken(given)
            admitted = self._admit(rows, numbers)
            if len(admitted) < 2:
                raise ValueError(
                    "it has a single row, and a batch needs at least 2; use `drop_last=True` in the "
                    "loader"
                )
        except (TypeError, ValueError) as error:
            kind = ValueError if isinstance(error, ValueError) else TypeError
            where = f"batch {self._number} of the {self.kind}"
            if self._once and self._number == 1:
                where += (
                    " (each of its items is a batch; an `IterableDataset` may give single rows)"
                )
            if numbers:
                shown = ", ".join(map(str, numbers[:5])) + (", ..." if len(numbers) > 5 else "")
                where = f"rows {shown} of the {self.kind}"
            raise kind(f"{where}: {error}") from error
        return admitted


def as_stream(
    data: Any, batch_size: int, seed: int, admit: Admit, convert: Callable[[Tensor], Tensor]
) -> Stream | None:
    """The data as a stream; `None` if they are rows in memory, or nothing that could be trained on.

    Args:
        data: what `fit` was given.
        batch_size: rows per batch, where the data do not come in batches.
        seed: of the order, and of what rows draw from global generators.
        admit: looks at visibles.
        convert: makes of admitted visibles what the networks take.

    Raises:
        TypeError: for a data set whose rows have numbers but no length.
        ValueError: if there are fewer rows than in a batch.
    """
    kind = f"`{type(data).__name__}`"
    if isinstance(data, _IN_MEMORY) or callable(getattr(data, "__array__", None)):
        return None
    if _has_columns(data):
        return None
    if isinstance(data, Source) and not isinstance(data, Dataset):
        return Stream(_Counted(data), _batch, admit, convert, kind=kind, batches=True)
    streamed = isinstance(data, IterableDataset)
    by_number = callable(getattr(data, "__getitem__", None)) and not streamed
    if by_number and not isinstance(data, DataLoader):
        count = _length(data)
        if count is None:
            raise TypeError(f"the {kind} has rows by number, but no length; give it a `__len__`")
        if count < batch_size:
            raise ValueError(f"`batch_size` is {batch_size}, but there are only {count} visibles")
        per_epoch = count // batch_size
        rows = RowReader(data, batch_size, seed)
        return Stream(rows, _items, admit, convert, kind=kind, rows=count, per_epoch=per_epoch)
    if streamed:
        count = _length(data)
        steps = None if not count or count < batch_size else count // batch_size
        groups = Repeated(Groups(data, batch_size), seed=seed)
        return Stream(groups, _group, admit, convert, kind=kind, rows=count, per_epoch=steps)
    if not isinstance(data, Iterable):
        return None
    _refuse_single(data)
    reading = (Stateful if knows_its_place(data) else Repeated)(data, seed=seed)
    steps = None if knows_its_place(data) else _length(data) or None
    once = isinstance(data, Iterator) and not knows_its_place(data)
    return Stream(
        reading, _batch, admit, convert, kind=kind, per_epoch=steps, batches=True, once=once
    )


_IN_MEMORY = (Tensor, np.ndarray, list, tuple, str, bytes, Mapping, set, frozenset, type)


def _has_columns(data: Any) -> bool:
    """Whether it is a data frame or a sparse matrix."""
    return any(callable(getattr(data, name, None)) for name in ("to_numpy", "toarray"))


def _length(data: Any) -> int | None:
    """How many there are; `None` where nobody knows."""
    try:
        return len(data) if isinstance(data, Sized) else None
    except Exception:  # streams have the method and raise what they like in it
        return None


def _refuse_single(data: Any) -> None:
    """Refuse a loader whose last batch would have a single row: sooner than after an epoch."""
    size, rows = getattr(data, "batch_size", None), _length(getattr(data, "dataset", None))
    if not isinstance(size, int) or rows is None or isinstance(data.dataset, IterableDataset):
        return
    if rows % size == 1 and not getattr(data, "drop_last", True):
        raise ValueError(
            f"the last of the loader's batches would have a single row ({rows} rows in batches of "
            f"{size}), and a batch needs at least 2; use `drop_last=True`"
        )


def _batch(given: Any) -> tuple[Any, None]:
    rows = visibles_of(given)
    if not isinstance(rows, (Tensor, np.ndarray)):
        raise TypeError(
            f"a batch is a tensor or an array of rows, got a `{type(rows).__name__}`; single rows go "
            "into a `torch.utils.data.Dataset`, which `fit` takes"
        )
    return rows, None


def _items(given: tuple[list[int], list[Any]]) -> tuple[Tensor, list[int]]:
    numbers, items = given
    return _stacked(items, numbers), numbers


def _group(given: list[Any]) -> tuple[Tensor, None]:
    return _stacked(given, None), None


def _stacked(items: list[Any], numbers: list[int] | None) -> Tensor:
    rows = [row_of(visibles_of(item)) for item in items]
    if len({row.shape for row in rows}) > 1:
        raise ValueError(listed_shapes(rows, numbers))
    return torch.stack(rows)


def _checksum(rows: Tensor) -> int:
    return zlib.crc32(rows.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())


@final
class _Counted:
    """A source that has no epochs."""

    epochs = 0

    def __init__(self, source: Source) -> None:
        self._source = source

    def __next__(self) -> Any:
        return next(self._source)

    def state_dict(self) -> dict[str, Any]:
        return self._source.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._source.load_state_dict(state)

    def close(self) -> None:
        """Nothing is held."""

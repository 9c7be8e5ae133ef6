"""Endless streams of minibatches that know their position: what a run reads its data from."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, runtime_checkable

import optree
import torch
from torch import Tensor

from bilevel.errors import CheckpointError

_AT_ONCE = 4096  # rows looked at together


@runtime_checkable
class Source(Protocol):
    """An endless stream of batches whose position can be saved and restored."""

    def __next__(self) -> Any: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Batches:
    """Minibatches of tensors held in memory, in a fresh random order every epoch.

    Batches are cut on the tensors' own device, without a loader process or a copy from the host. The
    last, smaller batch of an epoch is dropped.

    Args:
        data: a tensor, or any pytree (tuple, dict, ...) of tensors with the same first dimension.
        batch_size: rows per batch; `None` gives all rows every time, in their own order.
        seed: seed of the order.
        convert: applied to the rows that were drawn, and to no others: with it the data can be kept as
            bytes, a quarter of the memory, and become floats a batch at a time.

    Raises:
        ValueError: if the data are empty, of unequal length, fewer than `batch_size` rows, or hold a
            NaN or infinite number (named by index).
        TypeError: if a leaf is not a tensor.

    Example:
        >>> batches = Batches(torch.arange(4), batch_size=2, seed=0)
        >>> sorted(torch.cat([next(batches), next(batches)]).tolist())
        [0, 1, 2, 3]
        >>> pixels = torch.tensor([0, 255], dtype=torch.uint8)
        >>> next(Batches(pixels, convert=lambda rows: rows / 127.5 - 1))
        tensor([-1.,  1.])
    """

    def __init__(
        self,
        data: Any,
        batch_size: int | None = None,
        *,
        seed: int = 0,
        convert: Callable[[Any], Any] | None = None,
    ) -> None:
        self.length = _check(data)
        if batch_size is not None and not 1 <= batch_size <= self.length:
            raise ValueError(
                f"`batch_size` must lie between 1 and the number of rows, {self.length}; "
                f"got {batch_size}"
            )
        self.data = data
        self.batch_size = batch_size
        self.convert = convert if convert is not None else _as_they_are
        leaf: Tensor = optree.tree_leaves(data)[0]
        self._generator = torch.Generator(leaf.device).manual_seed(seed)
        self._order = torch.randperm(0)
        self._position = self.length

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self.batch_size is None:
            return self.convert(self.data)
        if self._position + self.batch_size > self.length:
            device = self._generator.device
            self._order = torch.randperm(self.length, generator=self._generator, device=device)
            self._position = 0
        rows = self._order[self._position : self._position + self.batch_size]
        self._position += self.batch_size
        return self.convert(optree.tree_map(lambda leaf: leaf[rows], self.data))

    def state_dict(self) -> dict[str, Any]:
        """Position in the epoch, order of the epoch and state of the generator."""
        return {
            "generator": self._generator.get_state(),
            "order": self._order,
            "position": self._position,
            "length": self.length,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken.

        Raises:
            CheckpointError: if the data have another number of rows than then.
        """
        if state["length"] != self.length:
            raise CheckpointError(
                f"the checkpoint was written with {state['length']} rows of data, "
                f"there are {self.length} now; resume with the same data"
            )
        self._generator.set_state(state["generator"].cpu())
        self._order = state["order"].to(self._generator.device)
        self._position = state["position"]


class Repeated:
    """An iterable (a `DataLoader`, say) started again whenever it ends.

    To be resumable it must give the same batches again: either it does not shuffle, or it is a
    `DataLoader` with its own `generator`, whose state is then saved at the start of each epoch.

    Args:
        iterable: yields the batches of one epoch each time it is iterated.

    Raises:
        ValueError: when asked for a batch, if an epoch is empty.
    """

    def __init__(self, iterable: Iterable[Any]) -> None:
        self._iterable = iterable
        self._epoch: Iterator[Any] | None = None
        self._drawn = 0
        self._start: Tensor | None = None

    def __next__(self) -> Any:
        if self._epoch is None:
            self._begin()
        assert self._epoch is not None
        try:
            batch = next(self._epoch)
        except StopIteration:
            if self._drawn == 0:
                raise ValueError(
                    "the data are empty: an epoch gave no batch (an iterator can be read once only; "
                    "give the iterable it came from)"
                ) from None
            self._begin()
            self._drawn = 0
            return next(self)
        self._drawn += 1
        return batch

    def _begin(self) -> None:
        generator = self._generator()
        self._start = generator.get_state() if generator is not None else None
        self._epoch = iter(self._iterable)

    def state_dict(self) -> dict[str, Any]:
        """Batches drawn in this epoch and the loader's generator, at its start and now.

        Raises:
            CheckpointError: if the iterable shuffles from the global generator.
        """
        sampler = type(getattr(self._iterable, "sampler", None)).__name__
        if sampler == "RandomSampler" and self._generator() is None:
            raise CheckpointError(
                "this `DataLoader` shuffles from torch's global generator, so the run could not be "
                "resumed; give it `generator=torch.Generator().manual_seed(...)`"
            )
        now = generator.get_state() if (generator := self._generator()) is not None else None
        return {
            "drawn": self._drawn,
            "start": now if self._epoch is None else self._start,
            "now": now,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Start the saved epoch again and skip the batches that were drawn.

        Raises:
            CheckpointError: if an epoch has fewer batches now than were drawn then.
        """
        generator = self._generator()
        if state["start"] is not None and generator is not None:
            generator.set_state(state["start"].cpu())
        self._epoch = None
        self._drawn = 0
        for _ in range(state["drawn"]):
            next(self)
        if self._drawn != state["drawn"]:
            raise CheckpointError(
                f"the checkpoint was written {state['drawn']} batches into an epoch, which has fewer "
                "now; resume with the same data"
            )
        if state["now"] is not None and generator is not None:
            generator.set_state(state["now"].cpu())  # two streams may share one generator

    def _generator(self) -> torch.Generator | None:
        generator = getattr(self._iterable, "generator", None)
        return generator if isinstance(generator, torch.Generator) else None


class Nothing:
    """The source of problems that need no data: every batch is `None`."""

    def __next__(self) -> None:
        return None

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def as_source(data: Any, batch_size: int | None, seed: int) -> Source:
    """What `train` accepts as data, as a `Source`.

    Raises:
        TypeError: if `data` is neither tensors, nor a source, nor an iterable of batches.
    """
    if data is None:
        return Nothing()
    if isinstance(data, Source):
        return data
    leaves = optree.tree_leaves(data)
    if leaves and all(isinstance(leaf, Tensor) for leaf in leaves):
        return Batches(data, batch_size, seed=seed)
    if isinstance(data, Iterable) and not isinstance(data, (list, tuple, dict, str)):
        return Repeated(data)
    raise TypeError(
        "`data` must be a pytree of tensors, a `DataLoader` (or another iterable of batches), or "
        f"`None`; got {type(data).__name__}. Convert arrays with `torch.as_tensor`"
    )


def not_finite(rows: Tensor) -> tuple[int, str]:
    """How many rows hold NaN or infinity, and which, in words.

    Example:
        >>> not_finite(torch.tensor([[1.0, 2.0], [float("nan"), 0.0], [0.0, float("inf")]]))
        (2, 'index 1, 2')
    """
    if not (rows.is_floating_point() or rows.is_complex()):
        return 0, indices([])
    # in pieces: `isfinite` makes copies of what it is given
    pieces = [part.isfinite().reshape(len(part), -1).all(dim=1) for part in rows.split(_AT_ONCE)]
    bad = (~torch.cat(pieces)).nonzero()[:, 0].tolist()
    return len(bad), indices(bad)


def indices(rows: list[int]) -> str:
    """The first few row numbers, in words."""
    return "index " + ", ".join(map(str, rows[:5])) + (", ..." if len(rows) > 5 else "")


def _as_they_are(rows: Any) -> Any:
    return rows


def _check(data: Any) -> int:
    leaves = optree.tree_leaves(data)
    for leaf in leaves:
        if not isinstance(leaf, Tensor):
            raise TypeError(f"the data must be tensors, got a {type(leaf).__name__} among them")
    lengths = {leaf.shape[0] if leaf.ndim else 0 for leaf in leaves}
    if len(lengths) != 1:
        raise ValueError(
            "the tensors of the data must share their first dimension, got lengths "
            f"{sorted(lengths)}"
        )
    (length,) = lengths
    if length == 0:
        raise ValueError("the data are empty: their first dimension is 0")
    for leaf in leaves:
        count, which = not_finite(leaf)
        if count:
            raise ValueError(
                f"the data hold NaN or infinite numbers in {count} of {length} rows "
                f"({which}); drop or repair these rows"
            )
    return length

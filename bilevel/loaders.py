"""`Repeated`: an iterable of batches, such as a `DataLoader`, read again and again from a known place.

A place is kept as what was random at the start of an epoch and how many batches were drawn since: to
resume, the epoch is started again and as many batches are skipped. What is random is what the loader,
its samplers and its data set hold: `torch.Generator`s, an epoch number (`set_epoch`), a sampler's own
`state_dict`. Data that draw from the global generators, or keep their randomness elsewhere, cannot be
resumed; `state_dict` then refuses. With a seed of its own, a stream has the global generators in this
process start from that and the number of the batch, so that what is drawn from them can be had again.
"""

import random
from collections.abc import Iterable, Iterator
from typing import Any, final

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from bilevel.errors import CheckpointError
from bilevel.global_random import drawn_from, global_states, reseeded

_WATCHED = 4  # batches at the start of each epoch that are watched for draws of global generators
_OWN = "torch.utils.data"
_ORDERS = (list, tuple, range, Tensor, np.ndarray)  # what may be given for a sampler


@final
class Repeated:
    """An iterable (for example a `DataLoader`), started again whenever it ends.

    Args:
        iterable: yields the batches of one epoch each time it is iterated.
        seed: seeds the global generators while a batch is read, and tells parts that count epochs
            (`set_epoch`) of each new one; without, both are left to the caller.

    Attributes:
        epochs: how many have ended.
        last: the last batch, as it came.

    Raises:
        ValueError: when asked for a batch, if an epoch is empty.
    """

    def __init__(self, iterable: Iterable[Any], *, seed: int | None = None) -> None:
        self.epochs = 0
        self.last: Any = None
        self._iterable = iterable
        self._seed = seed
        self._taken = 0  # batches, in all epochs
        self._epoch: Iterator[Any] | None = None
        self._drawn = 0
        self._start: dict[str, Any] = {}
        self._global: str | None = None  # the global generator that was seen to be drawn from

    def __next__(self) -> Any:
        if self._epoch is None:
            self._begin()
        assert self._epoch is not None
        watched = self._drawn < _WATCHED and self._global is None and self._seed is None
        before = global_states() if watched else {}
        try:
            with reseeded(self._seed, self._taken, 1):
                batch = next(self._epoch)
        except StopIteration:
            if self._drawn == 0:
                raise ValueError(self._empty()) from None
            self._end()
            self._begin()
            return next(self)
        if watched:
            self._global = drawn_from(before)
        self._drawn += 1
        self._taken += 1
        self.last = batch if self._seed is not None else None
        return batch

    def _empty(self) -> str:
        what = "the data are empty"
        if self._taken:
            what = f"the data ended after {self._taken} batches"
        return (
            f"{what}: an epoch gave no batch (an iterator can be read once only; give the iterable it "
            "came from)"
        )

    def _end(self) -> None:
        self.epochs += 1
        self._drawn = 0
        for part in _numbered(_parts(self._iterable)) if self._seed is not None else []:
            part.set_epoch(int(part.epoch) + 1)

    def _begin(self) -> None:
        self._start = self._random()
        self._epoch = None  # its workers are gone before those of the next one are made
        # a `DataLoader` draws a seed for its workers, used or not
        if self._seed is not None or isinstance(self._iterable, DataLoader):
            with reseeded(self._seed, self._taken, 0):
                self._epoch = iter(self._iterable)
            return
        before = global_states()
        self._epoch = iter(self._iterable)
        self._global = self._global or drawn_from(before)

    def state_dict(self) -> dict[str, Any]:
        """Batches drawn in this epoch, and what is random in it, at its start and now.

        Raises:
            CheckpointError: if the order or the content of the batches could not be restored.
        """
        reason = unresumable(self._iterable, seeded=self._seed is not None)
        if reason is None and self._global is not None:
            reason = (
                f"the data draw from {self._global} global generator while they are read (a random "
                "transform, say), so the run could not be resumed; draw noise in `problem.draw`, or "
                "read them with `DataLoader(..., num_workers=1, generator=...)`"
            )
        if reason is not None:
            raise CheckpointError(reason)
        now = self._random()
        start = now if self._epoch is None else self._start
        place = {"drawn": self._drawn, "start": start, "now": now["generators"]}
        if self._seed is not None:
            place |= {"epochs": self.epochs, "taken": self._taken}
        return place

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Start the saved epoch again and skip the batches that were drawn.

        Raises:
            CheckpointError: if an epoch has fewer batches now than were drawn then.
        """
        now = _as_list(state["now"])
        restore_parts(self._iterable, _understood(state["start"]))
        self._epoch = None
        self._drawn = 0
        self.epochs = state.get("epochs", 0)
        self._taken = state.get("taken", state["drawn"]) - state["drawn"]
        for _ in range(state["drawn"]):
            next(self)
        if self._drawn != state["drawn"]:
            raise CheckpointError(
                f"the checkpoint was written {state['drawn']} batches into an epoch, which has fewer "
                "now; resume with the same data"
            )
        _restore(_generators(self._iterable), now)  # two streams may share one generator

    def close(self) -> None:
        """Let go of the epoch, and so of its workers."""
        self._epoch = self.last = None

    def _random(self) -> dict[str, Any]:
        return random_parts(self._iterable)


@final
class Stateful:
    """An iterable that knows its own place (`state_dict`, `load_state_dict`), read again and again.

    Args:
        iterable: as `torchdata`'s `StatefulDataLoader`: iterated after `load_state_dict`, it goes on
            where `state_dict` was taken.
        seed: seeds the global generators while a batch is read; without, they are left alone.

    Attributes:
        epochs: how many have ended.

    Raises:
        ValueError: when asked for a batch, if an epoch is empty.
    """

    def __init__(self, iterable: Any, *, seed: int | None = None) -> None:
        self.epochs = 0
        self._iterable = iterable
        self._seed = seed
        self._taken = 0
        self._epoch: Iterator[Any] | None = None

    def __next__(self) -> Any:
        for turn in range(2):  # the place may be the end of an epoch
            with reseeded(self._seed, self._taken, turn):
                if self._epoch is None:
                    self._epoch = iter(self._iterable)
                for batch in self._epoch:
                    self._taken += 1
                    return batch
            self._epoch = None
            self.epochs += 1
        raise ValueError("the data are empty: an epoch gave no batch")

    def state_dict(self) -> dict[str, Any]:
        """The iterable's own."""
        place = {"iterable": self._iterable.state_dict()}
        if self._seed is not None:
            place |= {"epochs": self.epochs, "taken": self._taken}
        return place

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Give the iterable its place back."""
        self._iterable.load_state_dict(state["iterable"])
        self.epochs, self._taken = state.get("epochs", 0), state.get("taken", 0)
        self._epoch = None

    def close(self) -> None:
        """Let go of the epoch, and so of its workers."""
        self._epoch = None


def knows_its_place(iterable: Any) -> bool:
    """Whether an iterable is to be asked for its place, and goes on there once it is given back.

    A streaming data set of Hugging Face has the methods too, but would begin every later epoch there.
    """
    return _has_state(iterable) and not _numbered([iterable])


def unresumable(iterable: Any, *, seeded: bool = False) -> str | None:
    """Why the batches could not be read again in the same order, `None` if they can.

    Args:
        iterable: a loader or another iterable.
        seeded: whether the global generators of this process are seeded while it is read.

    Example:
        >>> unresumable(DataLoader([1, 2, 3], shuffle=True))[:56]
        "this `DataLoader` shuffles from torch's global generator"
    """
    give = "give it `generator=torch.Generator().manual_seed(...)`"
    for part in _parts(iterable):
        kind = type(part).__name__
        own = type(part).__module__.startswith(_OWN)
        unseeded = isinstance(part, Sampler) and own and getattr(part, "generator", 0) is None
        if unseeded and not seeded:
            return (
                "this `DataLoader` shuffles from torch's global generator, so the run could not be "
                f"resumed; {give}" + (f" (`{kind}`, too)" if kind != "RandomSampler" else "")
            )
        has_generator = any(isinstance(v, torch.Generator) for v in _fields(part))
        if _is_order(iterable, part) and not own and not has_generator and not _has_state(part):
            return (
                f"the order that the sampler `{kind}` gives could not be had again, so the run could "
                "not be resumed; give it a `torch.Generator` as attribute, or `state_dict` and "
                "`load_state_dict`"
            )
        if any(isinstance(v, _FOREIGN) for v in _fields(part)) and not _has_state(part):
            return (
                f"`{kind}` draws from a generator of NumPy or Python, whose place a checkpoint cannot "
                "hold, so the run could not be resumed; use a `torch.Generator`"
            )
    if isinstance(iterable, DataLoader) and iterable.num_workers:
        if iterable.generator is None and not seeded:
            return (
                "the workers of this `DataLoader` get their seeds from torch's global generator, so "
                f"the run could not be resumed; {give}"
            )
        if iterable.persistent_workers:
            return (
                "the workers of this `DataLoader` outlive an epoch and with them random numbers that no "
                "checkpoint holds, so the run could not be resumed; use `persistent_workers=False`"
            )
        if not getattr(iterable, "in_order", True):
            return (
                "the workers of this `DataLoader` hand in their batches in any order "
                "(`in_order=False`), so the run could not be resumed; leave that out"
            )
    return None


# ---------------------------------------------------------------------- what is random in a loader

_FOREIGN = (np.random.Generator, np.random.RandomState, random.Random)


def _parts(iterable: Any) -> list[Any]:
    """The iterable, its samplers and its data sets, and theirs."""
    found: list[Any] = []
    waiting = [iterable]
    while waiting:
        part = waiting.pop(0)
        if any(part is known for known in found):
            continue
        found.append(part)
        for value in _fields(part):
            members = value if isinstance(value, (list, tuple)) else [value]
            waiting += [m for m in members[:100] if isinstance(m, (Sampler, Dataset, DataLoader))]
        waiting += [order for order in _orders(part) if not isinstance(order, _ORDERS)]
    return found


def _fields(part: Any) -> list[Any]:
    return list(getattr(part, "__dict__", {}).values())


def _orders(part: Any) -> list[Any]:
    """The samplers of a loader, and of a batch sampler the one inside it."""
    if not isinstance(part, (DataLoader, Sampler)):
        return []
    orders = [getattr(part, name, None) for name in ("sampler", "batch_sampler")]
    return [order for order in orders if order is not None]


def _is_order(iterable: Any, part: Any) -> bool:
    """Whether a part decides which rows come next."""
    given = _orders(iterable) if isinstance(iterable, DataLoader) else []
    return isinstance(part, Sampler) or any(part is order for order in given)


def _generators(iterable: Any) -> list[torch.Generator]:
    found = [
        v for part in _parts(iterable) for v in _fields(part) if isinstance(v, torch.Generator)
    ]
    return list({id(generator): generator for generator in found}.values())


def _has_state(part: Any) -> bool:
    return all(callable(getattr(part, n, None)) for n in ("state_dict", "load_state_dict"))


def _stateful(parts: list[Any]) -> list[Any]:
    """The parts, but for the whole, that give their state at the start of an epoch and take it back."""
    return [part for part in parts[1:] if _has_state(part) and not _counting(part)]


def _counting(part: Any) -> bool:
    """Whether the number of the epoch is all that a data set needs to start one again."""
    return isinstance(part, Dataset) and bool(_numbered([part]))


def _numbered(parts: list[Any]) -> list[Any]:
    """The parts whose order depends on an epoch number that the caller sets (`DistributedSampler`)."""
    return [
        p for p in parts if hasattr(p, "set_epoch") and isinstance(getattr(p, "epoch", None), int)
    ]


def _restore(generators: list[torch.Generator], states: list[Tensor]) -> None:
    for generator, state in zip(generators, states, strict=True):
        generator.set_state(state.cpu())


def random_parts(iterable: Any) -> dict[str, Any]:
    """What is random in a loader or a data set, as it is now."""
    parts = _parts(iterable)
    return {
        "generators": [g.get_state() for g in _generators(iterable)],
        "states": [part.state_dict() for part in _stateful(parts)],
        "epochs": [int(part.epoch) for part in _numbered(parts)],
    }


def restore_parts(iterable: Any, saved: dict[str, Any]) -> None:
    """Give a loader or a data set back what `random_parts` told.

    Raises:
        CheckpointError: if it has another number of generators now.
    """
    parts, generators = _parts(iterable), _generators(iterable)
    if len(saved["generators"]) != len(generators):
        raise CheckpointError(
            f"the data had {len(saved['generators'])} random generators when the checkpoint was "
            f"written and have {len(generators)} now; resume with the same data"
        )
    _restore(generators, saved["generators"])
    for part, state in zip(_stateful(parts), saved["states"], strict=True):
        part.load_state_dict(state)
    for part, epoch in zip(_numbered(parts), saved["epochs"], strict=True):
        part.set_epoch(epoch)


def _understood(start: Any) -> dict[str, Any]:
    """What a checkpoint holds of an epoch's start; earlier ones hold one generator's state."""
    if isinstance(start, dict):
        return start
    return {"generators": _as_list(start), "states": [], "epochs": []}


def _as_list(states: Any) -> list[Tensor]:
    if states is None:
        return []
    return [states] if isinstance(states, Tensor) else states

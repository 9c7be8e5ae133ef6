"""`Repeated`: an iterable of batches, such as a `DataLoader`, read again and again from a known place.

A place is kept as what was random at the start of an epoch and how many batches were drawn since: to
resume, the epoch is started again and as many batches are skipped. What is random is what the loader,
its samplers and its data set hold: `torch.Generator`s, an epoch number (`set_epoch`), a sampler's own
`state_dict`. Data that draw from the global generators, or keep their randomness elsewhere, cannot be
resumed; `state_dict` then refuses.
"""

import random
from collections.abc import Iterable, Iterator
from typing import Any, final

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from bilevel.errors import CheckpointError

_WATCHED = 4  # batches at the start of each epoch that are watched for draws of global generators
_OWN = "torch.utils.data"
_ORDERS = (list, tuple, range, Tensor, np.ndarray)  # what may be given for a sampler


@final
class Repeated:
    """An iterable (for example a `DataLoader`), started again whenever it ends.

    Args:
        iterable: yields the batches of one epoch each time it is iterated.

    Raises:
        ValueError: when asked for a batch, if an epoch is empty.
    """

    def __init__(self, iterable: Iterable[Any]) -> None:
        self._iterable = iterable
        self._epoch: Iterator[Any] | None = None
        self._drawn = 0
        self._start: dict[str, Any] = {}
        self._global: str | None = None  # the global generator that was seen to be drawn from

    def __next__(self) -> Any:
        if self._epoch is None:
            self._begin()
        assert self._epoch is not None
        watched = self._drawn < _WATCHED and self._global is None
        before = _global_states() if watched else {}
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
        if watched:
            self._global = _drawn_from(before)
        self._drawn += 1
        return batch

    def _begin(self) -> None:
        self._start = self._random()
        if isinstance(self._iterable, DataLoader):  # draws a seed for its workers, used or not
            self._epoch = iter(self._iterable)
            return
        before = _global_states()
        self._epoch = iter(self._iterable)
        self._global = self._global or _drawn_from(before)

    def state_dict(self) -> dict[str, Any]:
        """Batches drawn in this epoch, and what is random in it, at its start and now.

        Raises:
            CheckpointError: if the order or the content of the batches could not be restored.
        """
        reason = unresumable(self._iterable)
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
        return {"drawn": self._drawn, "start": start, "now": now["generators"]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Start the saved epoch again and skip the batches that were drawn.

        Raises:
            CheckpointError: if an epoch has fewer batches now than were drawn then.
        """
        parts, generators = _parts(self._iterable), _generators(self._iterable)
        start, now = _understood(state["start"]), _as_list(state["now"])
        if len(start["generators"]) != len(generators):
            raise CheckpointError(
                f"the data had {len(start['generators'])} random generators when the checkpoint was "
                f"written and have {len(generators)} now; resume with the same data"
            )
        _restore(generators, start["generators"])
        for part, saved in zip(_stateful(parts), start["states"], strict=True):
            part.load_state_dict(saved)
        for part, epoch in zip(_numbered(parts), start["epochs"], strict=True):
            part.set_epoch(epoch)
        self._epoch = None
        self._drawn = 0
        for _ in range(state["drawn"]):
            next(self)
        if self._drawn != state["drawn"]:
            raise CheckpointError(
                f"the checkpoint was written {state['drawn']} batches into an epoch, which has fewer "
                "now; resume with the same data"
            )
        _restore(generators, now)  # two streams may share one generator

    def _random(self) -> dict[str, Any]:
        parts = _parts(self._iterable)
        return {
            "generators": [g.get_state() for g in _generators(self._iterable)],
            "states": [part.state_dict() for part in _stateful(parts)],
            "epochs": [int(part.epoch) for part in _numbered(parts)],
        }


@final
class Stateful:
    """An iterable that knows its own place (`state_dict`, `load_state_dict`), read again and again.

    Args:
        iterable: as `torchdata`'s `StatefulDataLoader`: iterated after `load_state_dict`, it goes on
            where `state_dict` was taken.

    Raises:
        ValueError: when asked for a batch, if an epoch is empty.
    """

    def __init__(self, iterable: Any) -> None:
        self._iterable = iterable
        self._epoch: Iterator[Any] | None = None

    def __next__(self) -> Any:
        for _ in range(2):  # the place may be the end of an epoch
            if self._epoch is None:
                self._epoch = iter(self._iterable)
            for batch in self._epoch:
                return batch
            self._epoch = None
        raise ValueError("the data are empty: an epoch gave no batch")

    def state_dict(self) -> dict[str, Any]:
        """The iterable's own."""
        return {"iterable": self._iterable.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Give the iterable its place back."""
        self._iterable.load_state_dict(state["iterable"])
        self._epoch = None


def unresumable(iterable: Any) -> str | None:
    """Why the batches could not be read again in the same order, `None` if they can.

    Example:
        >>> unresumable(DataLoader([1, 2, 3], shuffle=True))[:56]
        "this `DataLoader` shuffles from torch's global generator"
    """
    give = "give it `generator=torch.Generator().manual_seed(...)`"
    for part in _parts(iterable):
        kind = type(part).__name__
        own = type(part).__module__.startswith(_OWN)
        if isinstance(part, Sampler) and own and getattr(part, "generator", 0) is None:
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
        if iterable.generator is None:
            return (
                "the workers of this `DataLoader` get their seeds from torch's global generator, so "
                f"the run could not be resumed; {give}"
            )
        if iterable.persistent_workers:
            return (
                "the workers of this `DataLoader` outlive an epoch and with them random numbers that no "
                "checkpoint holds, so the run could not be resumed; use `persistent_workers=False`"
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
    return [part for part in parts[1:] if _has_state(part)]


def _numbered(parts: list[Any]) -> list[Any]:
    """The parts whose order depends on an epoch number that the caller sets (`DistributedSampler`)."""
    return [
        p for p in parts if hasattr(p, "set_epoch") and isinstance(getattr(p, "epoch", None), int)
    ]


def _restore(generators: list[torch.Generator], states: list[Tensor]) -> None:
    for generator, state in zip(generators, states, strict=True):
        generator.set_state(state.cpu())


def _understood(start: Any) -> dict[str, Any]:
    """What a checkpoint holds of an epoch's start; earlier ones hold one generator's state."""
    if isinstance(start, dict):
        return start
    return {"generators": _as_list(start), "states": [], "epochs": []}


def _as_list(states: Any) -> list[Tensor]:
    if states is None:
        return []
    return [states] if isinstance(states, Tensor) else states


# ---------------------------------------------------------------------- global generators


def _global_states() -> dict[str, Any]:
    numpy: Any = np.random.get_state(legacy=False)["state"]  # noqa: NPY002 (the one that others draw from)
    return {
        "torch's": bytes(torch.get_rng_state().numpy()),
        "NumPy's": [v.tobytes() if isinstance(v, np.ndarray) else v for v in numpy.values()],
        "Python's": random.getstate(),
    }


def _drawn_from(before: dict[str, Any]) -> str | None:
    """Whose global generator moved since `before`."""
    now = _global_states()
    return next((name for name in now if now[name] != before[name]), None)

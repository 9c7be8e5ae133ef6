"""Data in random order or with random changes: resumed to the bit, or named with the reason."""

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from bilevel import CheckpointError
from bilevel.loaders import Repeated
from tests.core.resumed import DATA, Reading, assert_same, finish, make, seed

ROWS = TensorDataset(*DATA)


class Shuffled(Sampler[int]):
    """An order of its own, in one of the ways that people write."""

    def __init__(self, how: str) -> None:
        self.how, self.epoch = how, 0
        if how == "generator":
            self.source = seed()
        if how == "numpy":
            self.source = np.random.default_rng(3)

    def __len__(self) -> int:
        return 12

    def __iter__(self) -> Iterator[int]:
        self.epoch += 1
        source = {"generator": lambda: self.source}.get(self.how, lambda: seed(self.epoch))()
        return iter(torch.randperm(12, generator=source).tolist())


class Remembering(Shuffled):
    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch = state["epoch"]


class Augmented(TensorDataset):
    """Adds noise to its rows, from a generator of its own or a global one."""

    def __init__(self, draw: Callable[[], float] | None = None) -> None:
        super().__init__(*DATA)
        self.noise = seed(5)
        self.draw = draw

    def __getitem__(self, index: Any) -> Any:
        inputs, targets = super().__getitem__(index)
        own = torch.rand((), generator=self.noise, dtype=torch.double)
        return inputs + (own if self.draw is None else self.draw()), targets


class Stream(IterableDataset[Any]):
    """Rows one after the other, in an order that depends on a count of its epochs."""

    def __init__(self) -> None:
        self.epoch = 0

    def __iter__(self) -> Iterator[Any]:
        self.epoch += 1
        for index in torch.randperm(12, generator=seed(self.epoch)).tolist():
            yield DATA[0][index], DATA[1][index]

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch = state["epoch"]


class OwnPlace:
    """Knows its place in the middle of an epoch, as `torchdata`'s `StatefulDataLoader` does."""

    def __init__(self) -> None:
        self.epoch = self.taken = 0

    def __iter__(self) -> Iterator[Any]:
        order = torch.randperm(12, generator=seed(self.epoch)).split(5)
        while self.taken < len(order):
            self.taken += 1
            yield tuple(column[order[self.taken - 1]] for column in DATA)
        self.epoch, self.taken = self.epoch + 1, 0

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "taken": self.taken}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.taken = state["epoch"], state["taken"]


def replaced() -> RandomSampler:
    return RandomSampler(ROWS, replacement=True, num_samples=40, generator=seed())


def distributed() -> DataLoader[Any]:
    return DataLoader(ROWS, 5, sampler=DistributedSampler(ROWS, 1, 0, shuffle=True))


weights = torch.arange(1.0, 13.0)
RESUMABLE: dict[str, Callable[[], Any]] = {
    "weighted": lambda: DataLoader(
        ROWS, 5, sampler=WeightedRandomSampler(weights, 12, generator=seed())
    ),
    "subset": lambda: DataLoader(ROWS, 4, sampler=SubsetRandomSampler(range(8), generator=seed())),
    "random": lambda: DataLoader(ROWS, 5, sampler=RandomSampler(ROWS, generator=seed())),
    "replacement": lambda: DataLoader(ROWS, 5, sampler=replaced()),
    "nested": lambda: DataLoader(ROWS, batch_sampler=BatchSampler(replaced(), 5, True)),
    "distributed": distributed,
    "in order": lambda: DataLoader(ROWS, 5),
    "list": lambda: DataLoader(ROWS, 2, sampler=[3, 1, 2, 7]),
    "own generator": lambda: DataLoader(ROWS, 5, sampler=Shuffled("generator")),
    "own state": lambda: DataLoader(ROWS, 5, sampler=Remembering("count")),
    "augmented": lambda: DataLoader(Augmented(), 5, shuffle=True, generator=seed()),
    "two data sets": lambda: DataLoader(
        ConcatDataset([Augmented(), ROWS]), 5, shuffle=True, generator=seed()
    ),
    "stream": lambda: DataLoader(Stream(), 5),
    "own place": OwnPlace,
}


def assert_resumes(make_data: Callable[[], Any], path: Path, stops: Sequence[int] = (1, 3)) -> None:
    def fresh(**changes: Any) -> dict[str, Any]:
        settings = {"problem": Reading(), "upper_data": None, "batch_size": None, "lower_steps": 1}
        return make(**{**settings, "data": make_data(), **changes})

    whole = finish(fresh(num_steps=5))
    for stop in stops:
        finish(fresh(num_steps=5), path, stop)
        assert_same(finish(fresh(num_steps=5, resume=path)), whole)


@pytest.mark.parametrize("name", RESUMABLE)
def test_data_in_any_order_resume_to_the_bit(name: str, tmp_path: Path) -> None:
    """Samplers of their own went on in another order, without a word."""
    assert_resumes(RESUMABLE[name], tmp_path / "run.pt")


def test_workers_resume_to_the_bit(tmp_path: Path) -> None:
    """What they draw comes from a seed that the loader's generator gives them, epoch by epoch."""
    noise = Augmented(lambda: float(torch.rand(())))
    loader = lambda: DataLoader(noise, 6, shuffle=True, generator=seed(), num_workers=1)  # noqa: E731
    assert_resumes(loader, tmp_path / "run.pt", stops=[3])


class Loop:
    """A stream of the user's own that shuffles in some way."""

    def __init__(self, order: Callable[[], list[int]]) -> None:
        self.order = order

    def __iter__(self) -> Iterator[Any]:
        for index in self.order():
            yield DATA[0][index : index + 2], DATA[1][index : index + 2]


def by_python() -> list[int]:
    return random.sample(range(10), 10)


def by_numpy() -> list[int]:
    return np.random.permutation(10).tolist()  # noqa: NPY002


UNRESUMABLE: dict[str, tuple[Callable[[], Any], str]] = {
    "shuffle": (lambda: DataLoader(ROWS, 5, shuffle=True), "shuffles from torch's global"),
    "nested": (
        lambda: DataLoader(ROWS, batch_sampler=BatchSampler(RandomSampler(ROWS), 5, True)),
        "shuffles from torch's global generator",
    ),
    "weighted": (
        lambda: DataLoader(ROWS, 5, sampler=WeightedRandomSampler(weights, 12)),
        r"shuffles from torch's global .*give it `generator=.*`WeightedRandomSampler`",
    ),
    "subset": (
        lambda: DataLoader(ROWS, 5, sampler=SubsetRandomSampler(range(8))),
        "shuffles from torch's global generator",
    ),
    "a count of its own": (
        lambda: DataLoader(ROWS, 5, sampler=Shuffled("count")),
        "the order that the sampler `Shuffled` gives could not be had again",
    ),
    "workers": (
        lambda: DataLoader(ROWS, 5, num_workers=1),
        "workers of this `DataLoader` get their seeds from torch's global generator",
    ),
    "workers that stay": (
        lambda: DataLoader(ROWS, 5, num_workers=1, persistent_workers=True, generator=seed()),
        "use `persistent_workers=False`",
    ),
    "torch": (
        lambda: DataLoader(Augmented(lambda: float(torch.rand(()))), 5),
        "the data draw from torch's global generator while they are read",
    ),
    "numpy": (lambda: Loop(by_numpy), "the data draw from NumPy's global generator"),
    "python": (lambda: Loop(by_python), "the data draw from Python's global generator"),
}


@pytest.mark.parametrize("name", UNRESUMABLE)
def test_data_that_could_not_be_had_again_are_named(name: str, tmp_path: Path) -> None:
    """A checkpoint that could not be resumed is not written."""
    make_data, match = UNRESUMABLE[name]
    source = Repeated(make_data())
    if "workers" not in name:
        next(source)
    with pytest.raises(CheckpointError, match=match):
        source.state_dict()

"""Competitors take turns, so that a busy machine slows all of them alike."""

import random
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch

Run: TypeAlias = Callable[[], Any]
Clock: TypeAlias = Callable[[], float]


def in_turns(
    runs: Mapping[str, Run],
    rounds: int,
    *,
    warm_up: int = 0,
    repeats: int | Mapping[str, int] = 1,
    shuffle: bool = False,
    clock: Clock = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of one run of every competitor in every round.

    Args:
        runs: the competitors, by name.
        rounds: how often each has its turn.
        warm_up: rounds before these that do not count.
        repeats: runs in a turn, for all or by name.
        shuffle: give the turns in another order in every round, the same at every call.
        clock: what the time is read from.
    """
    counts = dict.fromkeys(runs, repeats) if isinstance(repeats, int) else repeats
    taken: dict[str, list[float]] = {name: [] for name in runs}
    order = list(runs)
    for number in range(warm_up + rounds):
        if shuffle:
            random.Random(number).shuffle(order)
        for name in order:
            start = clock()
            for _ in range(counts[name]):
                runs[name]()
            if number >= warm_up:
                taken[name].append((clock() - start) / counts[name])
    return taken


def waiting_for(device: str) -> Clock:
    """A clock that is read when the device has done what it was given."""

    def clock() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    return clock

"""What calls cost: seconds, in turns, and the peak of the memory that torch allocates."""

import contextlib
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, final

import torch

Call: TypeAlias = Callable[[], Any]


@final
@dataclass(frozen=True)
class CallCost:
    """What a call costs.

    Attributes:
        seconds: the median over the rounds.
        peak_bytes: the most that torch holds at a time during a call, beyond what was there before;
            temporary tensors and what autograd keeps among it. `None` if it could not be watched.
    """

    seconds: float
    peak_bytes: int | None


def seconds_of(call: Call, device: torch.device) -> tuple[float, Any]:
    """How long a call takes, the device's work included, and what it returns."""
    wait_for(device)
    begun = time.perf_counter()
    out = call()
    wait_for(device)
    return time.perf_counter() - begun, out


def measure(
    calls: Mapping[str, Call], rounds: int, device: torch.device
) -> tuple[dict[str, CallCost], dict[str, Exception]]:
    """What each call costs. They take turns, so that a busy machine slows all of them alike.

    Args:
        calls: by name; each was called once before, so that nothing is left to compile.
        rounds: turns that are timed, after one that is not.
        device: what the calls compute on.

    Returns:
        The costs, and for calls that failed the error.
    """
    taken: dict[str, list[float]] = {name: [] for name in calls}
    failed: dict[str, Exception] = {}
    for number in range(1 + rounds):
        for name, call in calls.items():
            if name in failed:
                continue
            try:
                seconds, _ = seconds_of(call, device)
            except Exception as error:  # of a solver of the user's: the others go on
                failed[name] = error
                continue
            if number:
                taken[name].append(seconds)
    costs = {
        name: CallCost(statistics.median(taken[name]), peak_bytes_of(call, device))
        for name, call in calls.items()
        if name not in failed
    }
    return costs, failed


def wait_for(device: torch.device) -> None:
    """Wait until a device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def peak_bytes_of(call: Call, device: torch.device) -> int | None:
    """The most that torch holds at a time during a call, beyond what was there before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    return _peak_of_allocations(call) if device.type == "cpu" else None


def _peak_of_allocations(call: Call) -> int | None:
    """By torch's profiler, which sees every allocation on the processor, compiled code included."""
    profiler = torch.autograd.profiler.profile(profile_memory=True)
    try:
        with _muted():
            profiler.__enter__()
    except RuntimeError:  # somebody else profiles
        return None
    try:
        call()
    finally:
        with _muted():
            profiler.__exit__(None, None, None)
    found = profiler.kineto_results
    if found is None:
        return None
    events: list[Any] = found.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    held = peak = 0
    for _, change in sorted(changes, key=lambda pair: pair[0]):
        held += change
        peak = max(peak, held)
    return peak


@contextlib.contextmanager
def _muted() -> Iterator[None]:
    """Without the two lines that the profiler's C++ writes to the standard error at every start."""
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)

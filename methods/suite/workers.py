"""Cells in several processes: each trains one after another, the parent alone writes and tells."""

import contextlib
import multiprocessing
import pickle
import signal
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess
from typing import Any, NamedTuple, TypeAlias, final

import torch

from bilevel.methods.suite.config import Cell
from bilevel.refusals import whole

RunCell: TypeAlias = Callable[[Cell], dict[str, Any]]
MakeRun: TypeAlias = Callable[..., RunCell]
_PATIENCE = 5.0  # seconds in which a worker that was asked to end has to


@final
class CrashError(RuntimeError):
    """Cells ended by an error that says nothing about their method; the others were run."""


@final
class Outcome(NamedTuple):
    """How a cell ended.

    Attributes:
        record: what it left; `None` if it crashed.
        reason: why it crashed, in a sentence.
        trace: where in the code, if it was an exception.
    """

    record: dict[str, Any] | None
    reason: str = ""
    trace: str = ""


def crash_of(error: Exception) -> Outcome:
    """An exception as an outcome."""
    return Outcome(None, f"{type(error).__name__}: {error}", traceback.format_exc())


@final
class _Worker(NamedTuple):
    process: SpawnProcess
    pipe: Any


def in_processes(
    cells: Iterable[Cell], jobs: int, make: MakeRun, given: Mapping[str, Any]
) -> Generator[tuple[Cell, Outcome], None, None]:
    """Run cells in processes of their own, a share of torch's threads each.

    A process that dies (out of memory, a fault in C code) costs its cell; another takes its place.
    Leaving the iteration ends all of them.

    Args:
        cells: what to run.
        jobs: how many processes at once.
        make: a function of a module that makes, in each process, what runs a cell.
        given: its arguments; they are sent to the processes.

    Yields:
        Every cell and its record, or how it crashed, as they end.

    Raises:
        ValueError: if an argument cannot be sent.
    """
    waiting = deque(cells)
    busy: dict[Any, tuple[_Worker, Cell]] = {}
    threads = max(1, torch.get_num_threads() // whole("jobs", jobs))
    sent = _packed(given)
    workers: list[_Worker] = []

    def begin(worker: _Worker) -> None:
        cell = waiting.popleft()
        busy[worker.pipe] = (worker, cell)
        with contextlib.suppress(OSError):  # it died already, which is noticed below
            worker.pipe.send(cell)

    try:
        for _ in range(min(jobs, len(waiting))):
            workers.append(_start(make, sent, threads))
            begin(workers[-1])
        while busy:
            for pipe in wait(list(busy)):
                worker, cell = busy.pop(pipe)
                outcome = _received(worker)
                if outcome is None:
                    outcome = Outcome(None, f"its process died ({_death(worker.process)})")
                    worker = _start(make, sent, threads) if waiting else worker
                    workers.append(worker)
                if waiting:
                    begin(worker)
                yield cell, outcome
    finally:
        _end(workers)


def _packed(given: Mapping[str, Any]) -> bytes:
    try:
        return pickle.dumps(dict(given))
    except Exception as error:
        raise ValueError(
            f"with several `jobs` every object has to be sent to other processes, and one cannot be: "
            f"{error}; define classes and functions at the top of a module, or leave `jobs` out"
        ) from None


def _start(make: MakeRun, sent: bytes, threads: int) -> _Worker:
    """A process that waits for cells; Ctrl-C does not reach it, its parent ends it."""
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, make, sent, threads), daemon=True)
    mask = getattr(signal, "pthread_sigmask", None)  # unknown to Windows
    if mask:
        resource_tracker.ensure_running()  # what `start` would do, taking the mask off
    before = mask(signal.SIG_BLOCK, [signal.SIGINT]) if mask else None
    try:
        process.start()
    finally:
        if mask:
            mask(signal.SIG_SETMASK, before)
    theirs.close()
    return _Worker(process, pipe)


def _work(pipe: Any, make: MakeRun, sent: bytes, threads: int) -> None:
    """What a process does until its parent closes the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    run: RunCell | None = None
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            cell = pipe.recv()
            try:
                run = make(**pickle.loads(sent)) if run is None else run
                outcome = Outcome(run(cell))
            except Exception as error:
                outcome = crash_of(error)
            pipe.send(outcome)


def _received(worker: _Worker) -> Outcome | None:
    """What a process sent, `None` if it died."""
    try:
        outcome: Outcome = worker.pipe.recv()
    except (EOFError, OSError):
        return None
    return outcome


def _death(process: SpawnProcess) -> str:
    process.join(_PATIENCE)
    code = process.exitcode
    if code is not None and code < 0:
        with contextlib.suppress(ValueError):
            name = signal.Signals(-code).name
            return f"{name}, out of memory perhaps" if name == "SIGKILL" else name
    return f"exit status {code}"


def _end(workers: Iterable[_Worker]) -> None:
    for worker in workers:
        worker.pipe.close()
        worker.process.terminate()
    for worker in workers:
        worker.process.join(_PATIENCE)
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join()

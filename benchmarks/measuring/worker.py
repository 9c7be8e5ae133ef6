"""Competitors that live in another process, with an environment of its own, and take turns with ours.

The parent writes one request per line to the worker's standard input, the worker answers each with one
line; both are JSON lists. Arrays travel as `.npz` files. Between two requests the worker waits without
using the processor, so that two processes can share one core.

    ["prepare", problem.npz, {settings}]  ->  ["ok", {"names": [...], "versions": {...}}]
    ["first", name, answer.npz]           ->  ["ok", {"processor": ..., "wall": ...}]
    ["run", name, repeats]                ->  ["ok", {"processor": ..., "wall": ...}]

What goes wrong is answered by `["error", text]`. The worker ends with its input. This module is all
that the two processes share; it needs NumPy alone.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, final

import numpy as np

Run: TypeAlias = Callable[[], Any]
Arrays: TypeAlias = Mapping[str, np.ndarray]
Build: TypeAlias = Callable[[Arrays, Mapping[str, Any]], Mapping[str, Run]]
ROOT = Path(__file__).resolve().parents[2]


@final
@dataclass(frozen=True)
class Taken:
    """Seconds of one run: of the processor, and on the clock."""

    processor: float
    wall: float


def take(run: Run, repeats: int) -> Taken:
    """The time of one run, the mean of `repeats` in a row."""
    wall, processor = time.perf_counter(), time.process_time()
    for _ in range(repeats):
        run()
    processor, wall = time.process_time() - processor, time.perf_counter() - wall
    return Taken(processor / repeats, wall / repeats)


def serve(build: Build, versions: Mapping[str, str]) -> None:
    """Answer requests until the input ends: what a worker's program calls.

    Args:
        build: makes the competitors of a problem from its arrays and settings. Each is called without
            arguments, returns a sequence of arrays and is done when it returns.
        versions: of what the competitors are made of.
    """
    answers = os.fdopen(os.dup(1), "w")  # a library that prints must not speak in between
    os.dup2(2, 1)
    runs: dict[str, Run] = {}
    for line in sys.stdin:
        try:
            answer = ["ok", _answered(json.loads(line), build, versions, runs)]
        except Exception as error:  # whatever it is, the parent has to know
            answer = ["error", f"{type(error).__name__}: {error}"]
        print(json.dumps(answer), file=answers, flush=True)


def _answered(
    request: Sequence[Any], build: Build, versions: Mapping[str, str], runs: dict[str, Run]
) -> dict[str, Any]:
    match request:
        case ["prepare", path, settings]:
            with np.load(path) as arrays:
                made = build(dict(arrays), settings)
            runs.clear()
            runs.update(made)
            return {"names": list(runs), "versions": dict(versions)}
        case ["first", name, path]:
            answers: list[Any] = []
            taken = take(lambda: answers.append(runs[name]()), 1)
            np.savez(path, *map(np.asarray, answers[0]))
            return vars(taken)
        case ["run", name, repeats]:
            return vars(take(runs[name], repeats))
    raise ValueError(f"unknown request {request!r}")


@final
class Worker:
    """The parent's side of a worker; a context that ends it.

    Args:
        command: what starts the worker, in the root of the checkout.
        environment: variables beside those of this process.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._log = Path(self._folder.name) / "log"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, **environment},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._folder.cleanup()

    def prepare(self, arrays: Arrays, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Give it a problem; the names of its competitors and the versions of what they are made of."""
        path = Path(self._folder.name) / "problem.npz"
        np.savez(path, **arrays)
        return self._ask("prepare", str(path), dict(settings))

    def first(self, name: str) -> tuple[Taken, list[np.ndarray]]:
        """The time of a competitor's first run, compiling included, and its answer."""
        path = Path(self._folder.name) / "answer.npz"
        taken = Taken(**self._ask("first", name, str(path)))
        with np.load(path) as found:
            return taken, [found[key] for key in found]

    def run(self, name: str, repeats: int) -> Taken:
        """A competitor's turn."""
        return Taken(**self._ask("run", name, repeats))

    def _ask(self, *request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            print(json.dumps(request), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            last = self._log.read_text(encoding="utf-8", errors="replace").strip()[-2000:]
            raise RuntimeError(f"the worker ended before it answered {request[:2]}:\n{last}")
        kind, content = json.loads(line)
        if kind == "error":
            raise RuntimeError(f"the worker's answer to {request[:2]}: {content}")
        return dict(content)

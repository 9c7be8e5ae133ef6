"""The benchmark beside JAX: two processes that take turns, answers checked first, goals beside numbers.

JAX is not needed here: a worker of a few lines stands in for it.
"""

import ast
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import compiled_speed
from benchmarks.cases.compiled import setting
from benchmarks.competitors.compiled import OURS, REFERENCE, competitors
from benchmarks.measuring.worker import Taken, Worker
from benchmarks.pages.compiled import compiled_text, goals

ROOT = Path(__file__).resolve().parent.parent
WORKER = """
import os
from benchmarks.measuring.worker import serve

def build(arrays, settings):
    print("something else")  # must not come between the answers
    def failing():
        raise ValueError("no such root")
    return {
        "twice": lambda: [2 * arrays["a"], settings["b"]],
        "failing": failing,
        "dying": lambda: os._exit(3),
    }

serve(build, {"numpy": "1"})
"""


@pytest.fixture
def worker() -> Iterator[Worker]:
    with Worker([sys.executable, "-c", WORKER], {}) as running:
        yield running


def test_a_worker_prepares_answers_and_takes_its_turns(worker: Worker) -> None:
    made = worker.prepare({"a": np.arange(3.0)}, {"b": 5})
    assert made == {"names": ["twice", "failing", "dying"], "versions": {"numpy": "1"}}
    taken, (first, second) = worker.first("twice")
    assert taken.wall > 0
    np.testing.assert_array_equal(first, [0.0, 2.0, 4.0])
    assert second == 5
    for repeats in (1, 3):
        assert worker.run("twice", repeats).wall > 0


def test_what_goes_wrong_in_a_worker_is_said_here(worker: Worker) -> None:
    worker.prepare({"a": np.zeros(1)}, {"b": 0})
    with pytest.raises(RuntimeError, match="ValueError: no such root"):
        worker.first("failing")
    assert worker.run("twice", 1).wall > 0  # it goes on
    with pytest.raises(RuntimeError, match="the worker ended before it answered"):
        worker.run("dying", 1)


def test_a_missing_environment_is_refused_before_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["compiled_speed", "--jax", str(tmp_path / "python")])
    monkeypatch.delattr(compiled_speed, "one_core")
    with pytest.raises(SystemExit, match="run `make jax` first"):
        compiled_speed.main()


def test_nothing_is_timed_where_answers_differ() -> None:
    truth = np.ones(4)
    answers = {"right": truth + 1e-12, "wrong": truth + 1e-8, "broken": truth * np.nan}
    with pytest.raises(RuntimeError, match=r"by more than 1e-10.*: wrong: 1\.0e-08; broken: nan"):
        compiled_speed.agree(answers, truth, 1e-10)
    apart = compiled_speed.agree({"right": answers["right"]}, truth, 1e-10)
    assert apart["right"] == pytest.approx(1e-12, rel=1e-3)


def test_everyone_has_a_turn_in_every_round() -> None:
    calls: list[tuple[str, int]] = []

    def taker(name: str, seconds: float) -> compiled_speed.Taker:
        def turn(repeats: int) -> Taken:
            calls.append((name, repeats))
            return Taken(seconds, seconds)

        return turn

    takers = {"a": taker("a", 0.01), "b": taker("b", 1.0)}
    taken = compiled_speed.in_rounds(takers, 3, 0.02)
    assert calls[:4] == [("a", 1), ("a", 2), ("b", 1), ("b", 2)]  # warm, and how many make a turn
    for number in range(3):
        assert sorted(calls[4 + 2 * number :][:2]) == [("a", 2), ("b", 1)]
    assert taken == {"a": [Taken(0.01, 0.01)] * 3, "b": [Taken(1.0, 1.0)] * 3}


@pytest.mark.filterwarnings("ignore::FutureWarning:torchopt")
@pytest.mark.parametrize("kind", compiled_speed.KINDS)
@pytest.mark.parametrize("problem", ["small", "logistic"])
def test_rivals_in_torch_compute_what_we_compute(problem: str, kind: str) -> None:
    s = setting(problem, torch.float64)
    answers = {
        name: compiled_speed.vector([g.detach() for g in make(s)()])
        for name, make in competitors(problem, kind).items()
        if name != OURS  # compiling takes seconds; the command itself checks it
    }
    compiled_speed.agree(answers, answers[REFERENCE], 1e-10)


def test_a_middle_setting_is_the_same_in_both_precisions() -> None:
    double, single = (
        setting("middle", torch.float64).arrays(),
        setting("middle", torch.float32).arrays(),
    )
    assert single.keys() == double.keys()
    for name, array in single.items():
        np.testing.assert_array_equal(array, double[name].astype(array.dtype))


def record(problem: str, kind: str, milliseconds: dict[str, float]) -> dict[str, Any]:
    own = milliseconds[OURS]
    return {
        "problem": problem,
        "kind": kind,
        "dtype": "float32",
        "load": 0.5,
        "commit": "abc",
        "device": "cpu",
        "threads": 1,
        "versions": {"torch": "2"},
        "jax_versions": {"jax": "1"},
        "numbers": [
            {"name": name, "ms": ms, "ratio": ms / own, "first_seconds": None, "difference": 1e-7}
            for name, ms in milliseconds.items()
        ],
    }


def cold(kind: str, steps: int, first: float, later: float) -> dict[str, Any]:
    about = {"kind": kind, "cold_steps": steps, "dtype": "float32", "load": 1.5, "commit": "abc"}
    environment = {"versions": {"torch": "2"}, "device": "cpu", "threads": 1}
    return {**about, **environment, "first": first, "later": later}


def test_goals_are_judged_from_the_records() -> None:
    times = {OURS: 2.0, "JAX, slow": 4.0, "JAX, fast": 1.0, "torchopt, one": 20.0}
    records = [
        record("small", "implicit", {**times, OURS: 9.0}),  # an older one
        record("small", "implicit", times),
        record("middle", "unrolled", times),
        record("logistic", "implicit", {**times, OURS: 0.1}),
        cold("unrolled", 10, 10.0, 0.0),
        cold("unrolled", 1000, 13.0, 2.0),
    ]
    lines = compiled_text(records).splitlines()
    assert lines[0].startswith(
        "torch 2; cpu, 1 thread(s), jax 1; commit abc; load average 0.5 to 1.5."
    )

    def line(start: str) -> Sequence[str]:
        (found,) = [text for text in lines if text.startswith(f"| {start}")]
        return [cell.strip() for cell in found.strip("|").split("|")][1:]

    small = "small MLP, implicit, 20 CG steps: time"
    assert line(f"{small} / JAX") == ["float32", "1.2", "2", "JAX, fast", "no: 1.7 x the goal"]
    assert line(f"{small} / torchopt") == ["float32", "0.15", "0.1", "torchopt, one", "yes"]
    middle = "middle MLP, unrolled, 20 steps: time / best"
    assert line(middle) == ["float32", "1", "2", "JAX, fast", "no: 2 x the goal"]
    logistic = "logistic regression, implicit, 10 CG steps: ms"
    assert line(logistic) == ["float32", "0.2", "0.1", "", "yes"]
    assert line("first of unrolled, 1,000 steps") == ["float32", "20", "13", "", "yes"]
    assert line("compiling for 10, 1,000 steps")[2:] == ["1.1", "", "yes"]


def test_a_run_without_records_says_so() -> None:
    assert compiled_text([]) == "Nothing was timed."
    assert not list(goals({}, {}))


def test_the_side_of_jax_needs_nothing_of_ours() -> None:
    """It runs where neither torch nor this library is installed."""
    for name in ("in_jax/hypergradients", "in_jax/problems", "measuring/worker"):
        tree = ast.parse((ROOT / "benchmarks" / f"{name}.py").read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            assert not {n.split(".")[0] for n in names} & {"torch", "torchopt", "bilevel"}, name


def test_every_version_beside_jax_is_pinned() -> None:
    lines = (ROOT / "benchmarks" / "jax.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert pins.keys() >= {"jax", "jaxlib", "jaxopt", "optimistix", "lineax", "equinox", "optax"}
    assert all(re.fullmatch(r"[0-9][0-9a-z.]*", version) for version in pins.values())

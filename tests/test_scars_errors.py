"""Errors travel between processes with their message and what they carry."""

import ast
import concurrent.futures
import multiprocessing
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bilevel import (
    CheckpointError,
    ConjugateGradient,
    DivergenceError,
    HypergradientError,
    Implicit,
)
from bilevel.cli.options import UsageError
from bilevel.distributed import LostRankError
from tests.problems import Quadratic


def failure() -> HypergradientError:
    with pytest.raises(HypergradientError) as caught:
        Implicit(ConjugateGradient(max_steps=1, rtol=1e-12)).hypergradient(Quadratic())
    caught.value.hypergradient.grad["x"].requires_grad_()
    caught.value.hypergradient.stats.direct_norm.requires_grad_()
    caught.value.add_note("at step 1")
    return caught.value


ERRORS: dict[str, Callable[[], BaseException]] = {
    "HypergradientError": failure,
    "DivergenceError": lambda: DivergenceError(3, "loss", float("nan"), "Do less"),
    "CheckpointError": lambda: CheckpointError("truncated"),
    "LostRankError": lambda: LostRankError("gone"),
    "UsageError": lambda: UsageError("no such option"),
}


def test_every_error_that_takes_more_than_a_message_is_among_those_tried() -> None:
    """One whose `__init__` is not that of `Exception` needs a `__reduce__`."""
    root = Path(__file__).resolve().parent.parent
    found = set()
    for path in [*(root / "bilevel").rglob("*.py"), *(root / "methods").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and any(
                ast.unparse(base).endswith(("Error", "Exception", "Warning")) for base in node.bases
            ):
                own = {item.name for item in node.body if isinstance(item, ast.FunctionDef)}
                if own & {"__init__", "__new__"}:
                    found.add(node.name)
    assert found
    assert found <= ERRORS.keys()


@pytest.mark.parametrize("name", ERRORS)
def test_errors_travel_with_message_attributes_and_notes(name: str) -> None:
    """They could not be unpickled; a process pool broke and all its results were lost."""
    error = first = ERRORS[name]()
    if not hasattr(error, "__notes__"):
        error.add_note("a note")
    for _ in range(2):
        back = pickle.loads(pickle.dumps(error))
        assert type(back) is type(error)
        assert str(back) == str(error)
        assert back.__notes__ == error.__notes__
        for attribute, value in vars(error).items():
            if attribute != "hypergradient":
                assert getattr(back, attribute) == value
        error = back
    if isinstance(first, HypergradientError):
        assert isinstance(back, HypergradientError)
        assert torch.equal(back.hypergradient.grad["x"], first.hypergradient.grad["x"])
        assert back.hypergradient.result is first.hypergradient.result
        assert not back.hypergradient.grad["x"].requires_grad


def test_a_record_that_no_pickle_can_hold_does_not_keep_the_message() -> None:
    error = HypergradientError("no success", {"state": lambda: None})
    back = pickle.loads(pickle.dumps(error))
    assert str(back) == "no success"
    assert back.hypergradient is None


def fail(error: BaseException) -> None:
    raise error


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_process_pool_survives_a_diverging_worker() -> None:
    """The failing one told nothing and took the results of all others with it."""
    error = failure()
    context = multiprocessing.get_context("fork")
    pool = concurrent.futures.ProcessPoolExecutor(1, mp_context=context)
    try:
        futures = [pool.submit(fail, e) for e in (error, DivergenceError(7, "loss", float("inf")))]
        last = pool.submit(abs, -2)
        with pytest.raises(HypergradientError) as caught:
            futures[0].result(60)
        with pytest.raises(DivergenceError, match="at step 7"):
            futures[1].result(60)
        assert last.result(60) == 2
    finally:
        workers = list((pool._processes or {}).values())
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in workers:
            worker.kill()
    assert torch.equal(caught.value.hypergradient.grad["x"], error.hypergradient.grad["x"])

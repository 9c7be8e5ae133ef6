"""Modules and classes under their earlier names: the very ones, once."""

import importlib
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

import bilevel.problem
from bilevel import Problem
from bilevel.functions import FunctionProblem, Variables
from bilevel.moved import NEW_NAMES


@pytest.mark.parametrize(("earlier", "new"), sorted(NEW_NAMES.items()))
def test_an_earlier_name_gives_the_module_that_moved(earlier: str, new: str) -> None:
    moved, module = importlib.import_module(earlier), importlib.import_module(new)
    assert moved is module
    assert module.__name__ == new
    assert module.__spec__ is not None
    assert module.__spec__.name == new


def test_no_earlier_name_is_in_use_again() -> None:
    """Nor does one lead to another earlier name."""
    assert not NEW_NAMES.keys() & set(NEW_NAMES.values())


def upper_loss(x: Any, y: Any, batch: Any) -> Tensor:
    loss: Tensor = (x["x"] * y["y"]).sum()
    return loss


def lower_loss(x: Any, y: Any, batch: Any) -> Tensor:
    loss: Tensor = (y["y"] - x["x"]).square().sum()
    return loss


class Earlier(pickle.Pickler):
    """Writes a problem made of functions as it was when its class was in `bilevel.problem`."""

    def reducer_override(self, obj: Any) -> Any:
        if obj in (FunctionProblem, Variables):
            return getattr, (bilevel.problem, obj.__name__)
        if isinstance(obj, type(bilevel.problem)):
            return importlib.import_module, (obj.__name__,)
        return NotImplemented


def test_a_pickle_of_an_earlier_problem_of_functions_is_read() -> None:
    problem = Problem.from_functions(
        upper_loss, lower_loss, {"x": torch.full((2,), 2.0)}, {"y": torch.ones(2)}
    )
    vars(problem)["_losses"] = {"upper": upper_loss, "lower": lower_loss}
    written = io.BytesIO()
    Earlier(written).dump(problem)
    back: Problem = pickle.loads(written.getvalue())
    assert type(back) is FunctionProblem
    again: Problem = pickle.loads(pickle.dumps(back))
    with torch.no_grad():
        for read in (back, again):
            assert (read.upper_loss(None), read.lower_loss(None)) == (4.0, 2.0)

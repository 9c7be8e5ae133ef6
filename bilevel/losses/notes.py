"""`note_on_call`: what to look at when a person's own loss or `draw` has raised an error."""

from typing import Any

import optree
from torch import Tensor

from bilevel.problem import Problem

RAW = (RuntimeError, TypeError, KeyError, AttributeError, IndexError)
"""Errors that Python and torch raise by themselves."""

METHODS = {  # what an evaluation asks a problem for, and the method that answers
    **{"upper": "upper_loss", "lower": "lower_loss", "share": "share"},
    "initial_lower": "initial_lower",
    **{"condition": "lower_condition", "constraints": "lower_constraints"},
}
_MOST = 6  # tensors of a batch that are described


def note_on_call(error: Exception, problem: Problem, call: str, batch: Any) -> None:
    """Add to an error where it arose, what the batch was, and what to do if that is known.

    Args:
        error: what was raised.
        problem: whose method was called.
        call: what was called, such as "upper_loss"; with its arguments where it may lack one.
        batch: what it was called with.
    """
    where = f"raised inside `{type(problem).__name__}.{call}`"
    said = f"{where}; {_described(batch)}{_advice(problem, batch)}"
    if said not in getattr(error, "__notes__", []):
        error.add_note(said)


def _described(batch: Any) -> str:
    if batch is None:
        return (
            "the batch is `None`, because no data were given (`data` of `train`, `upper_batch` and "
            "`lower_batches` of a solver)"
        )
    leaves = optree.tree_leaves(batch, none_is_leaf=True)
    shown = [_leaf(leaf) for leaf in leaves[:_MOST]] + (["..."] if len(leaves) > _MOST else [])
    kind = f"a `{type(batch).__name__}` of " if not isinstance(batch, Tensor) else ""
    return f"the batch is {kind}{', '.join(shown)}"


def _leaf(leaf: Any) -> str:
    if isinstance(leaf, Tensor):
        dtype = str(leaf.dtype).removeprefix("torch.")
        return f"{dtype} {tuple(leaf.shape)} on {leaf.device}"
    return f"a `{type(leaf).__name__}`"


def _advice(problem: Problem, batch: Any) -> str:
    first = next(problem.parameters(), None)
    leaves = [leaf for leaf in optree.tree_leaves(batch) if leaf is not None]
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if first is None or batch is None:
        return ""
    if any(type(leaf).__module__ == "numpy" for leaf in leaves):
        return "; convert arrays with `torch.as_tensor`"
    mine = str(first.dtype).removeprefix("torch.")
    devices = {t.device for t in tensors} - {first.device}
    if devices:
        return f"; the variables are on {first.device}: move the batch there"
    if any(t.is_floating_point() and t.dtype != first.dtype for t in tensors):
        return (
            f"; the variables are {mine}: convert the data (`.to(torch.{mine})`), or the problem "
            "(`problem.double()`)"
        )
    if tensors and not any(t.is_floating_point() for t in tensors):
        return (
            f"; the variables are {mine}: networks take floating-point inputs, `.to(torch.{mine})`"
        )
    return f"; the variables are {mine}"

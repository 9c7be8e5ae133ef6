"""`refuse_other_state`: a state that a solver did not return, before it is computed with."""

from collections.abc import Mapping
from itertools import starmap
from typing import Any

from torch import Tensor

from bilevel.refusals import shown


def refuse_other_state(solver: str, state: Any, begun: Any) -> None:
    """Refuse a state that is not like the solver's own at the start.

    Args:
        solver: name of the solver.
        state: what was given.
        begun: what `Solver.begin` returns for this problem; `None` takes any state.

    Raises:
        ValueError: if names, shapes, dtypes or devices differ.

    Example:
        >>> refuse_other_state("F2SA", {"calls": 1}, {"calls": 0})
    """
    if begun is not None and not _alike(state, begun):
        raise ValueError(
            f"`state` is no state of `{solver}` for this problem, got {_told(state)} where it begins "
            f"with {_told(begun)}; give `Hypergradient.state` of this solver's previous call on this "
            "problem, or leave it out to begin afresh"
        )


def _alike(state: Any, begun: Any) -> bool:
    """Whether two states have the same names, shapes, dtypes and devices; lists may differ in length."""
    if isinstance(begun, Tensor):
        if not isinstance(state, Tensor):
            return False
        return (state.shape, state.dtype, state.device) == (begun.shape, begun.dtype, begun.device)
    if isinstance(begun, Mapping):
        if not isinstance(state, Mapping) or state.keys() != begun.keys():
            return False
        return all(_alike(state[name], begun[name]) for name in begun)
    if isinstance(begun, (list, tuple)):
        pairs = zip(state, begun, strict=False)
        return isinstance(state, (list, tuple)) and all(starmap(_alike, pairs))
    return begun is None or not isinstance(state, (Tensor, Mapping, list, tuple, str, type(None)))


def _told(state: Any) -> str:
    """A state in a few words: its names, and the shapes of its tensors."""
    if isinstance(state, Tensor):
        return f"a tensor of shape {tuple(state.shape)} ({state.dtype}, {state.device})"
    if isinstance(state, Mapping):
        parts = [f"{name}: {_told(part)}" for name, part in state.items()]
        return "{" + ", ".join(parts) + "}"
    if isinstance(state, (list, tuple)) and state:
        return f"a list of {len(state)} that begins with {_told(state[0])}"
    return shown(state)

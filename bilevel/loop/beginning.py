"""Where the lower variables are when a turn begins: where they were left, or at the start again."""

import torch

from bilevel.loop.settings import TurnSettings
from bilevel.losses.initial import initial_lower
from bilevel.losses.slots import Slots
from bilevel.oracles import Oracles
from bilevel.problem import Problem
from bilevel.solvers import Solver
from bilevel.state import State


def refuse_resets(problem: Problem, solver: Solver, settings: TurnSettings) -> None:
    """Refuse turns that begin anew where that undoes what they did, or cannot be.

    Raises:
        ValueError: naming both sides.
    """
    by = f"`{type(problem).__name__}.initial_lower`" if problem.gives_initial_lower else ""
    if settings.reset_lower and by:
        raise ValueError(f"{by} says where a turn begins; leave `reset_lower` out")
    if not (settings.reset_lower or by):
        return
    by = by or "`reset_lower`"
    if solver.moves_lower:
        raise ValueError(
            f"{by} puts the lower variables back in every turn, and `{type(solver).__name__}` moves "
            "them by one step a turn; choose `Unrolled` or `Implicit`"
        )
    if settings.upper_first and settings.lower_moves:
        raise ValueError(
            f"with order='upper_first' {by} undoes the lower steps before anything has seen them; "
            "choose order='lower_first'"
        )
    if settings.compile:
        raise ValueError(
            f"{by} begins every turn with fresh lower optimizers, whose state a graph would keep; use "
            "compile=False"
        )
    levels = (problem.variables(level).values() for level in ("upper", "lower"))
    upper, lower = ({id(p) for p in level} for level in levels)
    if upper & lower:
        raise ValueError(f"{by} would put back variables of the upper level, which share them")


@torch.no_grad()
def begin_anew(state: State, slots: Slots) -> None:
    """Put the lower variables where a turn begins, and forget what their optimizers know.

    Args:
        state: the run's state.
        slots: where the problem holds its variables.
    """
    problem, start = state.problem, state.lower_start
    if start is None and not problem.gives_initial_lower:
        return
    if start is None:
        oracles = Oracles(problem, None, [None], slots=slots)
        start = initial_lower(oracles, oracles.upper)
    for name, y in slots.variables("lower").items():
        if name in start:
            y.copy_(start[name])
    for optimizer in state.optimizers["lower"]:
        optimizer.state.clear()

"""`given_solver`: a solver that was given, or a sentence for what is none."""

from typing import Any

from bilevel.linear.base import LinearSolver
from bilevel.refusals import shown
from bilevel.solvers.alternating import Alternating
from bilevel.solvers.base import Solver


def given_solver(given: Any) -> Solver:
    """The solver that was given, `Alternating()` for `None`.

    Raises:
        TypeError: for a class, a name, a linear solver or anything else.
    """
    if given is None or isinstance(given, Solver):
        return given or Alternating()
    advice = "give one of the solvers: `Alternating()`, `Implicit()` or `Unrolled(num_steps)`"
    if isinstance(given, LinearSolver):
        advice = (
            f"a linear solver goes into `Implicit`: `solver=Implicit({type(given).__name__}())`"
        )
    elif isinstance(given, type) and issubclass(given, Solver):
        advice = f"give an instance, `{given.__name__}(...)`"
    raise TypeError(f"`solver` must be a solver, got {shown(given)}; {advice}")

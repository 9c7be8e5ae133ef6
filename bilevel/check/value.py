"""`Value`: F(x, y*(x)) and its gradient, to rounding; what a training is judged by."""

import contextlib
import copy
from collections.abc import Callable
from typing import final

import torch
from torch import Tensor

from bilevel.check.lower_solution import UnsolvedError, solve_closely
from bilevel.check.problems.case import Case
from bilevel.check.procedures import write
from bilevel.linear import Cholesky, ConjugateGradient
from bilevel.oracles import Oracles
from bilevel.problem import Problem
from bilevel.solvers import Implicit
from bilevel.tree import Layout

_DENSE = 1000  # most lower variables for which the Hessian is made as a matrix
_ROUNDS = 12  # of the power iteration
_NUDGE = 1e-4  # of the variables' size, between two gradients


@final
class Value:
    """The value function of a case, at any upper variables.

    The lower level is solved anew at each point, from where it was solved last.

    Args:
        case: a problem whose lower level has one minimum.

    Raises:
        ValueError: if the lower level cannot be solved.
    """

    def __init__(self, case: Case) -> None:
        self._case = case
        self._problem = copy.deepcopy(case.problem)
        self._variables = self._problem.variables("upper")
        self._layout = Layout(list(self._variables.values()))
        lower = sum(y.numel() for y in self._problem.variables("lower").values())
        small = lower <= _DENSE
        self._exact = Implicit(Cholesky() if small else ConjugateGradient(500, rtol=1e-12))
        self._near = False

    def at(self, problem: Problem) -> tuple[float, float]:
        """The value and the norm of its gradient at a problem's upper variables."""
        value, gradient = self.of(self._point(problem))
        return float(value), float(gradient.norm())

    def _point(self, problem: Problem) -> Tensor:
        return self._layout.ravel([x.detach() for x in problem.variables("upper").values()])

    def of(self, point: Tensor) -> tuple[Tensor, Tensor]:
        """The value and its gradient at a vector of upper variables, shape (m,)."""
        write(self._variables, dict(zip(self._variables, self._layout.unravel(point), strict=True)))
        batches = self._case.upper_batch, self._case.lower_batches
        solution, _ = solve_closely(Oracles(self._problem, *batches), near=self._near)
        write(self._problem.variables("lower"), solution)
        self._near = True
        found = self._exact.hypergradient(self._problem, *batches, throw=False)
        return found.value, self._layout.ravel(list(found.grad.values()))

    def curvatures(self) -> tuple[float, float]:
        """The largest curvatures at the start: of the value function, and of the lower loss in y."""
        start = self._point(self._case.problem)
        _, here = self.of(start)
        nudge = _NUDGE * (1 + float(start.norm()))

        def bend(direction: Tensor) -> Tensor:
            return (self.of(start + nudge * direction)[1] - here) / nudge

        of_value = _largest(bend, here)
        self.of(start)
        oracles = Oracles(self._problem, self._case.upper_batch, self._case.lower_batches)
        with oracles.differentiated_twice("Value"):
            linear = oracles.linearize_lower(oracles.upper, oracles.lower)
            return of_value, _largest(linear.hessian, linear.gradient)

    def least(self, steps: int = 60) -> float:
        """The least value that L-BFGS finds from the start: the truth that curves come down to."""
        point = self._point(self._case.problem).requires_grad_()
        best = [float("inf")]
        lbfgs = torch.optim.LBFGS(
            [point],
            max_iter=steps,
            tolerance_grad=1e-8,
            tolerance_change=1e-13,
            line_search_fn="strong_wolfe",
        )

        def closure() -> Tensor:
            value, point.grad = self.of(point.detach())
            best.append(float(value))
            return value

        with contextlib.suppress(UnsolvedError):  # x went to where nothing can be solved
            lbfgs.step(closure)
        return min(best)


def _largest(product: Callable[[Tensor], Tensor], like: Tensor) -> float:
    """The largest eigenvalue in size of a symmetric operator, from below."""
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(like.shape, generator=generator, dtype=like.dtype).to(like.device)
    size = 0.0
    for _ in range(_ROUNDS):
        vector = product(vector / vector.norm()).detach()
        size = float(vector.norm())
        if not size > 0:
            break
    return size

"""Iteration to a fixed point, for a system that is a contraction."""

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bilevel.arguments import explained_settings
from bilevel.errors import Result
from bilevel.linear.base import (
    LinearSolution,
    LinearSolver,
    Operator,
    check_rtol,
    in_own_units,
    initial,
    iterated,
    outcome,
    refuse_no_system,
    relative,
    tolerance,
)
from bilevel.refusals import flag, positive, whole

_HOPELESS = 1e6  # by how much the residual may rise
_WINDOW = 10  # looks that the rate is taken over: complex eigenvalues make single ratios jump


@final
@explained_settings
@dataclass(frozen=True)
class FixedPoint(LinearSolver):
    r"""The iteration $w \leftarrow w + \eta\,(b - A w)$ until its residual has arrived.

    For a lower level given as a contraction $y = \Phi(x, y)$ the matrix is $A = I - J^\top$ with
    $J = \partial_y \Phi$, and with $\eta = 1$ this is $w \leftarrow b + J^\top w$: products with the
    derivative of the map, symmetric or not, and as fast as the map itself contracts. For a loss it is
    gradient descent on the system, and $\eta$ must lie below $2/\lambda_{\max}$. `Neumann` is the same
    iteration with a number of steps instead of a tolerance.

    A failure names the spectral radius of $I - \eta A$ as the residuals show it. The iterate with the
    least residual is returned.

    Args:
        max_steps: most steps, each one product with A.
        rtol: stop once |residual| <= rtol |b|; "auto" is the square root of the dtype's machine epsilon.
        step_size: the factor eta.
        warm_start: start from the previous solution.
        check_every: steps between two looks at the residual, each of which waits for the device.

    Raises:
        ValueError: if a setting is out of range.

    Example:
        >>> J = torch.tensor([[0.0, 0.5], [-0.5, 0.0]])
        >>> FixedPoint().solve(lambda v: v - J @ v, torch.tensor([0.5, 1.5])).value.round(decimals=3)
        tensor([1., 1.])

    References:
        On the Iteration Complexity of Hypergradient Computation (Grazzi, Franceschi, Pontil, Salzo,
        2020), https://arxiv.org/abs/2006.16218 (the fixed-point method). Differs from the paper in: it
        stops at a tolerance.
    """

    max_steps: int = 1000
    rtol: float | str = "auto"
    step_size: float = 1.0
    warm_start: bool = False
    check_every: int = 1

    def __post_init__(self) -> None:
        flag("warm_start", self.warm_start)
        whole("max_steps", self.max_steps)
        check_rtol(self.rtol)
        positive("step_size", self.step_size)
        whole("check_every", self.check_every)

    def solve(
        self, operator: Operator, rhs: Tensor, *, guess: Tensor | None = None
    ) -> LinearSolution:
        refuse_no_system(operator, rhs)
        rhs, unit = in_own_units(rhs)
        w, r, products = initial(operator, rhs, guess if self.warm_start else None, unit)
        scale, goal = torch.linalg.vector_norm(rhs), tolerance(self.rtol, rhs.dtype)
        advance = iterated(operator, (type(self), self.step_size), self._step)
        best, residual = w, relative(torch.linalg.vector_norm(r), scale)
        there, sizes, steps, note = residual, [float(residual)], 0, ""
        while steps < self.max_steps and goal < sizes[-1] < _HOPELESS * max(sizes[0], 1):
            for _ in range(min(self.check_every, self.max_steps - steps)):
                w, r = advance(w, r, rhs)  # b - A w computed from w: the true residual
                steps += 1
            there = relative(torch.linalg.vector_norm(r), scale)
            sizes.append(float(there))  # waits for the device
            if sizes[-1] <= min(sizes):
                best, residual = w, there
        result = outcome(residual, goal)
        if math.isnan(sizes[-1]):
            best, residual, result = w, there, Result.NOT_FINITE
        if result is Result.NOT_CONVERGED:
            window = min(_WINDOW, len(sizes) - 1)
            change = math.log(sizes[-1] / sizes[-1 - window]) / (window * self.check_every)
            result = Result.NOT_CONVERGED if change < 0 else Result.DIVERGED
            note = _said(change, steps, min(sizes), goal)
        return LinearSolution(unit * best, result, residual, products + steps, note=note)

    def _step(self, operator: Operator, w: Tensor, r: Tensor, rhs: Tensor) -> tuple[Tensor, Tensor]:
        w = w + self.step_size * r
        return w, rhs - operator(w)


def _said(change: float, steps: int, size: float, goal: float) -> str:
    rate, others = math.exp(change), "`BiCGStab` and `GMRES` need no contraction"
    if change >= 0:
        said = f"is no contraction here: each step makes the residual {rate:.3g} times as long"
        return f"the map {said} (the spectral radius, estimated); {others}"
    more = steps + math.log(goal / size) / change
    said = f"contracts by {rate:.6g} a step (the spectral radius, estimated)"
    return f"the map {said}: about {more:.2g} steps would reach the tolerance; {others}"

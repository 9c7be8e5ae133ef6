r"""The truncated Neumann series of an inverse."""

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from bilevel.arguments import explained_settings
from bilevel.errors import Result
from bilevel.linear.base import (
    LinearSolution,
    LinearSolver,
    Operator,
    in_own_units,
    initial,
    iterated,
    outcome,
    refuse_no_system,
    relative,
)
from bilevel.refusals import flag, positive, whole


@final
@explained_settings
@dataclass(frozen=True)
class Neumann(LinearSolver):
    r"""$w = \eta \sum_{k<K} (I - \eta A)^k b$, which tends to $A^{-1} b$.

    It converges for a symmetric positive definite A if $0 < \eta < 2/\lambda_{\max}$, and for any A
    with $\|I - \eta A\| < 1$. The sum is what differentiating $K$ plain gradient steps of size
    $\eta$ taken at the solution gives (truncated backpropagation).

    Args:
        num_steps: number of terms K, each one product with A.
        step_size: the factor eta.
        rtol: if given, reaching it is required; otherwise the truncated sum is a success unless it
            diverges (its residual exceeds |b|).
        warm_start: start from the previous solution instead of zero.

    Raises:
        ValueError: if a setting is out of range.

    Example:
        >>> Neumann(num_steps=50, step_size=0.5).solve(lambda v: v, torch.ones(2)).value
        tensor([1., 1.])

    References:
        Optimizing Millions of Hyperparameters by Implicit Differentiation (Lorraine, Vicol,
        Duvenaud, 2020), https://arxiv.org/abs/1911.02590, Eq. 8.
    """

    approximate: ClassVar[bool] = True

    num_steps: int = 20
    step_size: float = 0.1
    rtol: float | None = None
    warm_start: bool = False

    def __post_init__(self) -> None:
        flag("warm_start", self.warm_start)
        whole("num_steps", self.num_steps)
        positive("step_size", self.step_size)
        if self.rtol is not None:
            positive("rtol", self.rtol)

    def solve(
        self, operator: Operator, rhs: Tensor, *, guess: Tensor | None = None
    ) -> LinearSolution:
        refuse_no_system(operator, rhs)
        rhs, unit = in_own_units(rhs)
        w, r, products = initial(operator, rhs, guess if self.warm_start else None, unit)
        # b - A w after a step w += eta r is (I - eta A) r, the next term of the series; computed
        # from w at the same cost, it is the true residual and rounding does not add up
        advance = iterated(operator, (type(self), self.step_size), self._step)
        for _ in range(self.num_steps):
            w, r = advance(w, r, rhs)
        products += self.num_steps
        residual = relative(torch.linalg.vector_norm(r), torch.linalg.vector_norm(rhs))
        result = outcome(residual, self.rtol)
        if result is Result.NOT_FINITE:  # it grew until it overflowed, or A or b are to blame
            products += 1
            grew = bool(operator(rhs).isfinite().all())
        else:
            grew = bool(residual > 1 + 1e-6)
        result = Result.DIVERGED if grew else result
        return LinearSolution(unit * w, result, residual, products)

    def _step(self, operator: Operator, w: Tensor, r: Tensor, rhs: Tensor) -> tuple[Tensor, Tensor]:
        w = w + self.step_size * r
        return w, rhs - operator(w)

"""`LinearSolver`: solve `A w = b` from products with `A` alone."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

from torch import Tensor

from bilevel.errors import Result

Operator: TypeAlias = Callable[[Tensor], Tensor]


class LinearSolution(NamedTuple):
    """What a linear solver returns; on failure `value` is its current iterate.

    Attributes:
        value: the solution w, shape (n,).
        result: how the solve ended.
        residual: relative residual |b - A w| / |b|, `None` if it was not computed.
        num_products: number of products with A.
        negative_curvature: whether a direction p with p^T A p <= 0 was met.
    """

    value: Tensor
    result: Result
    residual: Tensor | None
    num_products: int
    negative_curvature: bool = False


class LinearSolver(ABC):
    """Abstract base of the linear solvers; each is a frozen record of its settings."""

    warm_start: bool = False

    @abstractmethod
    def solve(
        self, operator: Operator, rhs: Tensor, *, guess: Tensor | None = None
    ) -> LinearSolution:
        """Solve `operator(w) = rhs`.

        Args:
            operator: v -> A v on vectors of shape (n,).
            rhs: right-hand side b, shape (n,).
            guess: where to start, used if `warm_start` is on; zero by default.

        Returns:
            The solution and how the solve ended.
        """


def positive(name: str, value: float, *, zero: bool = False) -> None:
    """Refuse a setting that is not positive (or, with `zero`, is negative)."""
    if not (value >= 0 if zero else value > 0):
        wanted = "zero or more" if zero else "positive"
        raise ValueError(f"`{name}` must be {wanted}, got {value!r}")


def relative(residual: Tensor, scale: Tensor) -> Tensor:
    """`residual / scale`, and 0 where both are 0 (a zero right-hand side is solved by zero)."""
    return residual / scale.clamp_min(1e-300 if scale.dtype.itemsize == 8 else 1e-38)

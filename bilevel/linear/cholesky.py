"""Dense direct solve: materialise the operator and factorise it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel.errors import Result
from bilevel.linear.base import (
    LinearSolution,
    LinearSolver,
    Operator,
    dense,
    positive,
    relative,
)
from bilevel.tracing import tracing


@dataclass(frozen=True)
class Cholesky(LinearSolver):
    """Cholesky factorisation of `A + damping I`, built column by column: n products, n^2 numbers.

    The reference for small lower levels. If the matrix is not positive definite, the system is
    solved by LU instead and the result says that negative curvature was met. A matrix that is not
    symmetric (the lower "gradient" is no gradient) is solved by LU as it is.

    Args:
        damping: added to the diagonal of A.
        max_size: largest n accepted.

    Raises:
        ValueError: if a setting is out of range, or (in `solve`) if n > max_size.

    Example:
        >>> Cholesky().solve(lambda v: 2 * v, torch.ones(2)).value
        tensor([0.5000, 0.5000])
    """

    damping: float = 0.0
    max_size: int = 5000

    def __post_init__(self) -> None:
        positive("damping", self.damping, zero=True)
        positive("max_size", self.max_size)

    def solve(
        self, operator: Operator, rhs: Tensor, *, guess: Tensor | None = None
    ) -> LinearSolution:
        n = rhs.numel()
        if n > self.max_size:
            raise ValueError(
                f"`Cholesky` would materialise a {n} x {n} matrix, more than `max_size` = "
                f"{self.max_size} allows; use `ConjugateGradient`, or raise `max_size`"
            )
        matrix = dense(operator, rhs)
        if self.damping:
            matrix = matrix + self.damping * torch.eye(n, dtype=rhs.dtype, device=rhs.device)
        w, negative = _without_looking(matrix, rhs) if tracing() else _solve(matrix, rhs)
        residual = relative(
            torch.linalg.vector_norm(rhs - matrix @ w), torch.linalg.vector_norm(rhs)
        )
        result = Result.NEGATIVE_CURVATURE if negative else Result.SUCCESS
        if not tracing() and not bool(residual.isfinite()):
            result = result if negative else Result.NOT_FINITE
        return LinearSolution(w, result, residual, n, negative)


def _solve(matrix: Tensor, rhs: Tensor) -> tuple[Tensor, bool]:
    """The solution, and whether the matrix is symmetric but not positive definite."""
    odd = torch.linalg.matrix_norm(matrix - matrix.mT)
    tolerance = torch.finfo(rhs.dtype).eps ** 0.5 * torch.linalg.matrix_norm(matrix)
    if not bool(odd <= tolerance):
        return _without_looking(matrix, rhs)
    factor, info = torch.linalg.cholesky_ex((matrix + matrix.mT) / 2)
    if bool(info != 0):
        return _without_looking(matrix, rhs)[0], True
    return torch.cholesky_solve(rhs[:, None], factor)[:, 0], False


def _without_looking(matrix: Tensor, rhs: Tensor) -> tuple[Tensor, bool]:
    """The solution by LU, whatever the matrix is."""
    w: Tensor = torch.linalg.solve_ex(matrix, rhs).result
    return w, False

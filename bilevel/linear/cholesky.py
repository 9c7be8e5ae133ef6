"""Dense direct solve: materialise the operator and factorise it."""

import math
from collections.abc import Callable
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
    dense,
    in_own_units,
    refuse_no_system,
    relative,
    tolerance,
)
from bilevel.refusals import positive, whole


@final
@explained_settings
@dataclass(frozen=True)
class Cholesky(LinearSolver):
    """Cholesky factorisation of `A + damping I`, built column by column: n products, n^2 numbers.

    The reference for small lower levels. Not every matrix has a Cholesky factor:

    - If a pivot is negative, or nothing of it is left but rounding, the matrix is diagonalised.
      Negative eigenvalues are reported as negative curvature. Zero ones make it singular: the
      solution of least norm is then right where there is a solution at all, and the result says
      where there is none.
    - A matrix that is not symmetric (the lower "gradient" is not a gradient) is solved by LU; a
      singular one by its pseudo-inverse.

    Args:
        damping: added to the diagonal of A.
        max_size: largest n accepted.
        rtol: relative residual above which the solve is not a success; "auto" is the square root of
            the dtype's machine epsilon. Rounding alone leaves up to epsilon times the condition
            number, so a badly conditioned system needs float64, `damping` or a larger `rtol`.

    Raises:
        ValueError: if a setting is out of range, or (in `solve`) if n > max_size.

    Example:
        >>> Cholesky().solve(lambda v: 2 * v, torch.ones(2)).value
        tensor([0.5000, 0.5000])
    """

    damping: float = 0.0
    max_size: int = 5000
    rtol: float | str = "auto"

    def __post_init__(self) -> None:
        positive("damping", self.damping, zero=True)
        whole("max_size", self.max_size)
        check_rtol(self.rtol)

    def separates(self) -> bool:
        return True

    def solve(
        self, operator: Operator, rhs: Tensor, *, guess: Tensor | None = None
    ) -> LinearSolution:
        refuse_no_system(operator, rhs)
        n = rhs.numel()
        matrix = self._matrix(operator, rhs)
        if not bool(matrix.isfinite().all() & rhs.isfinite().all()):
            nan = torch.full_like(rhs, torch.nan)
            return LinearSolution(nan, Result.NOT_FINITE, _residual(matrix, nan, rhs), n)
        goal = tolerance(self.rtol, rhs.dtype)
        solve = _symmetric if bool(_symmetry(matrix)) else _general
        w, defect = solve(matrix, rhs, goal)
        residual = _residual(matrix, w, rhs)
        negative = defect is Result.NEGATIVE_CURVATURE
        if not bool(residual.isfinite()):
            defect = Result.NOT_FINITE
        elif not negative and bool(residual <= goal):
            defect = None
        elif defect is None:
            defect = Result.NOT_CONVERGED
        return LinearSolution(w, defect or Result.SUCCESS, residual, n, negative)

    def unwatched(self) -> Callable[[Operator, Tensor, list[Tensor]], LinearSolution] | None:
        return self._hopeful

    def _hopeful(self, operator: Operator, rhs: Tensor, sure: list[Tensor]) -> LinearSolution:
        """The solution of a matrix that has a factor."""
        matrix, goal = self._matrix(operator, rhs), tolerance(self.rtol, rhs.dtype)
        even = (matrix + matrix.mT) / 2
        factor, fine = _factored(even, rhs)
        w = torch.cholesky_solve(rhs[:, None], factor)[:, 0]
        residual = _residual(matrix, w, rhs)
        solved = (residual <= goal) & (_residual(even, w, rhs) <= goal)
        sure.append(fine & solved & _symmetry(matrix) & matrix.isfinite().all())
        return LinearSolution(w, Result.SUCCESS, residual, rhs.numel())

    def _matrix(self, operator: Operator, rhs: Tensor) -> Tensor:
        n = rhs.numel()
        if n > self.max_size:
            raise ValueError(
                f"`Cholesky` would materialise a {n} x {n} matrix, more than `max_size` = "
                f"{self.max_size} allows; use `ConjugateGradient`, or raise `max_size`"
            )
        matrix = dense(operator, rhs)
        if self.damping:
            matrix = matrix + self.damping * torch.eye(n, dtype=rhs.dtype, device=rhs.device)
        return matrix


def _residual(matrix: Tensor, w: Tensor, rhs: Tensor) -> Tensor:
    own, unit = in_own_units(rhs)
    missing = torch.linalg.vector_norm(own - matrix @ (w / unit))
    return relative(missing, torch.linalg.vector_norm(own))


def _symmetry(matrix: Tensor) -> Tensor:
    """Whether the matrix is symmetric."""
    odd = torch.linalg.matrix_norm(matrix - matrix.mT)
    little: Tensor = odd <= torch.finfo(matrix.dtype).eps ** 0.5 * torch.linalg.matrix_norm(matrix)
    return little


def _rounding(rhs: Tensor) -> float:
    """What n roundings leave of a number that is 0 exactly, relative to what it was before."""
    eps: float = torch.finfo(rhs.dtype).eps
    return 2 * eps * math.sqrt(len(rhs))


def _factored(matrix: Tensor, rhs: Tensor) -> tuple[Tensor, Tensor]:
    """The factor of a symmetric matrix, and whether there is one."""
    factor, info = torch.linalg.cholesky_ex(matrix)
    # a pivot is what is left of its diagonal entry; whether that is rounding does not depend on units
    whole = factor.diagonal().square() > _rounding(rhs) * matrix.diagonal()
    return factor, (info == 0) & whole.all()


def _symmetric(matrix: Tensor, rhs: Tensor, goal: float) -> tuple[Tensor, Result | None]:
    """The solution, and what is wrong with the matrix."""
    matrix = (matrix + matrix.mT) / 2
    factor, fine = _factored(matrix, rhs)
    if bool(fine):
        w = torch.cholesky_solve(rhs[:, None], factor)[:, 0]
        if bool(_residual(matrix, w, rhs) <= goal):
            return w, None
    eigenvalues, vectors = torch.linalg.eigh(matrix)
    least = 10 * _rounding(rhs) * eigenvalues.abs().max()
    zero = eigenvalues.abs() <= least
    inverse = torch.where(zero, 0, 1 / eigenvalues.masked_fill(zero, 1))
    w = vectors @ (inverse * (vectors.mT @ rhs))
    if bool(eigenvalues[0] < -least):
        return w, Result.NEGATIVE_CURVATURE
    return w, Result.SINGULAR if bool(zero.any()) else None


def _general(matrix: Tensor, rhs: Tensor, goal: float) -> tuple[Tensor, Result | None]:
    """The solution, and whether the matrix is singular."""
    largest = matrix.abs().amax(dim=1)
    rows = torch.where(largest == 0, 1, largest)  # rows may be in different units
    scaled, target = matrix / rows[:, None], rhs / rows
    factor, pivots, info = torch.linalg.lu_factor_ex(scaled)
    sizes = factor.diagonal().abs()
    if bool((info == 0) & (sizes.min() > _rounding(rhs) * sizes.max())):
        w = torch.linalg.lu_solve(factor, pivots, target[:, None])[:, 0]
        if bool(_residual(matrix, w, rhs) <= goal):
            return w, None
    u, values, vh = torch.linalg.svd(scaled)
    zero = values <= 10 * _rounding(rhs) * values.max()
    inverse = torch.where(zero, 0, 1 / values.masked_fill(zero, 1))
    w = vh.mT @ (inverse * (u.mT @ target))
    return w, Result.SINGULAR if bool(zero.any()) else None

r"""Linear equations: $A y = b$."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from bilevel.arguments import explained_settings
from bilevel.constraints.base import Constraint, Number, as_like, largest, refuse_no_number


@final
@explained_settings
@dataclass(frozen=True, eq=False)
class Affine(Constraint):
    """The variable, flattened, solves linear equations; the projection is by the pseudo-inverse of A.

    For few equations: the pseudo-inverse is computed whenever it is used. Rows that say the same twice
    do no harm.

    Args:
        matrix: the matrix A, shape (m, n) for a variable of n entries.
        target: the right-hand side b, a number or a tensor of shape (m,).

    Raises:
        TypeError: if `matrix` is no tensor of two dimensions, or `target` no number.

    Example:
        >>> Affine(torch.ones(1, 2), 1.0).prox(torch.tensor([0.0, 0.0]), 1.0).round(decimals=5)
        tensor([0.5000, 0.5000])
    """

    matrix: Tensor
    target: Number = 0.0

    def __post_init__(self) -> None:
        refuse_no_number("target", self.target)
        matrix: Any = self.matrix
        if not isinstance(matrix, Tensor) or matrix.ndim != 2:
            got = tuple(matrix.shape) if isinstance(matrix, Tensor) else type(matrix).__name__
            raise TypeError(f"the `matrix` of `Affine` must be a tensor of shape (m, n), got {got}")

    def prox(self, point: Tensor, step: float) -> Tensor:
        matrix = as_like(self.matrix, point)
        missing = matrix @ point.reshape(-1) - as_like(self.target, point)
        correction: Tensor = torch.linalg.pinv(matrix) @ missing
        return point - correction.reshape(point.shape)

    def tangent(self, point: Tensor, step: float) -> Callable[[Tensor], Tensor]:
        matrix = as_like(self.matrix, point)
        inverse = torch.linalg.pinv(matrix)
        return lambda v: v - (inverse @ (matrix @ v.reshape(-1))).reshape(v.shape)

    def margin(self, point: Tensor, step: float) -> Tensor:
        return point.new_full((), math.inf)

    def violation(self, point: Tensor) -> Tensor:
        matrix = as_like(self.matrix, point)
        return largest((matrix @ point.reshape(-1) - as_like(self.target, point)).abs())

r"""An L1 penalty: $R(y) = \sum_i w_i |y_i|$."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from bilevel.arguments import explained_settings
from bilevel.constraints.base import Constraint, Number, as_like, refuse_no_number


@final
@explained_settings
@dataclass(frozen=True, eq=False)
class L1(Constraint):
    """A penalty on absolute values, which sets entries to 0; its prox is the soft threshold.

    With a weight that the upper level tunes this is the Lasso's oldest question; with a quadratic
    penalty in the lower loss besides, the elastic net's.

    Args:
        weight: weight of the penalty, a number or a tensor that broadcasts to the variable and is
            nowhere negative, for example `self.upper["log_l1"].exp()`.

    Raises:
        TypeError: if it is neither.
        ValueError: if it is a negative number.

    Example:
        >>> L1(1.0).prox(torch.tensor([-3.0, 0.5, 2.0]), 0.5)
        tensor([-2.5000,  0.0000,  1.5000])

    References:
        Regression Shrinkage and Selection via the Lasso (Tibshirani, 1996),
        https://doi.org/10.1111/j.2517-6161.1996.tb02080.x
        Implicit Differentiation of Lasso-type Models for Hyperparameter Optimization (Bertrand,
        Klopfenstein, Blondel, Vaiter, Gramfort, Salmon, 2020), https://arxiv.org/abs/2002.08943
    """

    bounds: ClassVar[bool] = False

    weight: Number

    def __post_init__(self) -> None:
        refuse_no_number("weight", self.weight)
        if not isinstance(self.weight, Tensor) and self.weight < 0:
            raise ValueError(
                f"the `weight` of `L1` must not be negative, got {self.weight}; a penalty that the "
                "upper level tunes is best given by its logarithm, `x.exp()`"
            )

    def prox(self, point: Tensor, step: float) -> Tensor:
        threshold = step * as_like(self.weight, point)
        zero = torch.zeros_like(point)
        lower = torch.where(point < -threshold, point + threshold, zero)
        return torch.where(point > threshold, point - threshold, lower)

    def tangent(self, point: Tensor, step: float) -> Callable[[Tensor], Tensor]:
        free = point.abs() > step * as_like(self.weight, point)
        return lambda v: torch.where(free, v, torch.zeros_like(v))

    def margin(self, point: Tensor, step: float) -> Tensor:
        return (point.abs() - step * as_like(self.weight, point)).abs().amin()

    def violation(self, point: Tensor) -> Tensor:
        return point.new_zeros(())

r"""A box: $l \le y \le h$, entry by entry."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bilevel.arguments import explained_settings
from bilevel.constraints.base import Constraint, Number, as_like, largest, refuse_no_number


@final
@explained_settings
@dataclass(frozen=True, eq=False)
class Box(Constraint):
    """Every entry lies between two bounds; its prox is the projection, a clamp.

    Args:
        low: lower bound, a number or a tensor that broadcasts to the variable.
        high: upper bound, given in the same way.

    Raises:
        TypeError: if a bound is neither.
        ValueError: if two numbers leave nothing between them.

    Example:
        >>> Box(0.0).prox(torch.tensor([-1.0, 2.0]), 1.0)
        tensor([0., 2.])
    """

    low: Number = -math.inf
    high: Number = math.inf

    def __post_init__(self) -> None:
        refuse_no_number("low", self.low)
        refuse_no_number("high", self.high)
        numbers = not isinstance(self.low, Tensor) and not isinstance(self.high, Tensor)
        if numbers and self.low >= self.high:
            raise ValueError(
                f"`Box` is empty or a point: `low` = {self.low} must lie below `high` = {self.high}"
            )

    def prox(self, point: Tensor, step: float) -> Tensor:
        low, high = as_like(self.low, point), as_like(self.high, point)
        return torch.where(point <= low, low, torch.where(point >= high, high, point))

    def tangent(self, point: Tensor, step: float) -> Callable[[Tensor], Tensor]:
        free = (point > as_like(self.low, point)) & (point < as_like(self.high, point))
        return lambda v: torch.where(free, v, torch.zeros_like(v))

    def margin(self, point: Tensor, step: float) -> Tensor:
        low, high = as_like(self.low, point), as_like(self.high, point)
        return torch.minimum((point - low).abs(), (point - high).abs()).amin()

    def violation(self, point: Tensor) -> Tensor:
        return largest(as_like(self.low, point) - point, point - as_like(self.high, point))

r"""The simplex: $y \ge 0$ with $\sum_i y_i = 1$."""

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
class Simplex(Constraint):
    """Entries that are not negative and have a given sum, along the last dimension.

    The projection subtracts one number from all entries and cuts off what is negative.

    Args:
        total: the sum, a number or a tensor of one entry, above 0.

    Raises:
        TypeError: if it is neither.
        ValueError: if it is a number that is not positive.

    Example:
        >>> Simplex().prox(torch.tensor([0.5, 0.75, -1.0]), 1.0)
        tensor([0.3750, 0.6250, 0.0000])

    References:
        Efficient Projections onto the l1-Ball for Learning in High Dimensions (Duchi,
        Shalev-Shwartz, Singer, Chandra, 2008), https://doi.org/10.1145/1390156.1390191, Figure 1.
    """

    total: Number = 1.0

    def __post_init__(self) -> None:
        refuse_no_number("total", self.total)
        if not isinstance(self.total, Tensor) and self.total <= 0:
            raise ValueError(f"the `total` of `Simplex` must be positive, got {self.total}")

    def prox(self, point: Tensor, step: float) -> Tensor:
        support = self._support(point)[0]
        inside = torch.where(support, point, torch.zeros_like(point))
        surplus = inside.sum(-1, keepdim=True) - as_like(self.total, point)
        moved = point - surplus / support.sum(-1, keepdim=True)
        return torch.where(support, moved, torch.zeros_like(point))

    def tangent(self, point: Tensor, step: float) -> Callable[[Tensor], Tensor]:
        support = self._support(point)[0]

        def project(v: Tensor) -> Tensor:
            inside = torch.where(support, v, torch.zeros_like(v))
            mean = inside.sum(-1, keepdim=True) / support.sum(-1, keepdim=True)
            return torch.where(support, v - mean, torch.zeros_like(v))

        return project

    def margin(self, point: Tensor, step: float) -> Tensor:
        return (point - self._support(point)[1]).abs().amin()

    def violation(self, point: Tensor) -> Tensor:
        return largest(-point, (point.sum(-1) - as_like(self.total, point)).abs())

    def _support(self, point: Tensor) -> tuple[Tensor, Tensor]:
        """The entries that stay positive, and the number that is subtracted from them."""
        point = point.detach()
        ordered = point.sort(dim=-1, descending=True).values
        counts = torch.arange(1, point.shape[-1] + 1, device=point.device)
        surplus = ordered.cumsum(-1) - as_like(self.total, point).detach()
        positive = (ordered * counts > surplus).sum(-1, keepdim=True)
        subtracted = surplus.gather(-1, positive - 1) / positive
        return point > subtracted, subtracted

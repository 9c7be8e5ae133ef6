"""A quadratic lower level of any size and conditioning: everything is known in closed form."""

from typing import Any, final

import torch
from torch import Tensor, nn

from bilevel.check.problems.case import Case, normal
from bilevel.problem import Problem

_LARGEST = 4.0  # eigenvalue


@final
class Quadratic(Problem):
    r"""$G = \frac{1}{2} y^\top H y - y^\top B x$; $F = |y - t|^2$.

    The eigenvalues of H lie evenly between `4 / condition` and 4; x has 5 entries.

    Args:
        seed: of H, B, t and where x and y begin.
        size: entries of y.
        condition: the largest eigenvalue of H over the smallest.
    """

    upper: nn.ParameterDict
    lower: nn.ParameterDict
    H: Tensor
    B: Tensor
    t: Tensor

    def __init__(self, seed: int, size: int = 20, condition: float = 8.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        turn, _ = torch.linalg.qr(normal(generator, size, size))
        eigenvalues = torch.linspace(_LARGEST / condition, _LARGEST, size, dtype=torch.float64)
        self.register_buffer("H", turn * eigenvalues @ turn.mT)
        self.register_buffer("B", normal(generator, size, 5))
        self.register_buffer("t", normal(generator, size))
        self.upper = nn.ParameterDict({"x": normal(generator, 5)})
        self.lower = nn.ParameterDict({"y": normal(generator, size)})

    def upper_loss(self, batch: Any) -> Tensor:
        distance: Tensor = (self.lower["y"] - self.t).square().sum()
        return distance

    def lower_loss(self, batch: Any) -> Tensor:
        y = self.lower["y"]
        loss: Tensor = y @ self.H @ y / 2 - y @ (self.B @ self.upper["x"])
        return loss

    def best_response(self, batch: Any) -> dict[str, Tensor]:
        return {"y": torch.linalg.solve(self.H, self.B @ self.upper["x"])}


def quadratic(seed: int, size: int = 20, condition: float = 8.0) -> Case:
    """A quadratic of that size and condition.

    Raises:
        ValueError: if either is out of range.
    """
    if not size >= 1 or not condition >= 1:
        raise ValueError(f"size and condition must be at least 1, got {size} and {condition:g}")
    return Case(Quadratic(seed, size, condition))

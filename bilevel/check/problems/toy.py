r"""The toy of V-PBGD: one variable in each level, a lower loss that is not convex, many local solutions.

$$ F = \frac{\cos(4 y + 2)}{1 + e^{2 - 4 x}} + \frac{1}{2} \ln \big( (4 x - 2)^2 + 1 \big), \qquad
   G = (x + y)^2 + x \sin^2 (x + y), $$

for x in [0, 3], where $y^*(x) = - x$ is the only lower solution. Section 6 of "On Penalty-based Bilevel
Gradient Descent Method" (Shen, Chen, 2023), https://arxiv.org/abs/2302.05185.
"""

from typing import Any, final

import torch
from torch import Tensor, nn

from bilevel.check.problems.case import Case
from bilevel.problem import Problem


@final
class Toy(Problem):
    """Independent starts side by side: both losses are sums over them.

    Args:
        x: where x begins, shape (starts,).
        y: where y begins.
    """

    upper: nn.ParameterDict
    lower: nn.ParameterDict

    def __init__(self, x: Tensor, y: Tensor) -> None:
        super().__init__()
        self.upper = nn.ParameterDict({"x": x})
        self.lower = nn.ParameterDict({"y": y})

    def upper_loss(self, batch: Any) -> Tensor:
        x, y = self.upper["x"], self.lower["y"]
        waves: Tensor = (4 * y + 2).cos() * (4 * x - 2).sigmoid()
        loss: Tensor = (waves + ((4 * x - 2).square() + 1).log() / 2).sum()
        return loss

    def lower_loss(self, batch: Any) -> Tensor:
        x, apart = self.upper["x"], self.upper["x"] + self.lower["y"]
        loss: Tensor = (apart.square() + x * apart.sin().square()).sum()
        return loss

    def best_response(self, batch: Any) -> dict[str, Tensor]:
        return {"y": -self.upper["x"]}


def toy(seed: int, starts: int = 1) -> Case:
    """The toy from starts with x in [0, 3] and y in [-5, 8.5], drawn from the seed.

    Raises:
        ValueError: if there is no start.
    """
    if starts < 1:
        raise ValueError(f"it takes at least one start, got {starts}")
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.rand(2, starts, generator=generator, dtype=torch.float64)
    return Case(Toy(3 * x, 13.5 * y - 5))

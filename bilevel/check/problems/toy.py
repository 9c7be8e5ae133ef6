r"""`PenaltyToy`: one upper and one lower variable, many local solutions, from many starts at once.

$$ F = \frac{\cos(4 y + 2)}{1 + e^{2 - 4 x}} + \frac{1}{2} \ln\big((4 x - 2)^2 + 1\big), \qquad
   G = (x + y)^2 + x \sin^2(x + y), \qquad 0 \le x \le 3 . $$

G is not convex in y, but it has no stationary point other than its minimum at y = -x. Each start is a
problem of its own: the losses are sums, so that all are moved in one go.
"""

from typing import Any, final

import torch
from torch import Tensor, nn

from bilevel.check.problems.case import Case
from bilevel.problem import Problem


@final
class PenaltyToy(Problem):
    """The toy of penalty-based bilevel gradient descent.

    Args:
        x: upper variables, shape (n,).
        y: lower variables, shape (n,).

    Attributes:
        box: the least and the largest x.

    Example:
        >>> toy = PenaltyToy(torch.zeros(3), torch.ones(3))
        >>> toy.best_response(None)["y"]
        tensor([-0., -0., -0.])

    References:
        On Penalty-based Bilevel Gradient Descent Method (Shen, Chen, 2023),
        https://arxiv.org/abs/2302.05185, the numerical example.
    """

    upper: nn.ParameterDict
    lower: nn.ParameterDict
    box = 0.0, 3.0

    def __init__(self, x: Tensor, y: Tensor) -> None:
        super().__init__()
        self.upper = nn.ParameterDict({"x": x.clone()})
        self.lower = nn.ParameterDict({"y": y.clone()})

    def upper_loss(self, batch: Any) -> Tensor:
        x, y = self.upper["x"], self.lower["y"]
        wave: Tensor = (4 * y + 2).cos() * torch.sigmoid(4 * x - 2)
        loss: Tensor = (wave + (4 * x - 2).square().add(1).log() / 2).sum()
        return loss

    def lower_loss(self, batch: Any) -> Tensor:
        x, gap = self.upper["x"], self.upper["x"] + self.lower["y"]
        loss: Tensor = gap.square() + x * gap.sin().square()
        return loss.sum()

    def best_response(self, batch: Any) -> dict[str, Tensor]:
        return {"y": -self.upper["x"].detach()}


def toy(seed: int, starts: int = 1) -> Case:
    """The toy from starts with x in [0, 3] and y in [-5, 8.5], drawn from the seed.

    Raises:
        ValueError: if there is no start.
    """
    if starts < 1:
        raise ValueError(f"it takes at least one start, got {starts}")
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.rand(2, starts, generator=generator, dtype=torch.float64)
    return Case(PenaltyToy(3 * x, 13.5 * y - 5))

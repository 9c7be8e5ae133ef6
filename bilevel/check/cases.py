"""Problems whose hypergradient is known: what solvers are compared on.

Small, in float64, drawn from a seed. Every lower level has one minimum, in closed form or found by
Newton's method up to rounding.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn

from bilevel.optimizers import Optimizers
from bilevel.problem import Problem


@final
class Case(NamedTuple):
    """A problem at a point, and what its losses are evaluated on.

    Attributes:
        problem: in float64.
        upper_batch: of the upper loss.
        lower_batches: of the lower loss.
        lower_optimizer: whose steps `Unrolled` unrolls; plain gradient descent by default.
    """

    problem: Problem
    upper_batch: Any = None
    lower_batches: Sequence[Any] = (None,)
    lower_optimizer: Optimizers | None = None

    def ready(self) -> "Case":
        """The case with an optimizer."""
        if self.lower_optimizer is not None:
            return self
        return self._replace(lower_optimizer=torch.optim.SGD(self.problem.lower.parameters(), 0.1))


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@final
class Quadratic(Problem):
    r"""$G = \frac{1}{2} y^\top H y - y^\top B x$, eigenvalues of H from 0.5 to 4; $F = |y - t|^2$."""

    upper: nn.ParameterDict
    lower: nn.ParameterDict
    H: Tensor
    B: Tensor
    t: Tensor

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        turn, _ = torch.linalg.qr(_normal(generator, 20, 20))
        self.register_buffer("H", turn * torch.linspace(0.5, 4, 20, dtype=torch.float64) @ turn.mT)
        self.register_buffer("B", _normal(generator, 20, 5))
        self.register_buffer("t", _normal(generator, 20))
        self.upper = nn.ParameterDict({"x": _normal(generator, 5)})
        self.lower = nn.ParameterDict({"y": _normal(generator, 20)})

    def upper_loss(self, batch: Any) -> Tensor:
        distance: Tensor = (self.lower["y"] - self.t).square().sum()
        return distance

    def lower_loss(self, batch: Any) -> Tensor:
        y = self.lower["y"]
        loss: Tensor = y @ self.H @ y / 2 - y @ (self.B @ self.upper["x"])
        return loss

    def best_response(self, batch: Any) -> dict[str, Tensor]:
        return {"y": torch.linalg.solve(self.H, self.B @ self.upper["x"])}


@final
class Penalties(Problem):
    """Regression whose penalties, one for each feature, are tuned on other rows; logistic or squares."""

    upper: nn.ParameterDict
    lower: nn.ParameterDict

    def __init__(self, generator: torch.Generator, *, logistic: bool) -> None:
        super().__init__()
        self.upper = nn.ParameterDict({"log_penalty": _normal(generator, 10) - 1})
        self.lower = nn.ParameterDict({"w": _normal(generator, 10)})
        self.logistic = logistic

    def upper_loss(self, batch: Any) -> Tensor:
        rows, targets = batch
        predicted: Tensor = rows @ self.lower["w"]
        if self.logistic:
            labels = (targets > 0).to(targets)
            return nn.functional.binary_cross_entropy_with_logits(predicted, labels)
        error: Tensor = (predicted - targets).square().mean()
        return error

    def lower_loss(self, batch: Any) -> Tensor:
        penalty: Tensor = self.upper["log_penalty"].exp() * self.lower["w"].square()
        return self.upper_loss(batch) + 0.1 * penalty.sum()


def _on_rows(make: Callable[[torch.Generator], Problem], seed: int) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def batch() -> tuple[Tensor, Tensor]:
        rows = _normal(generator, 30, 10)
        return rows, rows[:, :3].sum(1).sin() + 0.1 * _normal(generator, 30)

    upper, lower = batch(), batch()
    return Case(make(generator), upper, [lower])


CASES: Mapping[str, Callable[[int], Case]] = {
    "quadratic": lambda seed: Case(Quadratic(seed)),
    "ridge": lambda seed: _on_rows(lambda g: Penalties(g, logistic=False), seed),
    "logistic": lambda seed: _on_rows(lambda g: Penalties(g, logistic=True), seed),
}
"""Cases by name, each a function of the seed."""

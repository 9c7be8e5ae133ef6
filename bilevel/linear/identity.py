"""The identity in place of an inverse."""

from dataclasses import dataclass

from torch import Tensor

from bilevel.errors import Result
from bilevel.linear.base import LinearSolution, LinearSolver, Operator, positive


@dataclass(frozen=True)
class Identity(LinearSolver):
    """`w = scale * b`: pretends that A is `I / scale`; no product with A at all.

    Also known as T1-T2, and, with `scale` the lower step size, as one differentiated step of
    gradient descent.

    Args:
        scale: the factor.

    Raises:
        ValueError: if `scale` is not positive.

    References:
        Scalable Gradient-Based Tuning of Continuous Regularization Hyperparameters (Luketina,
        Berglund, Greff, Raiko, 2016), https://arxiv.org/abs/1511.06727
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        positive("scale", self.scale)

    def solve(
        self, operator: Operator, rhs: Tensor, *, guess: Tensor | None = None
    ) -> LinearSolution:
        return LinearSolution(self.scale * rhs, Result.SUCCESS, None, 0)

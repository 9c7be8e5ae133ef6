"""The identity in place of an inverse, `Identity`, also called `T1T2`."""

from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from bilevel.arguments import explained_settings
from bilevel.errors import Result
from bilevel.linear.base import LinearSolution, LinearSolver, Operator, refuse_no_system
from bilevel.refusals import positive


@final
@explained_settings
@dataclass(frozen=True)
class Identity(LinearSolver):
    """`w = scale * b`: pretends that A is `I / scale`; no product with A at all.

    Also known as T1-T2 (`T1T2` is this class under the name of the paper): the update of the upper
    variables by one differentiated step of gradient descent, whose size is `scale`; at 1 it is left to
    the upper learning rate, as in the paper. An approximation on purpose: no residual is computed, and
    every finite answer is a success. (On an accelerator that is not checked here, because it would
    wait; `train` looks every `check_every` steps.)

    Args:
        scale: the factor.

    Raises:
        ValueError: if `scale` is not positive.

    References:
        Scalable Gradient-Based Tuning of Continuous Regularization Hyperparameters (Luketina,
        Berglund, Greff, Raiko, 2016), https://arxiv.org/abs/1511.06727
    """

    approximate: ClassVar[bool] = True

    scale: float = 1.0

    def __post_init__(self) -> None:
        positive("scale", self.scale)

    def separates(self) -> bool:
        return True

    def solve(
        self, operator: Operator, rhs: Tensor, *, guess: Tensor | None = None
    ) -> LinearSolution:
        refuse_no_system(operator, rhs)
        w = self.scale * rhs
        failed = w.device.type == "cpu" and not bool(w.isfinite().all())
        return LinearSolution(w, Result.NOT_FINITE if failed else Result.SUCCESS, None, 0)


T1T2 = Identity
"""`Identity` under the name of its paper."""

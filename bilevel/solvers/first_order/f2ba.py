r"""`F2BA`: two lower runs, one of them penalised, and a constant, large penalty.

With $y_\lambda(x) = \operatorname{argmin}_{y} F(x, y) / \lambda + G(x, y)$ the function

$$ \mathcal L_\lambda(x) = F(x, y_\lambda) + \lambda \big( G(x, y_\lambda) - \min_{y} G(x, y) \big) $$

is within $O(1/\lambda)$ of $F(x, y^*(x))$, and so is its gradient, which needs first derivatives only.
Its smoothness does not depend on $\lambda$, so that the step size of x need not shrink.
"""

from dataclasses import dataclass
from typing import Any, final

from bilevel.arguments import explained_settings
from bilevel.optimizers import Optimizers
from bilevel.oracles import Oracles
from bilevel.refusals import positive
from bilevel.solvers.answers import Response
from bilevel.solvers.first_order.base import FirstOrder
from bilevel.solvers.first_order.penalised import Penalised
from bilevel.solvers.first_order.runs import check_run, fresh_copy


@final
@explained_settings
@dataclass(frozen=True)
class F2BA(FirstOrder):
    """Fully first-order with one large penalty: the hypergradient up to O(1 / penalty).

    The two lower runs are the problem's own lower variables, moved by the lower steps of `train`
    (give it `lower_steps=num_steps`), and the copy in the solver's state. Both have to be solved well:
    what is missing comes back `penalty` times as large.

    Args:
        penalty: the constant multiplier; the theory asks for at least 2 L / mu (L the largest
            curvature of the upper loss in the lower variables, mu the smallest of the lower loss), and
            for of the order of 1 / error where the gradient is to have that error.
        num_steps: steps of the copy at each call.
        step_size: of the copy, in units of the lower loss; `None` for the learning rate that the lower
            optimizer has now.

    Raises:
        ValueError: if a setting is out of range.

    Example:
        >>> F2BA(penalty=1000.0).num_steps
        10

    References:
        Near-Optimal Nonconvex-Strongly-Convex Bilevel Optimization with Fully First-Order Oracles
        (Chen, Ma, Zhang, 2025), https://arxiv.org/abs/2306.14853, Algorithm 1. Differs from the paper
        in: the step sizes of x and y are the optimizers'.
    """

    penalty: float = 100.0
    num_steps: int = 10
    step_size: float | None = None

    def __post_init__(self) -> None:
        positive("penalty", self.penalty)
        check_run(self.num_steps, self.step_size)

    def num_lower_batches(self) -> int:
        return self.num_steps

    def begin(self, oracles: Oracles) -> dict[str, Any]:
        return {"calls": 0, "copy": fresh_copy(oracles)}

    def respond(self, oracles: Oracles, state: Any, lower_optimizer: Optimizers | None) -> Response:
        name = type(self).__name__
        step_sizes = self.rates(oracles, lower_optimizer)
        run = Penalised(oracles, self.penalty, state["copy"], step_sizes, self.num_steps)
        return run.response(name, state["calls"])

r"""`F2SA`: a hypergradient from first derivatives only, with a penalty that grows.

With a penalty $\lambda$ the lower level is solved twice: $y \to \operatorname{argmin} G(x, \cdot)$ and
$\hat y \to \operatorname{argmin} F(x, \cdot) / \lambda + G(x, \cdot)$. By the envelope theorem

$$ \frac{d}{dx} \min_{y'} \big[ F + \lambda G \big](x, y') - \lambda \min_{y'} G(x, y') =
   \partial_x F(x, \hat y) + \lambda \big( \partial_x G(x, \hat y) - \partial_x G(x, y) \big), $$

which is the hypergradient up to $O(1/\lambda)$. Errors of the two runs come back $\lambda$ times as
large.
"""

from dataclasses import dataclass
from typing import Any, final

from bilevel.arguments import explained_settings
from bilevel.optimizers import Optimizers
from bilevel.oracles import Oracles
from bilevel.solvers.answers import Response
from bilevel.solvers.first_order.base import FirstOrder
from bilevel.solvers.first_order.penalised import Penalised
from bilevel.solvers.first_order.runs import check_penalty, check_run, fresh_copy, grown


@final
@explained_settings
@dataclass(frozen=True)
class F2SA(FirstOrder):
    """Fully first-order: the lower level beside a penalised copy of it, whose penalty grows.

    The problem's own lower variables, moved by the lower steps of `train`, solve the lower level. The
    copy is the solver's state; it takes `num_steps` steps of gradient descent at each call.

    Args:
        penalty: the multiplier at the first call; the theory asks for at least 2 L / mu (L the
            largest curvature of the upper loss in the lower variables, mu the smallest of the lower).
        growth: what it grows by at each call.
        max_penalty: where it stops growing; `None` for nowhere.
        num_steps: steps of the copy at each call.
        step_size: of the copy, in units of the lower loss; `None` for the learning rate that the lower
            optimizer has now.

    Raises:
        ValueError: if a setting is out of range.

    Example:
        >>> F2SA(penalty=10, growth=0.1).num_steps
        1

    References:
        A Fully First-Order Method for Stochastic Bilevel Optimization (Kwon, Kwon, Wright, Nowak,
        2023), https://arxiv.org/abs/2301.10945, Algorithm 1. Differs from the paper in: the copy
        descends F / penalty + G, so that its step size does not shrink as the penalty grows; both
        upper gradients of G see the same batch; the step sizes of x and y are the optimizers'.
    """

    penalty: float = 10.0
    growth: float = 0.01
    max_penalty: float | None = None
    num_steps: int = 1
    step_size: float | None = None

    def __post_init__(self) -> None:
        check_penalty(self.penalty, self.growth, self.max_penalty, zero=False)
        check_run(self.num_steps, self.step_size)

    def num_lower_batches(self) -> int:
        return self.num_steps

    def begin(self, oracles: Oracles) -> dict[str, Any]:
        return {"calls": 0, "copy": fresh_copy(oracles)}

    def respond(self, oracles: Oracles, state: Any, lower_optimizer: Optimizers | None) -> Response:
        name, calls = type(self).__name__, state["calls"]
        penalty = grown(self.penalty, self.growth, self.max_penalty, calls)
        step_sizes = self.rates(oracles, lower_optimizer)
        run = Penalised(oracles, penalty, state["copy"], step_sizes, self.num_steps)
        return run.response(name, calls)

r"""`IAPTT`: an auxiliary initial value, and a trajectory cut where the upper loss is worst.

From an auxiliary initial value z the lower optimizer takes T steps, $y_1, \ldots, y_T$. The upper loss
is taken where it is largest,

$$ \varphi(x, z) = F(x, y_k(x, z)) \quad\text{with}\quad
   k = \operatorname{argmax}_{1 \le t \le T} F(x, y_t), $$

and $\partial_x \varphi$ and $\partial_z \varphi$ come from the chain rule through k steps. For lower
levels that are not convex: the pessimistic cut bounds F along the whole trajectory, and z moves to where
trajectories end well.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, final

import torch

from bilevel.arguments import explained_settings
from bilevel.distributed import mean_over_ranks
from bilevel.optimizers import Optimizers
from bilevel.oracles import Oracles
from bilevel.solvers.answers import Response, ResponseProduct
from bilevel.solvers.base import Solver
from bilevel.solvers.first_order.runs import fresh_copy, stepped
from bilevel.solvers.step_sizes import Rates, check_step_size, own_step_sizes
from bilevel.solvers.unrolled import Unrolled
from bilevel.solvers.unrolling import Unrolling
from bilevel.tree import Tree


@final
@explained_settings
@dataclass(frozen=True)
class IAPTT(Solver):
    """Initialization auxiliary and pessimistic trajectory truncation.

    The initial value is the solver's state. It begins as a copy of the lower variables; afterwards the
    problem's own lower variables and its `initial_lower` are not read, so lower steps besides change
    nothing here.

    Args:
        num_steps: number T of lower steps.
        optimizer: a torchopt transformation that takes them, started afresh; `None` to branch from
            the running lower optimizer, as `Unrolled` does.
        step_size: of the initial value, by gradient descent; `None` for the learning rate that the
            lower optimizer has now.

    Raises:
        ValueError: if a setting is out of range.

    Example:
        >>> import torchopt
        >>> IAPTT(5, torchopt.sgd(0.1), step_size=0.05).num_lower_batches()
        5

    References:
        Towards Gradient-based Bilevel Optimization with Non-convex Followers and Beyond (Liu, Liu,
        Zeng, Zhang, 2021), https://arxiv.org/abs/2110.00455, Algorithm 1. Differs from the paper in:
        the steps may be those of any optimizer with a differentiable twin.
    """

    num_steps: int
    optimizer: Any = None
    step_size: float | None = None

    def __post_init__(self) -> None:
        self._unrolled()
        check_step_size(self.step_size)

    def __repr__(self) -> str:
        steps = repr(self._unrolled()).split("(", 1)[1].split(", truncate")[0]
        return f"IAPTT({steps}, step_size={self.step_size!r})"

    def num_lower_batches(self) -> int:
        return self.num_steps

    def begin(self, oracles: Oracles) -> Tree:
        return fresh_copy(oracles)

    def context(self, oracles: Oracles) -> AbstractContextManager[None]:
        return self._unrolled().context(oracles)

    def check(self, oracles: Oracles, lower_optimizer: Optimizers | None) -> None:
        self._unrolled().check(oracles, lower_optimizer)
        self._rates(oracles, lower_optimizer)

    def respond(self, oracles: Oracles, state: Any, lower_optimizer: Optimizers | None) -> Response:
        unrolled = self._unrolled()
        steps = Unrolling(unrolled, oracles, unrolled.running(oracles, lower_optimizer), state)
        rates = self._rates(oracles, lower_optimizer)
        path = steps.path()
        with torch.no_grad():
            losses = [
                oracles.evaluate("upper", oracles.upper, steps.twin.unpack(points)).loss
                for _, points, _ in path[1:]
            ]
        worst = int(torch.stack(mean_over_ranks(losses)).argmax()) + 1  # waits for the device

        def vjp(cotangent: Tree) -> ResponseProduct:
            total, first = steps.adjoint(path[:worst], steps.twin.pack(cotangent))
            slopes = steps.twin.unpack(mean_over_ranks(first))
            here = {n: rate for n, rate in rates.items() if n in steps.twin.moves()}
            moved = stepped(state, slopes, here)
            return steps.product(total, steps=worst)._replace(state=moved)

        return Response(steps.twin.unpack(path[worst][1]), vjp, steps.residuals[worst - 1])

    def _rates(self, oracles: Oracles, lower_optimizer: Optimizers | None) -> Rates:
        name, purpose = type(self).__name__, "moves its initial value"
        return own_step_sizes(oracles, self.step_size, lower_optimizer, name, purpose, learned=True)

    def _unrolled(self) -> Unrolled:
        return Unrolled(self.num_steps, self.optimizer, mode="recompute")

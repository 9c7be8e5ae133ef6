r"""`BOME`: descent on the upper loss under a dynamic barrier for the lower level's value function.

The lower level is the constraint $q(x, y) = G(x, y) - \min_{y'} G(x, y') \le 0$. With $y_T$ the end of T
gradient steps from y,

$$ \nabla \hat q = \big( \partial_x G(x, y) - \partial_x G(x, y_T), \; \partial_y G(x, y) \big), \qquad
   \lambda = \max \Big( \eta -
   \frac{\langle \nabla F, \nabla \hat q \rangle}{\|\nabla \hat q\|^2}, \; 0 \Big), $$

both levels move along $-(\nabla F + \lambda \nabla \hat q)$, the direction nearest to $-\nabla F$ along
which q falls at the rate $\eta \|\nabla \hat q\|^2$.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from bilevel.arguments import explained_settings
from bilevel.optimizers import Optimizers
from bilevel.oracles import Oracles
from bilevel.refusals import positive
from bilevel.solvers.answers import Directions
from bilevel.solvers.first_order.base import FirstOrder
from bilevel.solvers.first_order.runs import check_run, last_batch, lower_run
from bilevel.tree import Tree, dot, norm

_ROUNDING = 10.0  # a difference of gradients below this many units in the last place is noise


@final
@explained_settings
@dataclass(frozen=True)
class BOME(FirstOrder):
    """Bilevel optimization made easy: both levels descend, a barrier keeps the lower one solved.

    There is no penalty to choose: it is computed anew at each call. Where the constraint's gradient is
    below the rounding of what it is a difference of, as at an exact lower solution, it has no direction
    and the barrier is 0: nothing is divided by it.

    Args:
        barrier: the rate eta at which the constraint has to fall.
        num_steps: T, gradient steps to the lower minimum at each call.
        step_size: of these; `None` for the learning rate that the lower optimizer has now.

    Raises:
        ValueError: if a setting is out of range.

    Example:
        >>> BOME(num_steps=20).barrier
        0.5

    References:
        BOME! Bilevel Optimization Made Easy: A Simple First-Order Approach (Ye, Liu, Wright, Stone,
        Liu, 2022), https://arxiv.org/abs/2209.08709, Algorithm 1 with phi = eta |grad q|^2. Differs
        from the paper in: the step sizes of x and y are the optimizers' and may differ; the guard of
        the division.
    """

    barrier: float = 0.5
    num_steps: int = 10
    step_size: float | None = None

    moves_lower: ClassVar[bool] = True

    def __post_init__(self) -> None:
        positive("barrier", self.barrier)
        check_run(self.num_steps, self.step_size)

    def num_lower_batches(self) -> int:
        return self.num_steps

    def respond(
        self, oracles: Oracles, state: Any, lower_optimizer: Optimizers | None
    ) -> Directions:
        batch, upper, lower = last_batch(oracles), oracles.upper, oracles.lower
        step_sizes = self.rates(oracles, lower_optimizer)
        end, _ = lower_run(oracles, lower, step_sizes, self.num_steps)
        evaluation, of_x, of_y = oracles.partials("upper", upper, lower)
        _, here, q_y = oracles.partials("lower", upper, lower, batch)
        _, there, last = oracles.partials("lower", upper, end, batch)
        q_x = {name: g - there[name] for name, g in here.items()}
        downhill = dot(of_y, q_y)
        if q_x:  # none where all upper variables belong to both levels
            downhill = downhill + dot({n: of_x[n] for n in q_x}, q_x)
        weight = self._weight(downhill, norm(_both(q_x, q_y)), norm(_both(here, q_y, last)))
        return Directions(
            evaluation,
            of_x,
            {name: weight.to(g.dtype) * g for name, g in q_x.items()},
            {name: g + weight.to(g.dtype) * q_y[name] for name, g in of_y.items()},
            lower_residual=norm(q_y),
        )

    def _weight(self, downhill: Tensor, length: Tensor, scale: Tensor) -> Tensor:
        """The multiplier lambda, 0 where the constraint's gradient is rounding."""
        noise = _ROUNDING * torch.finfo(length.dtype).eps * scale
        rounding = length <= noise  # false for NaN, which goes on
        square = torch.where(rounding, torch.ones_like(length), length) ** 2
        weight = (self.barrier - downhill / square).clamp(min=0)
        return torch.where(rounding, torch.zeros_like(weight), weight)


def _both(*trees: Tree) -> list[Tensor]:
    return [g for tree in trees for g in tree.values()]

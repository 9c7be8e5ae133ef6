r"""`MEHA`: descent in both levels with the gap to the lower loss's Moreau envelope as a penalty.

$$ v_\gamma(x, y) = \min_\theta G(x, \theta) + \frac{1}{2 \gamma} \|\theta - y\|^2 $$

is smooth where G is only weakly convex, and $G - v_\gamma \ge 0$ vanishes exactly where y is
stationary for $G(x, \cdot)$ (with $\gamma$ small enough). One gradient step on the auxiliary variable
a call,

$$ \theta \leftarrow \theta - \eta \big( \partial_y G(x, \theta) + (\theta - y) / \gamma \big), $$

then both levels descend on $F + c \, (G - v_\gamma)$, whose gradient at this $\theta$ is that of F and

$$ c \, \Big( \partial_x G(x, y) - \partial_x G(x, \theta), \;
   \partial_y G(x, y) - \frac{y - \theta}{\gamma} \Big), \qquad c = c_0 (k + 1)^p . $$
"""

from dataclasses import dataclass
from typing import Any, ClassVar, final

from bilevel.arguments import explained_settings
from bilevel.optimizers import Optimizers
from bilevel.oracles import Oracles
from bilevel.refusals import positive
from bilevel.solvers.answers import Directions
from bilevel.solvers.first_order.advice import secant_curvature, warn_if_rough
from bilevel.solvers.first_order.base import FirstOrder
from bilevel.solvers.first_order.runs import fresh_copy, last_batch, stepped
from bilevel.solvers.step_sizes import check_step_size
from bilevel.tree import norm


@final
@explained_settings
@dataclass(frozen=True)
class MEHA(FirstOrder):
    """Moreau envelope, one loop, no Hessian; for lower losses that are not convex, too.

    The two optimizers' step sizes have to be of the order of 1 / c.

    Args:
        penalty: c_0; the distance of y to a stationary point of the lower loss is of the order of 1 / c.
        power: p in c = penalty * (calls + 1) ** power; the theory has 0 <= p < 1/2.
        smoothing: gamma of the envelope; with G + rho |y|^2 / 2 convex it has to be below 1 / (2 rho).
        step_size: eta of the auxiliary variable, below 1 / (L + 1 / gamma); `None` for the learning
            rate that the lower optimizer has now.

    Raises:
        ValueError: if a setting is out of range.

    Example:
        >>> MEHA(penalty=2.0, smoothing=0.5).power
        0.0

    References:
        Moreau Envelope for Nonconvex Bi-Level Optimization: A Single-loop and Hessian-free Solution
        Strategy (Liu, Liu, Yao, Zeng, Zhang, 2024), https://arxiv.org/abs/2405.09927, Algorithm 1.
        Differs from the paper in: the directions are c times as long, so that they are those of the
        upper loss; x and y move from the same point (there y sees the new x); no non-smooth part of
        the lower loss.
    """

    penalty: float = 10.0
    power: float = 0.0
    smoothing: float = 1.0
    step_size: float | None = None

    moves_lower: ClassVar[bool] = True

    def __post_init__(self) -> None:
        positive("penalty", self.penalty)
        positive("power", self.power, zero=True)
        if self.power >= 0.5:
            raise ValueError(f"`power` must be below 1/2, got {self.power!r}")
        positive("smoothing", self.smoothing)
        check_step_size(self.step_size)

    def num_lower_batches(self) -> int:
        return 1

    def begin(self, oracles: Oracles) -> dict[str, Any]:
        return {"calls": 0, "theta": fresh_copy(oracles)}

    def respond(
        self, oracles: Oracles, state: Any, lower_optimizer: Optimizers | None
    ) -> Directions:
        calls, old, batch = state["calls"], state["theta"], last_batch(oracles)
        upper, lower, weight = oracles.upper, oracles.lower, 1 / self.smoothing
        step_sizes = self.rates(oracles, lower_optimizer)
        _, _, before = oracles.partials("lower", upper, old, batch)
        pulled = {n: g + weight * (old[n] - lower[n].detach()) for n, g in before.items()}
        theta = stepped(old, pulled, step_sizes)
        _, there, after = oracles.partials("lower", upper, theta, batch)
        _, here, residual = oracles.partials("lower", upper, lower, batch)
        evaluation, of_x, of_y = oracles.partials("upper", upper, lower)
        penalty = self.penalty * (calls + 1) ** self.power
        gap = {n: y.detach() - theta[n] for n, y in lower.items()}
        if not calls:
            warn_if_rough(self.smoothing, secant_curvature(old, theta, before, after))
        return Directions(
            evaluation,
            of_x,
            {n: penalty * (g - there[n]) for n, g in here.items()},
            {n: of_y[n] + penalty * (g - weight * gap[n]) for n, g in residual.items()},
            state={"calls": calls + 1, "theta": theta},
            lower_residual=norm(residual),
        )

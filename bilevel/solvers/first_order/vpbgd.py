r"""`VPBGD`: descent in both levels on the upper loss with the lower level's value gap as a penalty.

$$ F(x, y) + \gamma \big( G(x, y) - \min_{\omega} G(x, \omega) \big) $$

By the envelope theorem the minimum's gradient in x is $\partial_x G(x, \omega)$, with $\omega$ kept near
the minimiser by gradient steps of its own. No second derivative; the lower level may have many minima
(a Polyak-Lojasiewicz inequality is enough). Stationary points are those of the bilevel problem up to
$O(1/\gamma)$.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, final

from bilevel.arguments import explained_settings
from bilevel.optimizers import Optimizers
from bilevel.oracles import Oracles
from bilevel.solvers.answers import Directions
from bilevel.solvers.first_order.advice import secant_curvature, warn_if_unbounded
from bilevel.solvers.first_order.base import FirstOrder
from bilevel.solvers.first_order.runs import (
    check_penalty,
    check_run,
    fresh_copy,
    grown,
    last_batch,
    lower_run,
)
from bilevel.tree import norm


@final
@explained_settings
@dataclass(frozen=True)
class VPBGD(FirstOrder):
    """Penalty-based bilevel gradient descent with the value gap; moves both levels.

    The two optimizers' step sizes have to be below 2 over the curvature of the penalised loss, which
    grows with the penalty: of the order of 1 / penalty.

    Args:
        penalty: gamma at the first call; the distance of y to the lower solution is of the order of
            1 / penalty.
        growth: what it grows by at each call.
        max_penalty: where it stops growing; `None` for nowhere.
        num_steps: gradient steps of the auxiliary variable omega at each call.
        step_size: of these; `None` for the learning rate that the lower optimizer has now.

    Raises:
        ValueError: if a setting is out of range.

    Example:
        >>> VPBGD(penalty=0.0, growth=1e-3, max_penalty=0.2).num_steps
        1

    References:
        On Penalty-based Bilevel Gradient Descent Method (Shen, Chen, 2023),
        https://arxiv.org/abs/2302.05185, Algorithm 1 (V-PBGD). Differs from the paper in: omega goes
        on from where it was, as in the authors' code, and does not begin at y in each call. The code
        also divides both step sizes by max(penalty, 1), which here is a matter of the optimizers.
    """

    penalty: float = 10.0
    growth: float = 0.0
    max_penalty: float | None = None
    num_steps: int = 1
    step_size: float | None = None

    moves_lower: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_penalty(self.penalty, self.growth, self.max_penalty, zero=True)
        check_run(self.num_steps, self.step_size)

    def num_lower_batches(self) -> int:
        return self.num_steps

    def begin(self, oracles: Oracles) -> dict[str, Any]:
        return {"calls": 0, "omega": fresh_copy(oracles)}

    def respond(
        self, oracles: Oracles, state: Any, lower_optimizer: Optimizers | None
    ) -> Directions:
        name, calls, batch = type(self).__name__, state["calls"], last_batch(oracles)
        penalty = grown(self.penalty, self.growth, self.max_penalty, calls)
        upper, lower = oracles.upper, oracles.lower
        step_sizes = self.rates(oracles, lower_optimizer)
        omega, _ = lower_run(oracles, state["omega"], step_sizes, self.num_steps)
        evaluation, of_x, of_y = oracles.partials("upper", upper, lower)
        _, here, residual = oracles.partials("lower", upper, lower, batch)
        _, there, last = oracles.partials("lower", upper, omega, batch)
        if not calls:  # omega began at the lower variables
            _, _, ahead = oracles.partials("upper", upper, omega)
            bends = secant_curvature(lower, omega, of_y, ahead)
            bears = secant_curvature(lower, omega, residual, last)
            most = (self.max_penalty or math.inf) if self.growth else penalty
            warn_if_unbounded(name, most, bends, bears)
        return Directions(
            evaluation,
            of_x,
            {n: penalty * (g - there[n]) for n, g in here.items()},
            {n: g + penalty * residual[n] for n, g in of_y.items()},
            state={"calls": calls + 1, "omega": omega},
            lower_residual=norm(residual),
        )

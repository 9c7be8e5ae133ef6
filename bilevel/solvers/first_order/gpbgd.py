r"""`GPBGD`: descent in both levels on the upper loss with the lower gradient's norm as a penalty.

$$ F(x, y) + \frac{\gamma}{2} \|\partial_y G(x, y)\|^2, \qquad
   \nabla \frac{1}{2} \|\partial_y G\|^2 =
   \big( (\partial^2_{yx} G)^\top w, \; (\partial^2_{yy} G)^\top w \big), \quad w = \partial_y G . $$

One Hessian-vector and one cross product a call, no auxiliary variable. The penalty vanishes wherever the
lower gradient does, at saddle points and maxima too.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, final

from bilevel.arguments import explained_settings
from bilevel.losses.true_gradient import refuse_no_lower_loss
from bilevel.optimizers import Optimizers
from bilevel.oracles import Oracles
from bilevel.solvers.answers import Directions
from bilevel.solvers.base import Solver
from bilevel.solvers.first_order.runs import check_penalty, grown


@final
@explained_settings
@dataclass(frozen=True)
class GPBGD(Solver):
    """Penalty-based bilevel gradient descent with the gradient norm; moves both levels.

    The two optimizers' step sizes have to be below 2 over the curvature of the penalised loss: about
    2 / (penalty * L^2), with L the largest eigenvalue of the lower Hessian.

    Args:
        penalty: gamma at the first call; the distance of y to the lower solution is of the order of
            1 / penalty.
        growth: what it grows by at each call.
        max_penalty: where it stops growing; `None` for nowhere.

    Raises:
        ValueError: if a setting is out of range.

    Example:
        >>> GPBGD(penalty=10.0)
        GPBGD(penalty=10.0, growth=0.0, max_penalty=None)

    References:
        On Penalty-based Bilevel Gradient Descent Method (Shen, Chen, 2023),
        https://arxiv.org/abs/2302.05185 (G-PBGD). Differs from the paper in: half the squared norm, as
        in the authors' code. The code also divides both step sizes by max(penalty, 1), which here is a
        matter of the optimizers.
    """

    penalty: float = 10.0
    growth: float = 0.0
    max_penalty: float | None = None

    moves_lower: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_penalty(self.penalty, self.growth, self.max_penalty, zero=True)

    def num_lower_batches(self) -> int:
        return 1

    def approximates(self) -> bool:
        return True

    def context(self, oracles: Oracles) -> AbstractContextManager[None]:
        refuse_no_lower_loss(oracles.problem, f"`{type(self).__name__}`")
        return oracles.differentiated_twice(type(self).__name__)

    def begin(self, oracles: Oracles) -> dict[str, Any]:
        return {"calls": 0}

    def respond(
        self, oracles: Oracles, state: Any, lower_optimizer: Optimizers | None
    ) -> Directions:
        calls, lower = state["calls"], oracles.lower
        penalty = grown(self.penalty, self.growth, self.max_penalty, calls)
        evaluation, of_x, of_y = oracles.partials("upper", oracles.upper, lower)
        linear = oracles.linearize_lower(oracles.upper, lower)
        curved = linear.layout.unravel(linear.hessian(linear.gradient))
        across = linear.cross(linear.gradient)
        return Directions(
            evaluation,
            of_x,
            {name: penalty * g for name, g in across.items()},
            {n: of_y[n] + penalty * g for n, g in zip(lower, curved, strict=True)},
            state={"calls": calls + 1},
            lower_residual=linear.residual,
            num_products=1,
        )

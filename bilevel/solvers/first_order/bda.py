r"""`BDA`: unrolled steps that descend on both losses, for lower levels with many solutions.

$$ y_{k} = y_{k-1} - \big( \alpha_k s_u \, \partial_y F(x, y_{k-1})
   + (1 - \alpha_k) s_l \, \partial_y G(x, y_{k-1}) \big), \qquad \alpha_k = \alpha / k . $$

As $\alpha_k \to 0$ and $\sum \alpha_k = \infty$, the end tends to that lower solution which is best for
the upper loss, where plain unrolling ends at the one nearest to its start. The hypergradient is the
derivative of $F(x, y_T(x))$ through all steps.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, final

from bilevel.arguments import explained_settings
from bilevel.autodiff import fill, vector_jacobian_product
from bilevel.distributed import mean_over_ranks
from bilevel.losses.true_gradient import refuse_no_lower_loss
from bilevel.optimizers import Optimizers
from bilevel.oracles import Oracles
from bilevel.refusals import positive, whole
from bilevel.solvers.answers import Response, ResponseProduct
from bilevel.solvers.base import Solver
from bilevel.solvers.step_sizes import Rates, own_step_sizes
from bilevel.tree import Tree, norm


@final
@explained_settings
@dataclass(frozen=True)
class BDA(Solver):
    """Bilevel descent aggregation: differentiates through steps of gradient descent on both losses.

    The steps are hypothetical and begin at the current lower variables. All of them stay in memory.

    Args:
        num_steps: number T of steps.
        aggregation: alpha: step k gives the upper loss the weight alpha / k, at most 1.
        step_size: s_l, of the lower loss; `None` for the learning rate that the lower optimizer has
            now.
        upper_step_size: s_u, of the upper loss; `None` for that of the lower one.

    Raises:
        ValueError: if a setting is out of range.

    Example:
        >>> BDA(num_steps=50, step_size=0.1).aggregation
        0.5

    References:
        A Generic First-Order Algorithmic Framework for Bi-Level Programming Beyond Lower-Level
        Singleton (Liu, Mu, Yuan, Zeng, Zhang, 2020), https://arxiv.org/abs/2006.04045, Algorithm 1.
        Differs from the paper in: gradient steps without a projection; they begin at the current
        lower variables, which `train` moves, and not at a fixed point.
    """

    num_steps: int
    aggregation: float = 0.5
    step_size: float | None = None
    upper_step_size: float | None = None

    def __post_init__(self) -> None:
        whole("num_steps", self.num_steps)
        positive("aggregation", self.aggregation)
        if self.aggregation > 1:
            raise ValueError(f"`aggregation` must not exceed 1, got {self.aggregation!r}")
        for name in ("step_size", "upper_step_size"):
            if getattr(self, name) is not None:
                positive(name, getattr(self, name))

    def num_lower_batches(self) -> int:
        return self.num_steps

    def approximates(self) -> bool:
        return True

    def context(self, oracles: Oracles) -> AbstractContextManager[None]:
        refuse_no_lower_loss(oracles.problem, f"`{type(self).__name__}`")
        return oracles.differentiated_twice(type(self).__name__)

    def check(self, oracles: Oracles, lower_optimizer: Optimizers | None) -> None:
        with self.context(oracles):
            self._rates(oracles, lower_optimizer)

    def respond(self, oracles: Oracles, state: Any, lower_optimizer: Optimizers | None) -> Response:
        own, others = self._rates(oracles, lower_optimizer)
        upper, points = oracles.upper, oracles.lower
        for k in range(1, self.num_steps + 1):
            alpha, index = self.aggregation / k, (k - 1) % len(oracles.lower_batches)
            _, grads = oracles.lower_gradient(upper, points, index, create_graph=True)
            of_g = dict(zip(points, fill(list(grads.values()), list(points.values())), strict=True))
            of_f = _upper_part(oracles, upper, points)
            moved = {n: alpha * others[n] * of_f[n] + (1 - alpha) * own[n] * of_g[n] for n in own}
            points = {n: y - moved[n] if n in moved else y for n, y in points.items()}

        def vjp(cotangent: Tree) -> ResponseProduct:
            found = vector_jacobian_product(
                list(points.values()), list(upper.values()), list(cotangent.values())
            )
            product = dict(zip(upper, mean_over_ranks(found), strict=True))
            return ResponseProduct(product, num_products=self.num_steps)

        return Response(points, vjp, lower_residual=norm([g.detach() for g in of_g.values()]))

    def _rates(self, oracles: Oracles, lower_optimizer: Optimizers | None) -> tuple[Rates, Rates]:
        name, purpose = type(self).__name__, "moves a copy of the lower variables"
        own = own_step_sizes(oracles, self.step_size, lower_optimizer, name, purpose)
        if self.upper_step_size is None:
            return own, own
        return own, dict.fromkeys(own, self.upper_step_size)


def _upper_part(oracles: Oracles, upper: Tree, points: Tree) -> Tree:
    """dF/dy with its graph, averaged over the ranks."""
    evaluation = oracles.evaluate("upper", upper, points)
    found = oracles.gradient(evaluation.loss, points, create_graph=True)
    _, grads = oracles.mean_over_ranks(evaluation, list(found.values()))
    return dict(zip(points, fill(grads, list(points.values())), strict=True))

r"""`SAMA`: the identity for the lower Hessian, and the lower optimizer's own Jacobian.

The lower optimizer moves by $y - u(g)$ with $g = \partial_y G(x, y)$. Its fixed point, differentiated
with the identity in the place of $\partial u / \partial y$, gives

$$ \Big(\frac{dy^*}{dx}\Big)^{\!\top} v \approx
   - (\partial^2_{yx} G)^\top \Big(\frac{\partial u}{\partial g}\Big)^{\!\top} v . $$

For Adam $\partial u / \partial g$ scales every entry by its own rate. The product with the mixed
derivative is a difference of two gradients. Three gradients of the lower loss, memory of one.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, final

from bilevel.arguments import explained_settings
from bilevel.autodiff import vector_jacobian_product
from bilevel.losses.true_gradient import refuse_no_true_loss
from bilevel.optimizers import Optimizers, listed
from bilevel.oracles import Oracles
from bilevel.refusals import positive
from bilevel.solvers.answers import Response, ResponseProduct
from bilevel.solvers.base import Solver
from bilevel.solvers.one_step.cross_difference import cross_difference
from bilevel.solvers.step_sizes import refuse_learned_options
from bilevel.tree import Tree, norm
from bilevel.twins import RunningTwin, rule_of


@final
@explained_settings
@dataclass(frozen=True)
class SAMA(Solver):
    """Adaptive one-step differentiation: what the running lower optimizer would make of a change.

    Needs a running `torch.optim` SGD, Adam or AdamW for the lower level.

    Args:
        difference: how far from the lower variables the two gradients are taken, a distance over all
            of them together.

    Raises:
        ValueError: if the setting is out of range, or there is no lower optimizer.

    Example:
        >>> SAMA().difference
        0.01

    References:
        Making Scalable Meta Learning Practical (Choe, Mehta, Ahn, Neiswanger, Xie, Strubell, Xing,
        2023), https://arxiv.org/abs/2310.05674, equations 4 and 5. Differs from the paper in:
        the Jacobian of the update is that of the optimizer's exact formula, bias correction included;
        the lower variables are not nudged along the upper gradient; ranks exchange every gradient.
    """

    difference: float = 0.01

    def __post_init__(self) -> None:
        positive("difference", self.difference)

    def num_lower_batches(self) -> int:
        return 1

    def approximates(self) -> bool:
        return True

    def context(self, oracles: Oracles) -> AbstractContextManager[None]:
        variables = oracles.slots.variables("lower")
        refuse_no_true_loss(oracles.problem, variables, type(self).__name__)
        return nullcontext()

    def check(self, oracles: Oracles, lower_optimizer: Optimizers | None) -> None:
        with self.context(oracles):
            self._running(oracles, lower_optimizer)

    def respond(self, oracles: Oracles, state: Any, lower_optimizer: Optimizers | None) -> Response:
        running = self._running(oracles, lower_optimizer)
        upper, lower = oracles.upper, oracles.lower
        _, grads = oracles.lower_gradient(upper, lower)
        sources = {n: g.detach().requires_grad_() for n, g in grads.items() if g is not None}
        twin = RunningTwin(running, oracles.slots.variables("lower"), lower, set(sources))
        points = [p.detach() for p in twin.pack(lower)]
        after, _ = twin.step(points, {**grads, **sources}, twin.start(points))

        def vjp(cotangent: Tree) -> ResponseProduct:
            felt = vector_jacobian_product(after, list(sources.values()), twin.pack(cotangent))
            direction = dict(zip(sources, felt, strict=True))
            product = cross_difference(oracles, upper, lower, direction, self.difference)
            return ResponseProduct(product, num_products=1)

        return Response(lower, vjp, norm([g.detach() for g in sources.values()]))

    def _running(self, oracles: Oracles, lower_optimizer: Optimizers | None) -> list[Any]:
        if not lower_optimizer:
            raise ValueError(
                "`SAMA` scales the lower gradient as the running lower optimizer does; pass it as "
                "`lower_optimizer`, or choose `DARTS(step_size=...)`, which takes a plain step"
            )
        for optimizer in listed(lower_optimizer):
            rule_of(optimizer)
        refuse_learned_options(oracles, lower_optimizer, type(self).__name__)
        return listed(lower_optimizer)

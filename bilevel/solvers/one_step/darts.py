r"""`DARTS`: one virtual lower step, and its derivative by finite differences.

With $y' = y - \xi \, \partial_y G(x, y)$ the answer, its derivative is $-\xi \, \partial^2_{yx} G$, so

$$ \frac{d}{dx} F(x, y') = \partial_x F(x, y') - \xi \, (\partial^2_{yx} G)^\top \partial_y F(x, y'), $$

and the product is a difference of two gradients of G in x, at y displaced along $\partial_y F$. Three
gradients of the lower loss, no second derivative, memory of one gradient.
"""

from dataclasses import dataclass
from typing import Any, final

from bilevel.arguments import explained_settings
from bilevel.optimizers import Optimizers
from bilevel.oracles import Oracles
from bilevel.refusals import positive
from bilevel.solvers.answers import Response, ResponseProduct
from bilevel.solvers.first_order.base import FirstOrder
from bilevel.solvers.first_order.runs import stepped
from bilevel.solvers.one_step.cross_difference import cross_difference
from bilevel.solvers.step_sizes import check_step_size
from bilevel.tree import Tree, norm


@final
@explained_settings
@dataclass(frozen=True)
class DARTS(FirstOrder):
    """One virtual step of gradient descent, differentiated by finite differences.

    Args:
        step_size: of the virtual step; `None` for the learning rate that the lower optimizer has now.
        difference: how far from the lower variables the two gradients are taken, a distance over all
            of them together.

    Raises:
        ValueError: if a setting is out of range.

    Example:
        >>> DARTS(step_size=0.1).difference
        0.01

    References:
        DARTS: Differentiable Architecture Search (Liu, Simonyan, Yang, 2019),
        https://arxiv.org/abs/1806.09055, equations 7 and 8. Differs from the paper in: nothing; where
        the lower optimizer has momentum, the virtual step is still plain gradient descent.
    """

    step_size: float | None = None
    difference: float = 0.01

    def __post_init__(self) -> None:
        positive("difference", self.difference)
        check_step_size(self.step_size)

    def num_lower_batches(self) -> int:
        return 1

    def respond(self, oracles: Oracles, state: Any, lower_optimizer: Optimizers | None) -> Response:
        upper, lower = oracles.upper, oracles.lower
        step_sizes = self.rates(oracles, lower_optimizer)
        _, _, grads = oracles.partials("lower", upper, lower)

        def vjp(cotangent: Tree) -> ResponseProduct:
            direction = {n: -rate * cotangent[n] for n, rate in step_sizes.items()}
            product = cross_difference(oracles, upper, lower, direction, self.difference)
            return ResponseProduct(product, num_products=1)

        return Response(stepped(lower, grads, step_sizes), vjp, norm(grads))

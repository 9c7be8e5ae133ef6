r"""`StocBiO`: lower steps, then a hypergradient whose inverse Hessian is a sum over fresh minibatches.

$$ \Big(\frac{dy^*}{dx}\Big)^{\!\top} \partial_y F \approx - (\partial^2_{yx} G)^\top \,
   \eta \sum_{k=0}^{K} \prod_{j \le k} (I - \eta H_j) \; \partial_y F , $$

each $H_j$ the lower Hessian on a minibatch of its own.
"""

from dataclasses import dataclass
from typing import Any, final

from bilevel.arguments import explained_settings
from bilevel.optimizers import Optimizers
from bilevel.oracles import Oracles
from bilevel.refusals import whole
from bilevel.solvers.answers import Response, ResponseProduct
from bilevel.solvers.single_loop import samples
from bilevel.solvers.single_loop.base import Stochastic
from bilevel.solvers.step_sizes import check_step_size
from bilevel.tree import Tree


@final
@explained_settings
@dataclass(frozen=True)
class StocBiO(Stochastic):
    """Stochastic bilevel optimizer: a warm-started lower loop and a Neumann sum over fresh minibatches.

    Not a single loop: the lower steps are those of `train` (`lower_steps=10` in the paper's
    experiments), and only the hypergradient is here. It is `Implicit(Neumann(...))` whose every product
    sees another lower batch; with one batch for all it is that.

    Args:
        num_terms: products with the Hessian in the sum, each on a fresh lower batch where there are.
        step_size: of the sum, below 2 / the largest eigenvalue of the Hessian; `None` for the
            learning rate that the lower optimizer has now.

    Raises:
        ValueError: if a setting is out of range, or there is neither a step size nor an optimizer.

    Example:
        >>> StocBiO(num_terms=20).num_terms
        20

    References:
        Bilevel Optimization: Convergence Analysis and Enhanced Design (Ji, Yang, Liang, 2021),
        https://arxiv.org/abs/2010.07962, Algorithms 2 and 3. Differs from the paper in: all minibatches
        of the sum are of one size.
    """

    num_terms: int = 10
    step_size: float | None = None

    def __post_init__(self) -> None:
        whole("num_terms", self.num_terms)
        check_step_size(self.step_size)

    def num_lower_batches(self) -> int:
        return 1 + self.num_terms

    def respond(self, oracles: Oracles, state: Any, lower_optimizer: Optimizers | None) -> Response:
        rate = self.rate(oracles, lower_optimizer)
        at = oracles.upper, oracles.lower
        first = oracles.on(None, oracles.lower_batches[:1]).linearize_lower(*at)

        def vjp(cotangent: Tree) -> ResponseProduct:
            target = samples.as_vector(list(cotangent.values()), rate)
            vector = samples.neumann(oracles, at, target, rate, self.num_terms)
            product = {name: -g for name, g in first.cross(vector).items()}
            return ResponseProduct(product, num_products=self.num_terms)

        return Response(at[1], vjp, lower_residual=first.residual)

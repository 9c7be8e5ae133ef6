r"""`TTSA`: two time scales, the inverse Hessian by one random term of its Neumann series.

$$ \Big(\frac{dy^*}{dx}\Big)^{\!\top} \partial_y F \approx - (\partial^2_{yx} G)^\top \,
   \eta K \prod_{j=1}^{p} (I - \eta H_j) \; \partial_y F , $$

p uniform in $0, \dots, K - 1$ and each $H_j$ the lower Hessian on a minibatch of its own: an unbiased
estimate of the sum of the first K terms, at half the products and far more noise.
"""

from dataclasses import dataclass
from typing import Any, final

from bilevel.arguments import explained_settings
from bilevel.optimizers import Optimizers
from bilevel.oracles import Oracles
from bilevel.refusals import SEEDS, whole
from bilevel.solvers.answers import Response, ResponseProduct
from bilevel.solvers.single_loop import samples
from bilevel.solvers.single_loop.base import Stochastic
from bilevel.solvers.step_sizes import check_step_size
from bilevel.tree import Tree


@final
@explained_settings
@dataclass(frozen=True)
class TTSA(Stochastic):
    """Two-timescale stochastic approximation: one lower step, a randomised hypergradient.

    The lower step is that of `train` (`lower_steps=1`). The name is the schedule of the optimizers: x
    must become slower and slower than y, in theory (step + 1) ** (-3/5) against (step + 1) ** (-2/5).

    Args:
        num_terms: terms of the series that is drawn from; up to one product less is taken, each on a
            fresh lower batch where there are.
        step_size: of the series, below 2 / the largest eigenvalue of the Hessian; `None` for the
            learning rate that the lower optimizer has now.
        seed: of the terms that are drawn.

    Raises:
        ValueError: if a setting is out of range, or there is neither a step size nor an optimizer.

    Example:
        >>> TTSA(num_terms=20).num_terms
        20

    References:
        A Two-Timescale Framework for Bilevel Optimization: Complexity Analysis and Application to
        Actor-Critic (Hong, Wai, Wang, Yang, 2020), https://arxiv.org/abs/2007.05170, Algorithm 1.
        Differs from the paper in: the upper level is not projected onto a set.
    """

    num_terms: int = 10
    step_size: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        whole("num_terms", self.num_terms)
        whole("seed", self.seed, *SEEDS)
        check_step_size(self.step_size)

    def num_lower_batches(self) -> int:
        return self.num_terms  # one for the two derivatives, the rest for the products

    def begin(self, oracles: Oracles) -> dict[str, int]:
        return {"calls": 0, "seed": self.seed}

    def respond(self, oracles: Oracles, state: Any, lower_optimizer: Optimizers | None) -> Response:
        rate = self.rate(oracles, lower_optimizer)
        at = oracles.upper, oracles.lower
        first = oracles.on(None, oracles.lower_batches[:1]).linearize_lower(*at)

        def vjp(cotangent: Tree) -> ResponseProduct:
            target = samples.as_vector(list(cotangent.values()), rate)
            length = samples.drawn_length(self.num_terms, (state["seed"], state["calls"]))
            vector = samples.scaled_term(oracles, at, target, rate, self.num_terms, length)
            product = {name: -g for name, g in first.cross(vector).items()}
            after = state | {"calls": state["calls"] + 1}
            return ResponseProduct(product, num_products=length, state=after)

        return Response(at[1], vjp, lower_residual=first.residual)

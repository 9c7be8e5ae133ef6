r"""`MRBO`: recursive momentum in both levels, the inverse Hessian by a sum over fresh minibatches.

With $w$ for the hypergradient whose inverse is the sum $\eta \sum_{k \le K} \prod_{j \le k}
(I - \eta H_j)$, each $H_j$ the lower Hessian on a minibatch of its own, and $g$ for the lower gradient,
both directions are

$$ d_t = w_t + (1 - \eta_t) ( d_{t-1} - w_{t-1} ) , \qquad \eta_t = \eta_0 \, (t + 1)^{-2/3} , $$

with $w_{t-1}$ taken again on the minibatches of step t.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, final

from torch import Tensor

from bilevel.arguments import explained_settings
from bilevel.optimizers import Optimizers
from bilevel.oracles import Oracles
from bilevel.refusals import positive, whole
from bilevel.solvers.answers import Directions
from bilevel.solvers.single_loop import samples
from bilevel.solvers.single_loop.base import Stochastic
from bilevel.solvers.single_loop.momentum import begin_momenta, double_momentum
from bilevel.solvers.step_sizes import check_step_size
from bilevel.tree import Tree


@final
@explained_settings
@dataclass(frozen=True)
class MRBO(Stochastic):
    """Momentum-based recursive bilevel optimizer: recursive momentum over a truncated Neumann sum.

    The theory wants both learning rates to fall as (step + 1) ** (-1/3).

    Args:
        num_terms: products with the Hessian in the sum, each on a fresh lower batch where there are.
        step_size: of the sum, below 2 / the largest eigenvalue of the Hessian; `None` for the
            learning rate that the lower optimizer has now.
        eta: eta_0 of the weight of the plain estimate, in (0, 1]; the first call has no other.
        decay: the power of the call's number that it falls with; 0 for a constant one.

    Raises:
        ValueError: if a setting is out of range, or there is neither a step size nor an optimizer.

    Example:
        >>> MRBO(num_terms=5).eta
        0.5

    References:
        Provably Faster Algorithms for Bilevel Optimization (Yang, Ji, Liang, 2021),
        https://arxiv.org/abs/2106.04692, Algorithm 1. Differs from the paper in: minibatches of the sum
        are of one size; the momentum begins at the first estimate.
    """

    moves_lower: ClassVar[bool] = True

    num_terms: int = 10
    step_size: float | None = None
    eta: float = 0.5
    decay: float = 2 / 3

    def __post_init__(self) -> None:
        whole("num_terms", self.num_terms)
        samples.check_share("eta", self.eta)
        positive("decay", self.decay, zero=True)
        check_step_size(self.step_size)

    def num_lower_batches(self) -> int:
        return 1 + self.num_terms

    def begin(self, oracles: Oracles) -> dict[str, Any]:
        return begin_momenta(oracles)

    def respond(
        self, oracles: Oracles, state: Any, lower_optimizer: Optimizers | None
    ) -> Directions:
        rate = self.rate(oracles, lower_optimizer)

        def inverse(at: tuple[Tree, Tree], vector: Tensor) -> Tensor:
            return samples.neumann(oracles, at, vector, rate, self.num_terms)

        weight = self.eta * (state["calls"] + 1) ** -self.decay
        return double_momentum(oracles, type(self), state, weight, inverse, self.num_terms)

r"""`SUSTAIN`: recursive momentum in both levels, the inverse Hessian by one random term of its series.

With $w$ for the hypergradient whose inverse is $\eta K \prod_{j \le p} (I - \eta H_j)$, p uniform in
$0, \dots, K - 1$ and each $H_j$ the lower Hessian on a minibatch of its own, and $g$ for the lower
gradient, both directions are

$$ d_t = w_t + (1 - \eta_t) ( d_{t-1} - w_{t-1} ) , \qquad \eta_t = \eta_0 \, (t + 1)^{-2/3} , $$

with $w_{t-1}$ taken again on the minibatches, and with the p, of step t.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, final

from torch import Tensor

from bilevel.arguments import explained_settings
from bilevel.optimizers import Optimizers
from bilevel.oracles import Oracles
from bilevel.refusals import SEEDS, positive, whole
from bilevel.solvers.answers import Directions
from bilevel.solvers.single_loop import samples
from bilevel.solvers.single_loop.base import Stochastic
from bilevel.solvers.single_loop.momentum import begin_momenta, double_momentum
from bilevel.solvers.step_sizes import check_step_size
from bilevel.tree import Tree


@final
@explained_settings
@dataclass(frozen=True)
class SUSTAIN(Stochastic):
    """Single-timescale double momentum: recursive momentum over one term of a Neumann series.

    The theory wants both learning rates to fall as (step + 1) ** (-1/3).

    Args:
        num_terms: terms of the series that is drawn from; up to one product less is taken, each on a
            fresh lower batch where there are.
        step_size: of the series, below 2 / the largest eigenvalue of the Hessian; `None` for the
            learning rate that the lower optimizer has now.
        eta: eta_0 of the weight of the plain estimate, in (0, 1]; the first call has no other.
        decay: the power of the call's number that it falls with; 0 for a constant one.
        seed: of the terms that are drawn.

    Raises:
        ValueError: if a setting is out of range, or there is neither a step size nor an optimizer.

    Example:
        >>> SUSTAIN(num_terms=5).eta
        0.5

    References:
        A Near-Optimal Algorithm for Stochastic Bilevel Optimization via Double-Momentum (Khanduri,
        Zeng, Hong, Wai, Wang, Yang, 2021), https://arxiv.org/abs/2102.07367, Algorithm 1. Differs from
        the paper in: the weight of the plain estimate falls with the number of the call instead of with
        the square of the step size (the same for the paper's step sizes); the momentum begins at the
        first estimate.
    """

    moves_lower: ClassVar[bool] = True

    num_terms: int = 10
    step_size: float | None = None
    eta: float = 0.5
    decay: float = 2 / 3
    seed: int = 0

    def __post_init__(self) -> None:
        whole("num_terms", self.num_terms)
        whole("seed", self.seed, *SEEDS)
        samples.check_share("eta", self.eta)
        positive("decay", self.decay, zero=True)
        check_step_size(self.step_size)

    def num_lower_batches(self) -> int:
        return self.num_terms  # one for the two derivatives, the rest for the products

    def begin(self, oracles: Oracles) -> dict[str, Any]:
        return begin_momenta(oracles) | {"seed": self.seed}

    def respond(
        self, oracles: Oracles, state: Any, lower_optimizer: Optimizers | None
    ) -> Directions:
        rate = self.rate(oracles, lower_optimizer)
        length = samples.drawn_length(self.num_terms, (state["seed"], state["calls"]))

        def inverse(at: tuple[Tree, Tree], vector: Tensor) -> Tensor:
            return samples.scaled_term(oracles, at, vector, rate, self.num_terms, length)

        weight = self.eta * (state["calls"] + 1) ** -self.decay
        return double_momentum(oracles, type(self), state, weight, inverse, length)

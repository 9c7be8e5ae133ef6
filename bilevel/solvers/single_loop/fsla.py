r"""`FSLA`: SOBA whose x follows recursive momentum.

With $w$ for SOBA's estimate of the hypergradient on the minibatch at hand, here at $t$ and once more,
on the same minibatch, at the variables of the step before,

$$ d_t = w_t + (1 - \eta) ( d_{t-1} - w_{t-1} ), \qquad x \mathrel{-}= \gamma \, d_t , $$

while y and v move as in `SOBA`. What the minibatch has in common at both points cancels.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, final

from torch import Tensor

from bilevel.arguments import explained_settings
from bilevel.optimizers import Optimizers
from bilevel.oracles import Oracles
from bilevel.solvers.answers import Directions
from bilevel.solvers.single_loop import samples
from bilevel.solvers.single_loop.base import Stochastic
from bilevel.solvers.step_sizes import check_step_size
from bilevel.tree import Tree, leaves


@final
@explained_settings
@dataclass(frozen=True)
class FSLA(Stochastic):
    """Fully single loop: SOBA's steps of y and v, recursive momentum for x.

    Args:
        eta: weight of the plain estimate, in (0, 1]; 1 is `SOBA`. `None` for the step size of v, which
            a falling learning rate makes fall, too.
        step_size: of the linear system's variable v; `None` for the learning rate that the lower
            optimizer has now.

    Raises:
        ValueError: if a setting is out of range, or there is neither a step size nor an optimizer.

    Example:
        >>> FSLA(eta=0.3).eta
        0.3

    References:
        A Fully Single Loop Algorithm for Bilevel Optimization without Hessian Inverse (Li, Gu, Huang,
        2022), https://arxiv.org/abs/2112.04660, Algorithm 1. Differs from the paper in: y, v and x move
        at once instead of one after the other; one minibatch of each level serves all derivatives; the
        momentum begins at the first estimate.
    """

    moves_lower: ClassVar[bool] = True

    eta: float | None = None
    step_size: float | None = None

    def __post_init__(self) -> None:
        check_step_size(self.step_size)
        if self.eta is not None:
            samples.check_share("eta", self.eta)

    def num_lower_batches(self) -> int:
        return 1

    def begin(self, oracles: Oracles) -> dict[str, Any]:
        vector, x = samples.zeros(oracles.lower), samples.zeros(oracles.upper)
        before = samples.point(oracles, vector)
        return {"calls": 0, "vector": vector, "before": before, "estimate": [x, x]}

    def respond(
        self, oracles: Oracles, state: Any, lower_optimizer: Optimizers | None
    ) -> Directions:
        rate = self.rate(oracles, lower_optimizer)
        weight = rate.amax() if self.eta is None else samples.as_scalar(oracles, self.eta)
        weight = weight.clamp(max=1.0) if state["calls"] else samples.as_scalar(oracles, 1.0)
        given = state["vector"], state["before"], state["estimate"], weight, rate
        told, of_g, of_f, vector = samples.at_once(oracles, type(self), _step, *given)
        after = {
            "calls": state["calls"] + 1,
            "vector": vector,
            "before": samples.point(oracles, state["vector"]),
            "estimate": [of_f.by_upper, of_g.cross],
        }
        return samples.move_both(oracles, told, of_g, of_f, after, num_products=1)


def _step(
    here: Oracles,
    upper: Tree,
    lower: Tree,
    vector: Tensor,
    before: Any,
    estimate: Any,
    weight: Tensor,
    rate: Tensor,
) -> Any:
    told, of_f = samples.of_upper(here, upper, lower)
    of_g = samples.of_lower(here, upper, lower, vector)
    x, y = leaves(before[0]), leaves(before[1])
    direct = samples.recursive(
        of_f.by_upper, estimate[0], samples.of_upper(here, x, y)[1].by_upper, weight
    )
    old = samples.of_lower(here, x, y, before[2], product=False).cross
    vector = samples.stepped_vector(vector, of_g.product + of_f.by_lower, rate)
    of_g = of_g._replace(cross=samples.recursive(of_g.cross, estimate[1], old, weight))
    return told, of_g, of_f._replace(by_upper=direct), vector

r"""`MASOBA`: SOBA whose x follows a moving average of its direction.

With $w$ for SOBA's estimate of the hypergradient,

$$ h \mathrel{+}= \theta (w - h), \qquad x \mathrel{-}= \gamma h , $$

while y and v move as in `SOBA`. The average takes noise and the bias of a moving v out of the
direction, which makes the rate that of single-level SGD under the usual smoothness.
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
from bilevel.tree import Tree


@final
@explained_settings
@dataclass(frozen=True)
class MASOBA(Stochastic):
    """Moving-average SOBA: one average of the direction of x, kept from step to step.

    Args:
        weight: of the newest estimate in the average, in (0, 1]; 1 is `SOBA`.
        step_size: of the linear system's variable; `None` for the learning rate that the lower
            optimizer has now.

    Raises:
        ValueError: if a setting is out of range, or there is neither a step size nor an optimizer.

    Example:
        >>> MASOBA(weight=0.2).weight
        0.2

    References:
        Optimal Algorithms for Stochastic Bilevel Optimization under Relaxed Smoothness Conditions
        (Chen, Xiao, Balasubramanian, 2023), https://arxiv.org/abs/2306.12067, Algorithm 1. Differs
        from the paper in: the average begins at the first estimate; x moves by the average that holds
        the newest one; its weight is constant.
    """

    moves_lower: ClassVar[bool] = True

    weight: float = 0.1
    step_size: float | None = None

    def __post_init__(self) -> None:
        samples.check_share("weight", self.weight)
        check_step_size(self.step_size)

    def num_lower_batches(self) -> int:
        return 1

    def begin(self, oracles: Oracles) -> dict[str, Any]:
        nothing = samples.zeros(oracles.upper)
        return {"calls": 0, "vector": samples.zeros(oracles.lower), "average": [nothing, nothing]}

    def respond(
        self, oracles: Oracles, state: Any, lower_optimizer: Optimizers | None
    ) -> Directions:
        rate = self.rate(oracles, lower_optimizer)
        weight = samples.as_scalar(oracles, self.weight if state["calls"] else 1.0)
        given = state["vector"], state["average"], weight, rate
        told, of_g, of_f, vector = samples.at_once(oracles, type(self), _step, *given)
        average = [of_f.by_upper, of_g.cross]
        after = {"calls": state["calls"] + 1, "vector": vector, "average": average}
        return samples.move_both(oracles, told, of_g, of_f, after, num_products=1)


def _step(
    here: Oracles,
    upper: Tree,
    lower: Tree,
    vector: Tensor,
    average: Any,
    weight: Tensor,
    rate: Tensor,
) -> tuple[samples.Told, samples.OfLower, samples.OfUpper, Tensor]:
    """SOBA's step, the two terms of the direction of x averaged."""
    told, of_f = samples.of_upper(here, upper, lower)
    of_g = samples.of_lower(here, upper, lower, vector)
    vector = samples.stepped_vector(vector, of_g.product + of_f.by_lower, rate)
    direct, response = (
        h + weight * (w - h) for h, w in zip(average, (of_f.by_upper, of_g.cross), strict=True)
    )
    return told, of_g._replace(cross=response), of_f._replace(by_upper=direct), vector

r"""`SOBA`: one stochastic step of y, of the linear system's variable v and of x at a time.

At a bilevel solution three left sides vanish together (`samples`). SOBA moves along all three at once,
each estimated on the minibatch at hand:

$$ y \mathrel{-}= \rho \, \partial_y G, \qquad
   v \mathrel{-}= \rho \, ( \partial^2_{yy} G \, v + \partial_y F ), \qquad
   x \mathrel{-}= \gamma \, ( \partial_x F + (\partial^2_{yx} G)^\top v ) . $$

Cost: two gradients and two products, no inner loop, no memory beyond v.
"""

from dataclasses import dataclass
from typing import ClassVar, final

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
class SOBA(Stochastic):
    """Stochastic bilevel algorithm: y, v and x move at once, without inner loops.

    The steps of x and of y are the two optimizers'. With constant step sizes it stops at a floor that
    the noise of the minibatches sets; let both learning rates fall as 1/sqrt(step), or take `SABA` or
    `SRBA` where all samples are at hand. The ratio of the two is the fragile setting: x must be slow
    enough for y and v to follow.

    Args:
        step_size: of v, below 2 / the largest eigenvalue of the lower Hessian; `None` for the learning
            rate that the lower optimizer has now.

    Raises:
        ValueError: if a setting is out of range, or there is neither a step size nor an optimizer.

    Example:
        >>> SOBA().moves_lower
        True

    References:
        A framework for bilevel optimization that enables stochastic and global variance reduction
        algorithms (Dagreou, Ablin, Vaiter, Moreau, 2022), https://arxiv.org/abs/2201.13409,
        Algorithm 1 with the directions of SOBA. Differs from the paper in: none, with SGD in both
        levels; other optimizers transform the directions.
    """

    moves_lower: ClassVar[bool] = True

    step_size: float | None = None

    def __post_init__(self) -> None:
        check_step_size(self.step_size)

    def num_lower_batches(self) -> int:
        return 1

    def begin(self, oracles: Oracles) -> Tensor:
        return samples.zeros(oracles.lower)

    def respond(
        self, oracles: Oracles, state: Tensor, lower_optimizer: Optimizers | None
    ) -> Directions:
        rate = self.rate(oracles, lower_optimizer)
        told, lower, upper, after = samples.at_once(oracles, type(self), _step, state, rate)
        return samples.move_both(oracles, told, lower, upper, after, num_products=1)


def _step(
    here: Oracles, upper: Tree, lower: Tree, vector: Tensor, rate: Tensor
) -> tuple[samples.Told, samples.OfLower, samples.OfUpper, Tensor]:
    """The three directions on one minibatch of each level, and v after its step."""
    told, of_f = samples.of_upper(here, upper, lower)
    of_g = samples.of_lower(here, upper, lower, vector)
    return told, of_g, of_f, samples.stepped_vector(vector, of_g.product + of_f.by_lower, rate)

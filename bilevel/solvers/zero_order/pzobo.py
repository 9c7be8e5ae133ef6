r"""`PZOBO`: the response Jacobian from lower runs at displaced upper variables.

$$ \hat J = \frac{1}{Q} \sum_{j=1}^Q \frac{y_N(x + \mu u_j) - y_N(x)}{\mu} \, u_j^\top,
   \qquad u_j \sim N(0, I), $$

estimates $dy_N/dx$; the upper loss is differentiated as ever. The response term is
$\hat J^\top \partial_y F$, an inner product for each run. Where $y_N$ is linear in x it has no bias and
a squared error of $(d + 1) / Q$ of its square, d the number of upper variables.
"""

from dataclasses import dataclass
from typing import Any, final

from torch import Tensor

from bilevel.arguments import explained_settings
from bilevel.oracles import Oracles
from bilevel.refusals import SEEDS, positive, whole
from bilevel.solvers.first_order.runs import check_run
from bilevel.solvers.step_sizes import Rates
from bilevel.solvers.zero_order.base import ZeroOrder, along_random_directions
from bilevel.tree import Tree, add, dot


@final
@explained_settings
@dataclass(frozen=True)
class PZOBO(ZeroOrder):
    """Partial zeroth-order bilevel optimization: no Hessian, no Jacobian.

    Args:
        num_steps: number N of steps of gradient descent from the current lower variables.
        step_size: of these steps; `None` for the learning rate that the lower optimizer has now.
        num_directions: number Q of displaced runs per hypergradient, N lower gradients each.
        displacement: the factor mu of the directions.
        seed: of the directions.

    Raises:
        ValueError: if a setting is out of range.

    Example:
        >>> PZOBO(num_steps=5, step_size=0.1).num_directions
        4

    References:
        On the Convergence Theory for Hessian-Free Bilevel Algorithms (Sow, Ji, Liang, 2022),
        https://arxiv.org/abs/2110.07004, equations 4 and 5, Algorithm 1.
    """

    num_steps: int
    step_size: float | None = None
    num_directions: int = 4
    displacement: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        check_run(self.num_steps, self.step_size)
        whole("num_directions", self.num_directions)
        positive("displacement", self.displacement)
        whole("seed", self.seed, *SEEDS)

    def estimate(
        self, oracles: Oracles, state: Any, rates: Rates, answer: Tree, cotangent: Tree
    ) -> Tree:
        def slope(u: Tree) -> Tensor:
            _, end = self.displaced_run(oracles, rates, u, self.displacement)
            along = dot(add(end, answer, -1.0), cotangent)
            return along / (self.displacement * self.num_directions)

        return along_random_directions(state, oracles.upper, self.num_directions, slope)

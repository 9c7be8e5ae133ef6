r"""`AmIGO`: lower steps, then steps of the linear system's variable from where it was, then x.

With $v$ carried from call to call, M steps on fresh minibatches j,

$$ v \mathrel{-}= \rho \, ( \partial^2_{yy} G_j \, v + \partial_y F ), \qquad
   \Big(\frac{dy^*}{dx}\Big)^{\!\top} \partial_y F \approx (\partial^2_{yx} G)^\top v . $$

Because v starts where the last call left it, a fixed number of steps follows the moving solution.
"""

from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from bilevel.arguments import explained_settings
from bilevel.linear.base import relative
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
class AmIGO(Stochastic):
    """Amortised implicit gradient: warm starts of the lower level and of the linear system.

    Not a single loop: the lower steps are those of `train` (`lower_steps=10` in the benchmarks of its
    field), and only the hypergradient is here. One product and no lower steps besides make `SOBA`.

    Args:
        num_steps: gradient steps of the linear system, each on a fresh lower batch where there are.
        step_size: of these steps, below 2 / the largest eigenvalue of the Hessian; `None` for the
            learning rate that the lower optimizer has now.

    Raises:
        ValueError: if a setting is out of range, or there is neither a step size nor an optimizer.

    Example:
        >>> AmIGO(num_steps=5).num_steps
        5

    References:
        Amortized Implicit Differentiation for Stochastic Bilevel Optimization (Arbel, Mairal, 2022),
        https://arxiv.org/abs/2111.14580, Algorithm 1. Differs from the paper in: one minibatch of the
        upper loss serves all steps of the linear system.
    """

    num_steps: int = 10
    step_size: float | None = None

    def __post_init__(self) -> None:
        whole("num_steps", self.num_steps)
        check_step_size(self.step_size)

    def num_lower_batches(self) -> int:
        return 1 + self.num_steps

    def begin(self, oracles: Oracles) -> Tensor:
        return samples.zeros(oracles.lower)

    def respond(self, oracles: Oracles, state: Any, lower_optimizer: Optimizers | None) -> Response:
        rate = self.rate(oracles, lower_optimizer)
        at = oracles.upper, oracles.lower
        first = oracles.on(None, oracles.lower_batches[:1]).linearize_lower(*at)

        def vjp(cotangent: Tree) -> ResponseProduct:
            target = samples.as_vector(list(cotangent.values()), rate)
            vector = state
            for step in range(self.num_steps):
                missing = samples.hessian_product(oracles, at, vector, 1 + step) + target
                vector = samples.stepped_vector(vector, missing, rate)
            residual = relative(*map(torch.linalg.vector_norm, (missing, target)))
            return ResponseProduct(
                first.cross(vector),
                linear_residual=residual,
                num_products=self.num_steps,
                state=vector,
            )

        return Response(at[1], vjp, lower_residual=first.residual)

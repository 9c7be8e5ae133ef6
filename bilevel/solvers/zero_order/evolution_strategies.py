r"""`EvolutionStrategies`: the slope of the whole procedure, from its values in antithetic pairs.

With $\Phi(x) = F(x, y_T(x))$ and $y_T$ the end of T lower steps,

$$ \nabla \Phi_\sigma(x) = E_{u \sim N(0, I)} \,
   \frac{\Phi(x + \sigma u) - \Phi(x - \sigma u)}{2 \sigma} \, u $$

is the gradient of $\Phi$ smoothed over a radius $\sigma$. The mean over n pairs has no bias against it.
Where $\Phi$ is quadratic its squared error is $(d + 1) |\nabla \Phi|^2 / n$, d the number of upper
variables: for few upper variables, or procedures with no useful derivative.
"""

from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from bilevel.arguments import explained_settings
from bilevel.distributed import mean_over_ranks
from bilevel.oracles import Oracles
from bilevel.refusals import SEEDS, positive, whole
from bilevel.solvers.first_order.runs import check_run
from bilevel.solvers.step_sizes import Rates
from bilevel.solvers.zero_order.base import ZeroOrder, along_random_directions
from bilevel.tree import Tree


@final
@explained_settings
@dataclass(frozen=True)
class EvolutionStrategies(ZeroOrder):
    """Antithetic evolution strategies on x -> F(x, y_T(x)).

    Args:
        num_steps: number T of steps of gradient descent from the current lower variables.
        step_size: of these steps; `None` for the learning rate that the lower optimizer has now.
        num_pairs: pairs of evaluations per hypergradient, 2 T lower gradients each.
        sigma: length of a displacement in each upper variable.
        seed: of the displacements.

    Raises:
        ValueError: if a setting is out of range.

    Example:
        >>> EvolutionStrategies(num_steps=5, step_size=0.1).num_pairs
        8

    References:
        Evolution Strategies as a Scalable Alternative to Reinforcement Learning (Salimans, Ho, Chen,
        Sidor, Sutskever, 2017), https://arxiv.org/abs/1703.03864, section 2. Differs from the paper
        in: no ranking of the values.
    """

    num_steps: int
    step_size: float | None = None
    num_pairs: int = 8
    sigma: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        check_run(self.num_steps, self.step_size)
        whole("num_pairs", self.num_pairs)
        positive("sigma", self.sigma)
        whole("seed", self.seed, *SEEDS)

    def estimate(
        self, oracles: Oracles, state: Any, rates: Rates, answer: Tree, cotangent: Tree
    ) -> Tree:
        def slope(u: Tree) -> Tensor:
            plus, minus = (self._value(oracles, rates, u, sign) for sign in (1, -1))
            return (plus - minus) / (2 * self.sigma * self.num_pairs)

        total = along_random_directions(state, oracles.upper, self.num_pairs, slope)
        # the estimate has the direct term in it, which is added to every response
        _, direct, _ = oracles.partials("upper", oracles.upper, answer)
        return {n: g - direct[n] for n, g in total.items()}

    def _value(self, oracles: Oracles, rates: Rates, u: Tree, sign: int) -> Tensor:
        """The upper loss at the end of the lower run at displaced upper variables."""
        there, end = self.displaced_run(oracles, rates, u, sign * self.sigma)
        with torch.no_grad():
            loss = oracles.evaluate("upper", there, end).loss
        return mean_over_ranks([loss])[0]

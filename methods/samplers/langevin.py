r"""Langevin dynamics at a fixed temperature, with a Metropolis test or without.

A step of size $\eta$ at temperature T is, with $\epsilon \sim N(0, I)$,

$$ v \leftarrow v - \eta\, \nabla E(v) + \sqrt{2 \eta T}\, \epsilon . $$

Without a test its chains are of $e^{-E/T}$ up to a bias of order $\eta$; at T = 0 it is gradient
descent. With the test (MALA) a step is the proposal q of a Metropolis chain, taken with probability
$\min\big(1, e^{-(E(v') - E(v)) / T}\, q(v|v') / q(v'|v)\big)$, and the chains are of $e^{-E/T}$ exactly.
"""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bilevel.methods.samplers.base import ChainState, Sampler, Target
from bilevel.methods.samplers.hamiltonian import metropolis
from bilevel.methods.variational.base import normal_like
from bilevel.refusals import flag, positive, whole


@final
@dataclass(frozen=True)
class Langevin(Sampler):
    r"""Langevin dynamics: unadjusted, or MALA with `metropolis=True`.

    Args:
        num_steps: of a chain.
        step_size: $\eta$, which multiplies the gradient. It is in the units of the visibles, squared.
        temperature: T; below 1 chains keep to where the density is high. The factor on the noise that
            others call its scale is $\sqrt{T}$.
        metropolis: accept or refuse every step, so that no step size biases the result.

    Raises:
        TypeError: if a setting is of the wrong kind.
        ValueError: if a number is not positive; a temperature of 0 is for chains without a test.

    Example:
        >>> sampler = Langevin(num_steps=200, step_size=0.1, metropolis=True)
        >>> draws = sampler.run(
        ...     lambda v: v.square().sum(1) / 2, torch.zeros(1000, 2), torch.manual_seed(0)
        ... )
        >>> bool((draws.visible.var(0) - 1).abs().max() < 0.1)
        True

    References:
        Exponential convergence of Langevin distributions and their discrete approximations (Roberts
        and Tweedie, 1996), https://doi.org/10.2307/3318418
    """

    num_steps: int = 100
    step_size: float = 0.01
    temperature: float = 1.0
    metropolis: bool = False

    def __post_init__(self) -> None:
        whole("num_steps", self.num_steps)
        positive("step_size", self.step_size)
        flag("metropolis", self.metropolis)
        positive("temperature", self.temperature, zero=not self.metropolis)

    def step(
        self, target: Target, state: ChainState, generator: torch.Generator | None
    ) -> ChainState:
        if self.metropolis:
            size = (2 * self.step_size) ** 0.5
            return metropolis(target, state, generator, size, 1, self.temperature)
        scale = (2 * self.step_size * self.temperature) ** 0.5
        noise = normal_like(state.visible, generator)
        moved = langevin_step(state.visible, state.slope, noise, self.step_size, scale)
        visible, _ = target.reflected(moved)
        return ChainState(visible, *target.at(visible), state.accepted)


def langevin_step(x: Tensor, slope: Tensor, noise: Tensor, rate: float, scale: float) -> Tensor:
    """Down the slope, and noise on top; where the two sizes are free."""
    return x - rate * slope + scale * noise

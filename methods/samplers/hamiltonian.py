r"""Hamiltonian Monte Carlo: long moves along the contours of the energy, kept or refused exactly.

A move draws a momentum $p \sim N(0, I)$, follows $\dot v = p$, $\dot p = -\nabla E(v)$ by L leapfrog
steps of size s,

$$ p \leftarrow p - \tfrac{s}{2} \nabla E(v), \qquad v \leftarrow v + s\,p, \qquad
   p \leftarrow p - \tfrac{s}{2} \nabla E(v), $$

and takes the end with probability $\min(1, e^{-\Delta H})$, $H = E(v) + \tfrac12 \lVert p \rVert^2$. The
steps preserve volume and are their own reverse once p is turned round, so that $e^{-E}$ is invariant
whatever s and L; $\Delta H$ is of order $s^2$. At a wall of the box the momentum's component
changes its sign, which preserves volume and is reversible too.
"""

from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from torch import Tensor

from bilevel.methods.samplers.base import ChainState, Sampler, Target
from bilevel.methods.variational.base import normal_like
from bilevel.refusals import positive, whole


@final
@dataclass(frozen=True)
class HamiltonianMonteCarlo(Sampler):
    """Hamiltonian Monte Carlo with momenta of unit mass.

    Args:
        num_steps: moves of a chain, each of which is taken or refused.
        step_size: s of a leapfrog step. In d dimensions it falls as d^(-1/4); it is right where about
            two thirds of the moves are taken.
        num_leapfrog: L. A move is about `step_size * num_leapfrog` long.

    Raises:
        TypeError: if a number is of the wrong kind.
        ValueError: if one is not positive.

    Example:
        >>> sampler = HamiltonianMonteCarlo(num_steps=50, step_size=0.3, num_leapfrog=5)
        >>> start = torch.zeros(1000, 2)
        >>> draws = sampler.run(lambda v: v.square().sum(1) / 2, start, torch.manual_seed(0))
        >>> bool((draws.visible.var(0) - 1).abs().max() < 0.1), bool(draws.acceptance.mean() > 0.9)
        (True, True)

    References:
        Hybrid Monte Carlo (Duane, Kennedy, Pendleton and Roweth, 1987),
        https://doi.org/10.1016/0370-2693(87)91197-X; MCMC using Hamiltonian dynamics (Neal, 2011),
        https://arxiv.org/abs/1206.1901, which has the walls too.
    """

    num_steps: int = 100
    step_size: float = 0.1
    num_leapfrog: int = 10

    def __post_init__(self) -> None:
        whole("num_steps", self.num_steps)
        whole("num_leapfrog", self.num_leapfrog)
        positive("step_size", self.step_size)

    def step(
        self, target: Target, state: ChainState, generator: torch.Generator | None
    ) -> ChainState:
        return metropolis(target, state, generator, self.step_size, self.num_leapfrog)


@final
class Phase(NamedTuple):
    """Positions and momenta, and energies and their gradients at the positions."""

    visible: Tensor
    momentum: Tensor
    energy: Tensor
    slope: Tensor


def leapfrog(target: Target, phase: Phase, size: float, steps: int) -> Phase:
    """Positions and momenta after steps along Hamilton's equations.

    Args:
        target: whose energy it is.
        phase: where they begin.
        size: of a step.
        steps: how many, from 1.
    """
    v, p, energy, slope = phase
    for _ in range(steps):
        p = p - 0.5 * size * slope
        v, signs = target.reflected(v + size * p)
        p = p if signs is None else p * signs
        energy, slope = target.at(v)
        p = p - 0.5 * size * slope
    return Phase(v, p, energy, slope)


def metropolis(
    target: Target,
    state: ChainState,
    generator: torch.Generator | None,
    size: float,
    steps: int,
    temperature: float = 1.0,
) -> ChainState:
    """The end of a leapfrog path from a fresh momentum, where it is taken; else the state as it was.

    With one step of size s these are Langevin dynamics of rate s^2 / 2 and their Metropolis test: the
    difference of H is the logarithm of its ratio.

    Args:
        target: the density.
        state: the chains.
        generator: draws the momentum, then the test.
        size: of a leapfrog step, at temperature 1.
        steps: how many.
        temperature: T of the density exp(-E / T): as if momenta were of deviation sqrt(T).
    """
    momentum = normal_like(state.visible, generator) * temperature**0.5
    begin = Phase(state.visible, momentum, state.energy, state.slope)
    end = leapfrog(target, begin, size, steps)
    rise = (end.energy - begin.energy) + (_kinetic(end.momentum) - _kinetic(begin.momentum))
    luck = torch.rand(rise.shape, generator=generator, dtype=rise.dtype, device=rise.device)
    taken = luck.log() < -rise / temperature  # never where the path met a NaN
    wide = taken.view(-1, *[1] * (state.visible.ndim - 1))
    return ChainState(
        torch.where(wide, end.visible, state.visible),
        torch.where(taken, end.energy, state.energy),
        torch.where(wide, end.slope, state.slope),
        taken,
    )


def _kinetic(momentum: Tensor) -> Tensor:
    return 0.5 * momentum.flatten(1).square().sum(1)

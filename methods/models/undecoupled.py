"""`Undecoupled`: a joint energy with a posterior and a sampler beside it, which stand for its own."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Self, final

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from bilevel.methods.likelihood.free_energy import free_energy_bound, one_by_one
from bilevel.methods.models.chunks import chunked, chunked_distribution
from bilevel.methods.models.machine import MachineModel
from bilevel.methods.models.model import Chains, LatentModel, all_known, check_pairs, probed_draws
from bilevel.methods.networks.units import Change
from bilevel.methods.variational import VariationalJoint, VariationalPosterior


@final
@dataclass(frozen=True, kw_only=True, repr=False)
class Undecoupled(LatentModel):
    """An energy that is any module (v, h) -> (n,), a posterior q(h|v) and a joint q(v, h).

    `energy` is the free energy where there is one, else the posterior's bound on it, of `draws` draws
    whose noise is the same for every row. `sample` is the joint's, `posterior` is q(h|v) (of a machine
    with two hidden layers its mean field), and `reconstruct` the joint's mean there.

    Attributes:
        network: the energy.
        free_energy: F(v), (n, ...) -> (n,), if it is tractable.
        draws: of the bound.
        at_once: samples drawn at a time, all of them by default.
    """

    network: nn.Module
    encoder: VariationalPosterior = field()
    sampler: VariationalJoint = field()
    free_energy: Callable[[Tensor], Tensor] | None = None
    draws: int = 10
    at_once: int | None = None

    def joint_energy(self, v: Tensor, h: Tensor) -> Tensor:
        energies: Tensor = self.network(v, h)
        return energies

    def energy(self, v: Tensor) -> Tensor:
        if self.free_energy is not None:
            return chunked(self.free_energy, v)
        generator = torch.Generator(v.device).manual_seed(0)
        noise = self.encoder.noise(self.draws, generator, v)[:, None]
        energies = one_by_one(self.network)
        return chunked(
            lambda rows: free_energy_bound(energies, self.encoder, rows, noise, weighted=False), v
        )

    def sample(self, n: int, generator: torch.Generator | None, chains: Chains) -> Tensor:
        chains.refuse()
        sizes = [len(part) for part in torch.empty(n).split(self.at_once or n)]
        return torch.cat([self.sampler.sample(size, generator) for size in sizes])

    def posterior(self, v: Tensor) -> Distribution:
        if self.machine is not None and len(self.machine.latent_dims) > 1:
            return MachineModel.of(self.machine).posterior(v)
        return chunked_distribution(self.encoder.distribution, v)

    def decode(self, h: Tensor) -> Tensor:
        """The joint's mean of visibles given latents."""
        return chunked(self.sampler.visible_mean, h)

    def reconstruct(self, v: Tensor) -> Tensor:
        return self.decode(self.posterior(v).mean)

    def probe(self, v: Tensor) -> Self:
        generator, below = torch.Generator(v.device).manual_seed(0), probed_draws(self.encoder, v)
        above = self.sampler.draws(self.sampler.noise(len(v), generator, v))
        if (
            above.visible.shape[1:] != v.shape[1:]
            or above.latent.shape[1:] != below.latent.shape[1:]
        ):
            raise ValueError(
                f"the joint draws visibles of shape {tuple(above.visible.shape[1:])} and latents of "
                f"shape {tuple(above.latent.shape[1:])}, but the data have {tuple(v.shape[1:])} and "
                f"the posterior {tuple(below.latent.shape[1:])}"
            )
        check_pairs(self.joint_energy(below.visible, below.latent), below.log_prob)
        return self

    def rewritings(self) -> list[Change] | None:
        if self.machine is None:
            return None
        return all_known([p.rewriting() for p in (self.machine, self.encoder, self.sampler)])

"""`Coupled`: an energy of visibles and real latents with a posterior, sampled by Langevin dynamics."""

from dataclasses import dataclass, field, replace
from itertools import chain
from typing import ClassVar, Self, final

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from bilevel.methods.data.visibles import Visibles
from bilevel.methods.likelihood.free_energy import free_energy_bound
from bilevel.methods.machines import as_machine
from bilevel.methods.models.chunks import chunked, chunked_distribution
from bilevel.methods.models.langevin import AnnealedLangevin
from bilevel.methods.models.machine import MachineModel
from bilevel.methods.models.model import Chains, LatentModel, check_pairs, probed_draws
from bilevel.methods.objectives.posterior import energies_of
from bilevel.methods.variational import BernoulliPosterior, VariationalPosterior

ENERGY_SAMPLES = 100
"""Draws of the importance-weighted bound that `energy` is."""

_ROWS = 50  # visibles whose bound is evaluated at a time, each with `ENERGY_SAMPLES` latents


@final
@dataclass(frozen=True, kw_only=True, repr=False)
class Coupled(LatentModel):
    """An energy that is any module (v, h) -> (n,), and a posterior of its latents.

    `energy` is an importance-weighted bound on the free energy, of `ENERGY_SAMPLES` draws whose noise is
    the same for every row. Samples and reconstructions are ends of annealed Langevin dynamics. All of
    these are refused where latents are no real numbers.
    """

    network: nn.Module
    encoder: VariationalPosterior = field()
    langevin: AnnealedLangevin = field()
    draws_by_chains: ClassVar[bool] = True

    def abilities(self) -> tuple[str, ...]:
        real = self.encoder.latent_dim is not None
        return (
            ("energy", "sample", "posterior", "reconstruct", "decode") if real else ("posterior",)
        )

    def joint_energy(self, v: Tensor, h: Tensor) -> Tensor:
        energies: Tensor = self.network(v, h)
        return energies

    def energy(self, v: Tensor) -> Tensor:
        generator = torch.Generator(v.device).manual_seed(0)
        self._refuse_bits()
        noise = self.encoder.noise(ENERGY_SAMPLES, generator, v)[:, None]

        def energies(rows: Tensor, h: Tensor) -> Tensor:
            return energies_of(self.network, rows)(h.transpose(0, 1)).mT

        def bound(rows: Tensor) -> Tensor:
            return free_energy_bound(energies, self.encoder, rows, noise, weighted=True)

        return chunked(bound, v, _ROWS)

    def sample(self, n: int, generator: torch.Generator | None, chains: Chains) -> Tensor:
        chains.refuse()
        like = next(chain(self.network.parameters(), self.encoder.parameters()))
        latent = like.new_empty(n, self._refuse_bits())
        return self.langevin.visibles(
            self.joint_energy, latent, self.visibles, generator, given=False
        )

    def posterior(self, v: Tensor) -> Distribution:
        return chunked_distribution(self.encoder.distribution, v)

    def decode(self, h: Tensor) -> Tensor:
        """Draws given latents, the same in every call."""
        self._refuse_bits()
        generator = torch.Generator(h.device).manual_seed(0)
        return self.langevin.visibles(self.joint_energy, h, self.visibles, generator, given=True)

    def reconstruct(self, v: Tensor) -> Tensor:
        """Draws given the mean of q(h|v), the same in every call."""
        self._refuse_bits()
        generator = torch.Generator(v.device).manual_seed(0)
        mean = chunked(self.encoder.mean, v, _ROWS)
        alike = replace(self.visibles, shape=tuple(v.shape[1:]))
        return self.langevin.visibles(self.joint_energy, mean, alike, generator, given=True)

    def _refuse_bits(self) -> int:
        """Dimension of the latent, which is a vector of real numbers.

        Raises:
            NotImplementedError: if it is not.
        """
        if self.encoder.latent_dim is None:
            raise NotImplementedError(
                "this needs a free energy and Gibbs sampling, or real latents with a "
                f"`GaussianPosterior`, but `{type(self.network).__name__}` is no Boltzmann machine of "
                "`bilevel.methods.models`; use `joint_energy(v, h)` and `posterior(v)`"
            )
        return self.encoder.latent_dim

    def probe(self, v: Tensor) -> Self:
        draws = probed_draws(self.encoder, v)
        check_pairs(self.joint_energy(draws.visible, draws.latent), draws.log_prob)
        return self

    def rewritings(self) -> None:
        return None


def with_posterior(
    energy: nn.Module, posterior: VariationalPosterior | None, langevin: AnnealedLangevin
) -> MachineModel | Coupled:
    """The model of an energy and a posterior of its latents.

    Args:
        energy: a machine, or any module (v, h) -> (n,).
        posterior: q(h|v); of a machine `BernoulliPosterior.for_model` by default.
        langevin: how an energy that is no machine is sampled.

    Raises:
        ValueError: if there is no posterior, for an energy that is no machine.
    """
    machine = as_machine(energy)
    if machine is not None:
        encoder = BernoulliPosterior.for_model(machine) if posterior is None else posterior
        return MachineModel.of(machine, encoder)
    if posterior is None:
        raise ValueError(
            f"there is no default posterior for a `{type(energy).__name__}`; give one, such as "
            "`GaussianPosterior(network, latent_dim)`"
        )
    return Coupled(
        Visibles(),
        network=energy,
        encoder=posterior,
        langevin=langevin,
        latent_dim=posterior.latent_dim,
    )

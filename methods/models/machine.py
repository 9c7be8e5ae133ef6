"""`MachineModel`: a Boltzmann machine, whose energies are exact and whose samples are Gibbs chains'."""

from dataclasses import dataclass, field
from typing import Self, final

import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Distribution, Independent

from bilevel.devices import global_generators
from bilevel.methods.likelihood.ais import exact_samples
from bilevel.methods.machines import MAX_UNITS, BoltzmannMachine, as_machine
from bilevel.methods.machines.base import check_dim
from bilevel.methods.machines.chance import coin_flips
from bilevel.methods.models.chunks import chunked
from bilevel.methods.models.model import Chains, LatentModel, all_known, check_pairs, probed_draws
from bilevel.methods.networks.units import Change
from bilevel.methods.variational import VariationalJoint, VariationalPosterior
from bilevel.refusals import one_of

SWEEPS = 1000
"""Block Gibbs sweeps before a sample is taken."""

EXACT_UNITS = 12
"""Units of a first hidden layer of which `sample` enumerates all states."""


@final
@dataclass(frozen=True, kw_only=True, repr=False)
class MachineModel(LatentModel):
    """A Boltzmann machine.

    `energy` is the exact free energy; `posterior` is exact with one hidden layer, a mean field with two.
    """

    machine: BoltzmannMachine = field()

    @classmethod
    def of(
        cls,
        machine: BoltzmannMachine,
        encoder: VariationalPosterior | None = None,
        sampler: VariationalJoint | None = None,
    ) -> Self:
        """The model of a machine.

        Args:
            machine: the machine.
            encoder: the variational posterior that trains it.
            sampler: a variational joint, which draws the samples where no chains are asked for.
        """
        dim = sum(machine.latent_dims)
        return cls(
            machine.visibles, machine=machine, encoder=encoder, sampler=sampler, latent_dim=dim
        )

    @property
    def network(self) -> BoltzmannMachine:
        """The energy, a module (v, h) -> (n,)."""
        return self.machine

    def joint_energy(self, v: Tensor, h: Tensor) -> Tensor:
        energies: Tensor = self.machine(v, h)
        return energies

    def free_energy(self, v: Tensor) -> Tensor:
        """F(v), exact and differentiable, shape (n,)."""
        return self.machine.free_energy(v)

    def energy(self, v: Tensor) -> Tensor:
        return chunked(self.machine.free_energy, v)

    def sample(self, n: int, generator: torch.Generator | None, chains: Chains) -> Tensor:
        if self.sampler is not None and chains.start is None and chains.sweeps is None:
            return self.sampler.sample(n, generator)
        if generator is None:
            generator = global_generators(self.machine.visible_bias.device)[-1]
        start, sweeps = self._start(chains), chains.sweeps
        if isinstance(start, str) and start == "exact":
            if sweeps is not None:
                raise ValueError(
                    "`sweeps` are for chains, and start='exact' draws without; leave one out"
                )
            first = exact_samples(self.machine, n, generator)
            return self.machine.gibbs(first, generator)[0]
        steps = SWEEPS if sweeps is None else check_dim("sweeps", sweeps)
        first = self._first(start, n, generator, chains)
        return self.machine.gibbs(first, generator, steps)[0]

    def _start(self, chains: Chains) -> Tensor | str:
        start = chains.start
        if start is None:
            few = self.machine.latent_dims[0] <= EXACT_UNITS and chains.sweeps is None
            return "exact" if few else "coins" if chains.persistent is None else "chains"
        if isinstance(start, str):
            one_of("start", start, ("exact", "chains", "coins"))
        return start

    def _first(
        self, start: Tensor | str, n: int, generator: torch.Generator, chains: Chains
    ) -> Tensor:
        """N first hidden layers for chains to begin at."""
        if isinstance(start, str) and start == "coins":
            return self.machine.initial(n, generator)
        if isinstance(start, str):
            persistent = chains.persistent
            if persistent is None:
                raise ValueError(
                    f"this `{chains.learner}` has no chains of its own; train a "
                    "`ContrastiveDivergence(..., persistent=True)`, or give visibles as `start`"
                )
            return persistent[torch.arange(n, device=persistent.device) % len(persistent)]
        visibles = start[torch.arange(n, device=start.device) % len(start)]
        if self.machine.visible_range is not None:
            visibles = coin_flips(visibles, generator)  # of greys; bits stay what they are
        return self.machine.first_layer(visibles, generator)

    def posterior(self, v: Tensor) -> Distribution:
        if len(self.machine.latent_dims) == 1:
            logits = chunked(self.machine.posterior_logits, v)
            return Independent(Bernoulli(logits=logits), 1)
        return Independent(Bernoulli(probs=chunked(self.machine.mean_field, v)), 1)

    def decode(self, h: Tensor) -> Tensor:
        return chunked(self.machine.visible_mean, h)

    def reconstruct(self, v: Tensor) -> Tensor:
        return self.decode(self.posterior(v).mean)

    def probe(self, v: Tensor) -> Self:
        self.machine(v, v.new_zeros(len(v), sum(self.machine.latent_dims)))
        if self.encoder is not None:
            draws = probed_draws(self.encoder, v)
            check_pairs(self.machine(draws.visible, draws.latent), draws.log_prob)
        return self

    def rewritings(self) -> list[Change] | None:
        beside = [part.rewriting() for part in (self.encoder, self.sampler) if part is not None]
        return all_known([self.machine.rewriting(), *beside])


def require_machine(
    model: nn.Module, learner: str, without_free_energy: str | None = None
) -> BoltzmannMachine:
    """The Boltzmann machine that a learner was given.

    Args:
        model: what it was given.
        learner: its name.
        without_free_energy: what to use instead where the free energy does not enumerate, of a learner
            that needs it.

    Raises:
        TypeError: if `model` is no machine.
        ValueError: if the learner needs a free energy that cannot be enumerated.
    """
    machine = as_machine(model)
    if machine is None:
        raise TypeError(
            f"`{learner}` trains a Boltzmann machine (`RBM`, `GaussianRBM`, `DBM`, `GaussianDBM`), got "
            f"`{type(model).__name__}`; for energies of your own there are `ScoreMatching` (v -> (n,)), "
            "and `GeneralBiDVL`, `BiSM` and `VaGES` ((v, h) -> (n,))"
        )
    first, deep = machine.latent_dims[0], len(machine.latent_dims) > 1
    if without_free_energy is not None and deep and first > MAX_UNITS:
        raise ValueError(
            f"`{learner}` needs the free energy, and that of this `{type(machine).__name__}` is a sum "
            f"over the {first} units of its first hidden layer, at most {MAX_UNITS} can be enumerated; "
            f"use {without_free_energy}"
        )
    return machine

"""`LatentModel`: what a trained energy-based latent-variable model can do, whatever trained it."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, NamedTuple, Self, TypeAlias, final

import torch
from torch import Tensor
from torch.distributions import Distribution

from bilevel.methods.data.visibles import Visibles
from bilevel.methods.machines import BoltzmannMachine
from bilevel.methods.models.langevin import AnnealedLangevin
from bilevel.methods.networks.units import Change
from bilevel.methods.variational import Draws, VariationalJoint, VariationalPosterior

Start: TypeAlias = Tensor | Literal["exact", "chains", "coins", "noise", "model"]


@final
class Chains(NamedTuple):
    """What was asked of the Gibbs chains of a machine.

    Attributes:
        start: where they begin: visibles, "exact", "chains" or "coins"; `None` for the default. Those
            of another sampler may begin at "noise", or at draws of the "model", too.
        sweeps: block Gibbs sweeps from there; `None` for the default.
        persistent: first hidden layers where training left its own chains, if it had any.
        learner: who trained it, for refusals.
    """

    start: Start | None = None
    sweeps: int | None = None
    persistent: Tensor | None = None
    learner: str = "learner"

    def refuse(self) -> None:
        """Refuse them where a model is sampled otherwise.

        Raises:
            ValueError: if anything was asked.
        """
        for name, value in (("start", self.start), ("sweeps", self.sweeps)):
            if value is not None:
                raise ValueError(
                    f"`{name}` is for the Gibbs chains of a Boltzmann machine, and this model is "
                    "sampled otherwise; leave it out, or give a `sampler` such as `Langevin(...)`, "
                    "which starts anywhere"
                )


@dataclass(frozen=True, repr=False)
class LatentModel(ABC):
    """A frozen record that points at the modules of a learner, whose levels own them.

    Visibles come checked, on the modules' device, in evaluation mode and without gradients; only
    `joint_energy` is differentiable. What a model cannot do it refuses with `NotImplementedError`.

    Attributes:
        visibles: what visibles it takes.
        machine: the Boltzmann machine, if its energy is one.
        encoder: the variational posterior q(h|v), if it has one.
        sampler: the variational joint q(v, h), if it has one.
        latent_dim: dimension of the latent, if it is known.
        langevin: how it is sampled, if that takes Langevin dynamics.
        draws_by_chains: whether every sample is the end of a Markov chain that takes long.
    """

    visibles: Visibles
    machine: BoltzmannMachine | None = field(default=None, kw_only=True)
    encoder: VariationalPosterior | None = field(default=None, kw_only=True)
    sampler: VariationalJoint | None = field(default=None, kw_only=True)
    latent_dim: int | None = field(default=None, kw_only=True)
    langevin: AnnealedLangevin | None = field(default=None, kw_only=True)
    draws_by_chains: ClassVar[bool] = False

    def __repr__(self) -> str:
        return f"{type(self).__name__} that can {', '.join(self.abilities())}"

    def abilities(self) -> tuple[str, ...]:
        """What it does not refuse, of what a learner offers."""
        return ("energy", "sample", "posterior", "reconstruct", "decode")

    @abstractmethod
    def joint_energy(self, v: Tensor, h: Tensor) -> Tensor:
        """E(v, h), differentiable, shape (n,)."""

    @abstractmethod
    def energy(self, v: Tensor) -> Tensor:
        """The free energy of visibles up to a constant, or the bound on it, shape (n,).

        Each row's depends on that row alone, and is the same in every call.
        """

    @abstractmethod
    def sample(self, n: int, generator: torch.Generator | None, chains: Chains) -> Tensor:
        """N visibles of the model."""

    @abstractmethod
    def posterior(self, v: Tensor) -> Distribution:
        """The posterior over the latent, the model's own or a variational one."""

    @abstractmethod
    def decode(self, h: Tensor) -> Tensor:
        """Visibles of given latents, shape (n, latent_dim)."""

    @abstractmethod
    def reconstruct(self, v: Tensor) -> Tensor:
        """Visibles from the posterior mean of visibles, same shape."""

    @abstractmethod
    def probe(self, v: Tensor) -> Self:
        """Run a few visibles through all modules.

        Returns:
            The record, with the dimension of the latent if it was not known.

        Raises:
            ValueError: if shapes do not fit, naming the module.
        """

    @abstractmethod
    def rewritings(self) -> list[Change] | None:
        """How the parts next to the visibles are rewritten in other units; `None` if one is unknown."""

    @final
    def taking(self, **changes: Any) -> Self:
        """The record with other visibles: see `Visibles`."""
        return replace(self, visibles=replace(self.visibles, **changes))

    @final
    def seen(self, v: Tensor) -> Self:
        """The record with the shape of visibles that it was shown, if it knew none."""
        known = self.visibles.shape is not None or self.visibles.table is not None
        return self if known else self.taking(shape=tuple(v.shape[1:]))

    @final
    @property
    def dim(self) -> int | None:
        """Dimension of the latent: as it was given, of the machine or of the posterior; if known."""
        if self.latent_dim is None and self.machine is not None:
            return sum(self.machine.latent_dims)
        if self.latent_dim is None and self.encoder is not None:
            return self.encoder.latent_dim
        return self.latent_dim

    @final
    def known_dim(self) -> int:
        """Dimension of the latent.

        Raises:
            ValueError: if it was not given and no data have been seen yet.
        """
        if (dim := self.dim) is None:
            raise ValueError(
                "the dimension of the latent is not known before the model has seen data; give "
                "`latent_dim` to the constructor"
            )
        return dim

    @final
    def known_machine(self, learner: Any) -> BoltzmannMachine:
        """The Boltzmann machine.

        Args:
            learner: whose upper level names the energy in the refusal.

        Raises:
            NotImplementedError: if the energy is no machine.
        """
        if self.machine is None:
            energy = type(next(learner.upper.children())).__name__
            raise NotImplementedError(
                f"`{energy}` is no Boltzmann machine of `bilevel.methods.models`; use "
                "`joint_energy(v, h)` and `posterior(v)`"
            )
        return self.machine

    @final
    def known_encoder(self, learner: str) -> VariationalPosterior:
        """The variational posterior.

        Args:
            learner: what to call the learner in the refusal.

        Raises:
            NotImplementedError: if there is none.
        """
        if self.encoder is None:
            raise NotImplementedError(
                f"`{learner}` has no variational posterior; `AdvIL`, `GeneralBiDVL`, `BiSM`, `VaGES` do"
            )
        return self.encoder


def attempt(name: str, module: Callable[[Tensor], Any], v: Tensor) -> Any:
    """`module(v)`, whose failure is the caller's mistake.

    Raises:
        ValueError: naming the module and the shape it could not take.
    """
    try:
        return module(v)
    except (RuntimeError, ValueError) as error:
        shape = tuple(v.shape)
        raise ValueError(f"the {name} cannot take a tensor of shape {shape}: {error}") from None


def probed_draws(encoder: VariationalPosterior, v: Tensor) -> Draws:
    """Draws of a posterior at visibles.

    Raises:
        ValueError: if it cannot take them.
    """
    noise = encoder.noise(len(v), torch.Generator(v.device).manual_seed(0), v)
    draws: Draws = attempt("posterior", lambda rows: encoder.draws(rows, noise), v)
    return draws


def check_pairs(energies: Tensor, log_prob: Tensor) -> None:
    """Refuse an energy that does not give one number for each pair (v, h).

    Args:
        energies: what it gave.
        log_prob: of the latents of these pairs, shape (n,).

    Raises:
        ValueError: with both shapes.
    """
    if energies.shape != log_prob.shape:
        raise ValueError(
            f"the energy must give one number per pair, shape (n,); got {tuple(energies.shape)} "
            f"for {len(log_prob)} pairs"
        )


def all_known(parts: list[Change | None]) -> list[Change] | None:
    """The changes, if all of them are known."""
    known = [part for part in parts if part is not None]
    return known if len(known) == len(parts) else None

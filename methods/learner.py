"""`ModelLearner`: what every method that trains a Boltzmann machine has in common."""

from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Distribution, Independent

from bilevel.methods.eblvm import EBLVM, chunked
from bilevel.methods.models import MAX_UNITS, LatentVariableModel, from_recipe
from bilevel.methods.variational import VariationalPosterior
from bilevel.problem import Loss

SWEEPS = 1000


class ModelLearner(EBLVM):
    """A method that trains a Boltzmann machine, which is its upper level.

    Methods with a variational posterior keep it as `self.lower["posterior"]`.
    """

    training_defaults: ClassVar[dict[str, Any]] = {
        "upper_lr": 1e-3,
        "lower_lr": 1e-3,
        "betas": (0.9, 0.95),
        "lower_weight_decay": 0.0,
        "decay": 1.0,
        "order": "lower_first",
    }

    def hold(
        self,
        model: LatentVariableModel,
        lower: dict[str, nn.Module] | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        """Take the machine as the upper level and the named modules as the lower one.

        Args:
            model: the machine.
            lower: modules of the lower level; none for a method with a single level.
            options: the constructor's other arguments as plain values, so that `load` can call it;
                `None` if it was given modules of the caller's own.

        Raises:
            TypeError: if `model` is no machine.
        """
        check_machine(model, type(self).__name__)
        self.upper = nn.ModuleDict({"model": model})
        self.lower = nn.ModuleDict(lower or {})
        self.visible_shape = (model.visible_dim,)
        self.visible_range = model.visible_range
        self.binary = model.binary
        self.recipe = None if options is None else {"model": model.recipe, **options}

    @property
    def model(self) -> LatentVariableModel:
        """The Boltzmann machine.

        Raises:
            NotImplementedError: if the energy is another module.
        """
        if not self._is_machine:
            raise self._no_machine()
        return cast(LatentVariableModel, self._network)

    @property
    def _network(self) -> nn.Module:
        return cast(nn.Module, self.upper._modules["model"])

    @property
    def _is_machine(self) -> bool:
        return isinstance(self._network, LatentVariableModel)

    def _no_machine(self) -> NotImplementedError:
        """What to raise where a machine is needed; a method that takes other modules says more."""
        return NotImplementedError(f"`{type(self._network).__name__}` is no Boltzmann machine")

    @property
    def encoder(self) -> VariationalPosterior:
        """The variational posterior.

        Raises:
            NotImplementedError: if the method has none.
        """
        if "posterior" not in self.lower._modules:
            raise NotImplementedError(
                f"`{type(self).__name__}` has no variational posterior; `AdvIL`, `GeneralBiDVL`, "
                "`BiSM` and `VaGES` learn one"
            )
        return cast(VariationalPosterior, self.lower._modules["posterior"])

    # ------------------------------------------------------------------ the learning problem

    def lower_loss(self, batch: Any) -> Loss:
        """The loss of the lower level; a method with a single level has none."""
        raise NotImplementedError(f"`{type(self).__name__}` has a single level")

    # ------------------------------------------------------------------ the trained model

    def energy(self, v: Tensor) -> Tensor:
        """The free energy of the machine, exact.

        Raises:
            ValueError: if it would take too many terms.
        """
        with self.evaluating():
            return chunked(self.model.free_energy, self.check(v))

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """N visibles after `SWEEPS` block Gibbs sweeps from random latents."""
        generator = generator if generator is not None else _default_generator(self.device)
        with self.evaluating():
            first = self.model.initial(n, generator)
            return self.model.gibbs(first, generator, steps=SWEEPS)[0]

    def posterior(self, v: Tensor) -> Distribution:
        """The posterior p(h|v): exact with one hidden layer, its mean field with two."""
        with self.evaluating():
            if len(self.model.latent_dims) == 1:
                logits = chunked(self.model.posterior_logits, self.check(v))
                return Independent(Bernoulli(logits=logits), 1)
            return Independent(Bernoulli(probs=chunked(self.model.mean_field, self.check(v))), 1)

    def reconstruct(self, v: Tensor) -> Tensor:
        """The visibles' mean given the posterior mean of the latents."""
        mean = self.posterior(v).mean
        with self.evaluating():
            return chunked(self.model.visible_mean, mean)

    def probe(self, v: Tensor) -> None:
        h = v.new_zeros(len(v), sum(self.model.latent_dims))
        with self.evaluating():
            self.model(v, h)

    # ------------------------------------------------------------------ saving

    @classmethod
    def from_recipe(cls, recipe: dict[str, Any]) -> Self:
        if "shape" in recipe:  # networks that `for_images` made
            make = cast(Any, cls).for_images
            return cast(Self, make(**{**recipe, "shape": tuple(recipe["shape"])}))
        options = {name: value for name, value in recipe.items() if name != "model"}
        return cls(from_recipe(recipe["model"]), **options)


def check_machine(model: nn.Module, learner: str, without_free_energy: str | None = None) -> None:
    """Refuse what a learner of Boltzmann machines cannot train.

    Args:
        model: what it was given.
        learner: its name.
        without_free_energy: what to use instead where the free energy does not enumerate, of a learner
            that needs it.

    Raises:
        TypeError: if `model` is no machine.
        ValueError: if the learner needs a free energy that cannot be enumerated.
    """
    if not isinstance(model, LatentVariableModel):
        raise TypeError(
            f"`{learner}` trains a Boltzmann machine (`RBM`, `GaussianRBM`, `DBM`, `GaussianDBM`), got "
            f"`{type(model).__name__}`; for energies of your own there are `GeneralBiDVL`, `BiSM` and "
            "`VaGES`"
        )
    first, deep = model.latent_dims[0], len(model.latent_dims) > 1
    if without_free_energy is not None and deep and first > MAX_UNITS:
        raise ValueError(
            f"`{learner}` needs the free energy, and that of this `{type(model).__name__}` is a sum "
            f"over the {first} units of its first hidden layer, at most {MAX_UNITS} can be enumerated; "
            f"use {without_free_energy}"
        )


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


def _default_generator(device: torch.device) -> torch.Generator:
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index or 0]
    return torch.default_generator

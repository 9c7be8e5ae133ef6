"""`ModelLearner`: what every method that trains a Boltzmann machine has in common."""

from typing import Any, ClassVar, Literal, Self, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Distribution, Independent

from bilevel.methods.eblvm import EBLVM, chunked
from bilevel.methods.likelihood.ais import exact_samples
from bilevel.methods.machines import MAX_UNITS, LatentVariableModel, from_recipe
from bilevel.methods.machines.base import check_dim, coin_flips
from bilevel.methods.variational import VariationalPosterior
from bilevel.problem import Loss
from bilevel.refusals import one_of

SWEEPS = 1000
"""Block Gibbs sweeps before a sample is taken."""

EXACT_UNITS = 12
"""Units of a first hidden layer of which `sample` enumerates all states."""

Start: TypeAlias = Tensor | Literal["exact", "chains", "coins"]


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

    def sample(
        self,
        n: int,
        generator: torch.Generator | None = None,
        *,
        start: Start | None = None,
        sweeps: int | None = None,
    ) -> Tensor:
        """N visibles of the machine: exact draws where they cost little, else ends of Gibbs chains.

        A chain forgets where it began only as fast as the machine mixes. From coins it may stay for long
        where no data are (blank digits); from data, or where training left its chains, it does not, but
        may miss modes as far from there.

        Args:
            n: how many.
            generator: on the model's device; torch's own by default.
            start: where the chains begin: visibles, whose rows are taken in turn; "chains", where the
                persistent ones of the learner are, which stay there; "coins", hidden layers of fair
                coins; or "exact" for independent draws without chains, for which the first hidden
                layer is enumerated. By default "exact" up to `EXACT_UNITS` units, else "chains" if the
                learner has any, else "coins".
            sweeps: block Gibbs sweeps from there, `SWEEPS` by default; none for "exact".

        Raises:
            TypeError: if a number is not an integer.
            ValueError: if one is not positive, for visibles the machine does not take, an unknown
                start or one that is not there.
        """
        check_dim("n", n)
        generator = generator if generator is not None else _default_generator(self.device)
        if start is None:
            few = self.model.latent_dims[0] <= EXACT_UNITS and sweeps is None
            start = "exact" if few else "coins" if self._chains is None else "chains"
        if isinstance(start, str):
            one_of("start", start, ("exact", "chains", "coins"))
        if isinstance(start, str) and start == "exact":
            if sweeps is not None:
                raise ValueError(
                    "`sweeps` are for chains, and start='exact' draws without; leave one out"
                )
            with self.evaluating():
                first = exact_samples(self.model, n, generator)
                return self.model.gibbs(first, generator)[0]
        steps = SWEEPS if sweeps is None else check_dim("sweeps", sweeps)
        with self.evaluating():
            return self.model.gibbs(self._first(start, n, generator), generator, steps)[0]

    @property
    def _chains(self) -> Tensor | None:
        """The first hidden layers of persistent chains, if the learner has any that moved."""
        chains = self._buffers.get("chains")
        return None if chains is None or len(chains) == 0 else chains

    def _first(self, start: Start, n: int, generator: torch.Generator) -> Tensor:
        """N first hidden layers for chains to begin at."""
        if isinstance(start, str) and start == "coins":
            return self.model.initial(n, generator)
        if isinstance(start, str):
            if self._chains is None:
                raise ValueError(
                    f"this `{type(self).__name__}` has no chains of its own; train a "
                    "`ContrastiveDivergence(..., persistent=True)`, or give visibles as `start`"
                )
            rows = torch.arange(n, device=self._chains.device) % len(self._chains)
            return self._chains[rows]
        visibles = self.check(start)
        rows = torch.arange(n, device=visibles.device) % len(visibles)
        visibles = visibles[rows]
        if self.model.visible_range is not None:
            visibles = coin_flips(visibles, generator)  # of greys; bits stay what they are
        return self.model.first_layer(visibles, generator)

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


def refuse_chains(start: Start | None, sweeps: int | None) -> None:
    """Refuse arguments of Gibbs chains where the model is sampled otherwise.

    Raises:
        ValueError: if there are any.
    """
    for name, value in (("start", start), ("sweeps", sweeps)):
        if value is not None:
            raise ValueError(
                f"`{name}` is for the Gibbs chains of a Boltzmann machine, and this model is sampled "
                "otherwise; leave it out"
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

"""`EBLVM`: what every energy-based latent-variable model can do, whatever trains it."""

import os
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Self, final

import torch
from torch import Tensor
from torch.distributions import Distribution

from bilevel import Alternating, Problem, Solver, Step
from bilevel.arguments import explained_methods
from bilevel.loggers.base import Logger
from bilevel.methods.data.visibles import latents, paired
from bilevel.methods.machines import BoltzmannMachine
from bilevel.methods.models.evaluating import Statistics, evaluating
from bilevel.methods.models.gradients import EnergyFunction, attached, score_of
from bilevel.methods.models.model import Chains, LatentModel, Start
from bilevel.methods.models.sampling import samples_of
from bilevel.methods.models.saying import lines_of
from bilevel.methods.networks.units import Change
from bilevel.methods.samplers import Sampler
from bilevel.methods.training.fit import Augment, Evaluate, History, feeding, fit
from bilevel.methods.training.optimizers import adam, trainable
from bilevel.methods.training.preconditions import functions_of, settled
from bilevel.methods.training.progress import Wish, showing
from bilevel.methods.training.run import Destination
from bilevel.methods.training.saved import built, loaded, write_model
from bilevel.methods.training.settings import Training
from bilevel.methods.training.standardising import Units, in_units_of_data
from bilevel.methods.variational import VariationalPosterior
from bilevel.optimizers import Optimizers
from bilevel.problem import Loss
from bilevel.refusals import flag


@explained_methods("fit", "sample", "joint_energy", "energy", "reconstruct", "save", "load")
class EBLVM(Problem):
    """An energy-based latent-variable model and the bilevel learning problem that trains it.

    A method writes its constructor, which sets `upper`, `lower` and `latent_model`, then `draw` and the
    two losses; a method with a single level has no lower loss. `latent_model`, a record that points at
    the modules of the levels, answers for the trained model. Visibles are checked, and gradients and
    dropout switched off, here, once for all methods.

    Attributes:
        latent_model: what the trained model can do.
        training_defaults: fields of `Training` whose usual values are the method's own.
        recipe: arguments of the constructor that built the networks; `None` for a model made of the
            caller's own modules, which `load` then needs again.
        statistics: batch-norm statistics at evaluation: "running" averages (each output depends on
            its own input only), or those of the "batch" at hand, as the BiDVL paper evaluates.
        units: those of the rows while it is trained with `standardise`; otherwise `None`.
        standardised: whether it was, so that its parameters are those of the data's units.
    """

    training_defaults: ClassVar[dict[str, Any]] = {}
    latent_model: LatentModel

    def __init__(self) -> None:
        super().__init__()
        self.recipe: dict[str, Any] | None = None
        self.statistics: Statistics = "running"
        self.units: Units | None = None
        self.standardised = False

    def lower_loss(self, batch: Any) -> Loss:
        """The lower loss; a method with a single level has none and refuses."""
        raise NotImplementedError(f"`{type(self).__name__}` has a single level")

    def optimizers(self, training: Training) -> tuple[Optimizers, Optimizers]:
        """The usual upper and lower optimizer: fused Adam with each level's rate and decay."""
        decays = training.upper_weight_decay, training.lower_weight_decay
        upper = adam(trainable(self.upper), training, training.upper_lr, decays[0])
        variables = trainable(self.lower)
        return upper, adam(variables, training, training.lower_lr, decays[1]) if variables else []

    def default_solver(self) -> Solver:
        """The solver `fit` takes where none is given: `Alternating()` for most methods."""
        return Alternating()

    def rewritings(self) -> list[Change] | None:
        """How the parts next to the visibles are rewritten in other units; `None` if one is unknown."""
        return self.latent_model.rewritings()

    @final
    def extra_repr(self) -> str:
        return lines_of(vars(self).get("latent_model"), vars(self) | (self.recipe or {}))

    @final
    def fit(
        self,
        data: Any,
        *,
        solver: Solver | None = None,
        callbacks: Iterable[Callable[[Step], object]] = (),
        run: str | os.PathLike[str] | None = None,
        resume: bool = False,
        overwrite: bool = False,
        optimizers: tuple[Optimizers, Optimizers] | None = None,
        notes: dict[str, Any] | None = None,
        evaluate: Evaluate | None = None,
        progress: Wish = "auto",
        loggers: Iterable[Logger] = (),
        augment: Augment | None = None,
        **settings: Any,
    ) -> History:
        """Train the model in place; with `ema` it has the averaged weights at the end.

        Args:
            data: what `check` takes, `Images`, a `Table`, a data set, a loader, an iterable of batches.
            solver: how the hypergradient is computed; `default_solver()` if not given.
            callbacks: called with every `Step`; one that returns `True` ends the training.
            run: folder to write config, metrics and checkpoints to; nothing is written without.
            resume: continue the run in that folder from its newest checkpoint, to the bit; only its end
                (`num_steps`, the steps in total, `max_seconds`) and what it records may be changed.
            overwrite: replace the run in that folder.
            optimizers: the upper and lower optimizer(s), if not the method's own.
            notes: plain values to keep in `config.json`, such as where the data came from.
            evaluate: called every `evaluate_every` steps with a copy of the model; returns numbers by
                name. The best copy is kept in `run/best`, by the number that the setting `best` names.
            progress: "auto" shows a bar on a terminal and in a notebook, `True` also prints lines
                elsewhere, `False` shows nothing.
            loggers: told all numbers and some pictures, such as `bilevel.loggers.TensorBoard(folder)`.
            augment: makes of each batch another of its shape, `(visibles, generator) -> visibles`.
            **settings: any field of `Training`, such as `num_steps`, `batch_size`, `seed`.

        Returns:
            One record per `log_every` steps, and the solver that was used.

        Raises:
            ValueError: for bad data or settings, before the first step.
            FileExistsError: if `run` already holds a run.
            CheckpointError: if a run is resumed with other settings, or data cannot be read again.
            DivergenceError: if a loss becomes NaN or infinite; the last good checkpoint is kept.
        """
        destination = Destination(run, resume, overwrite, notes)
        training = settled(
            settings,
            self.training_defaults,
            destination,
            levels=2 if self.variables("lower") else 1,
            evaluated=evaluate is not None,
            own_optimizers=optimizers is not None,
        )
        with (
            showing(progress, training, destination.taken) as bars,
            feeding(self, data, training, destination, augment, "batch_size" in settings) as feed,
        ):
            return fit(
                self,
                feed,
                destination=destination,
                solver=solver,
                optimizers=optimizers,
                callbacks=[*bars, *functions_of(callbacks)],
                evaluate=evaluate,
                loggers=loggers,
            )

    @final
    def probe(self, v: Tensor) -> None:
        """Run a few visibles through all networks, and take on their shape if none was set.

        Raises:
            ValueError: if shapes do not fit, naming the network.
        """
        with self.evaluating("running"):
            self.latent_model = self.latent_model.probe(v).seen(v)

    @final
    def in_data_units(self) -> None:
        """Rewrite a model that is being trained on standardised rows as one of the rows as they came."""
        if self.units is not None:
            self.units.leave(self)
            self.units, self.standardised = None, True

    @final
    def energy(self, v: Any, *, grad: bool = False) -> Tensor:
        """Free energy of visibles up to a constant, or the bound on it, shape (n,); low where mass is.

        Each row's depends on that row alone: batch norm always uses running statistics here. With `grad`
        it is differentiable in v, if that is a tensor, and in the parameters.
        """
        rows = self.check(v)
        if flag("grad", grad):
            return self.energy_function.forward(attached(v, rows))
        with self.evaluating("running"):
            return self.latent_model.energy(rows)

    @final
    @property
    def energy_function(self) -> EnergyFunction:
        """`energy` as a module v -> (n,), differentiable and unchecked: for samplers, of any library."""
        return EnergyFunction(self)

    @final
    def score(self, v: Any) -> Tensor:
        """The score of real visibles: minus the gradient of `energy` in them, as a constant, shape of v.

        Raises:
            NotImplementedError: if visibles are no real numbers.
        """
        return score_of(self, self.check(v))

    @final
    def sample(
        self,
        n: int,
        generator: torch.Generator | None = None,
        *,
        start: Start | None = None,
        sweeps: int | None = None,
        sampler: Sampler | None = None,
    ) -> Tensor:
        """Draw n visibles from the model.

        A Boltzmann machine gives exact draws where they cost little, else ends of Gibbs chains, which
        forget where they began only as fast as the machine mixes; one with a sampler beside it (`AdvIL`)
        the sampler's draws, unless `start` or `sweeps` are given.

        Args:
            n: how many.
            generator: on the model's device; torch's own by default.
            start: where Gibbs chains begin: visibles, whose rows are taken in turn; "chains", where the
                learner's persistent ones are; "coins", hidden layers of fair coins; or "exact" for
                independent draws, for which the first hidden layer is enumerated. By default "exact" up
                to 12 units, else "chains" if there are any, else "coins".
            sweeps: block Gibbs sweeps from there, 1,000 by default; none for "exact".
            sampler: `Langevin(...)` or `HamiltonianMonteCarlo(...)` on `energy`, for real visibles. Then
                `start` may be visibles, "noise", or "model" for the model's own draws, the default
                where these take no Langevin dynamics.

        Raises:
            TypeError: if a number is not an integer.
            ValueError: if one is not positive, for visibles the machine does not take, an unknown
                start or one that is not there, or for chains where the model is sampled otherwise.
            NotImplementedError: if the model cannot be sampled, or not by that sampler.
            FloatingPointError: if chains of a sampler left all bounds.
        """
        begin = start if start is None or isinstance(start, str) else self.check(start)
        chains = Chains(begin, sweeps, self._buffers.get("chains"), type(self).__name__)
        return samples_of(self, n, generator, chains, sampler)

    @final
    def posterior(self, v: Any) -> Distribution:
        """The posterior over the latent: the model's own where it is known, else the variational one."""
        v = self.check(v)
        with self.evaluating():
            return self.latent_model.posterior(v)

    @final
    def reconstruct(self, v: Any) -> Tensor:
        """Visibles from the posterior mean of visibles, same shape.

        Raises:
            NotImplementedError: if the model gives no visibles for latents.
        """
        v = self.check(v)
        with self.evaluating():
            return self.latent_model.reconstruct(v)

    @final
    def decode(self, h: Any) -> Tensor:
        """Visibles of given latents, shape (n, latent_dim).

        Raises:
            ValueError: if they have the wrong width, or are not finite.
            NotImplementedError: if the model gives no visibles for latents.
        """
        h = latents(h, self.latent_dim, next(self.parameters()))
        with self.evaluating():
            return self.latent_model.decode(h)

    @final
    def joint_energy(self, v: Tensor, h: Tensor) -> Tensor:
        """E(v, h), differentiable, shape (n,).

        Raises:
            NotImplementedError: if the model has no latent.
        """
        return self.latent_model.joint_energy(*paired(v, h))

    @final
    @property
    def model(self) -> BoltzmannMachine:
        """The Boltzmann machine.

        Raises:
            NotImplementedError: if the energy is no machine.
        """
        return self.latent_model.known_machine(self)

    @final
    @property
    def latent_dim(self) -> int:
        """Dimension of the latent.

        Raises:
            ValueError: if it was not given and no data have been seen yet.
        """
        return self.latent_model.known_dim()

    @final
    @property
    def encoder(self) -> VariationalPosterior:
        """The variational posterior.

        Raises:
            NotImplementedError: if the method has none.
        """
        return self.latent_model.known_encoder(type(self).__name__)

    @property
    def visible_shape(self) -> tuple[int, ...] | None:
        """Shape of one visible, `None` if any will do: may be set, otherwise that of the first data."""
        return self.latent_model.visibles.shape

    @visible_shape.setter
    def visible_shape(self, shape: tuple[int, ...] | None) -> None:
        self.latent_model = self.latent_model.taking(shape=shape)

    @property
    def visible_range(self) -> tuple[float, float] | None:
        """Smallest and largest value of a visible, `None` if unbounded; may be set."""
        return self.latent_model.visibles.range

    @visible_range.setter
    def visible_range(self, limits: tuple[float, float] | None) -> None:
        self.latent_model = self.latent_model.taking(range=limits)

    @property
    def binary(self) -> bool:
        """Whether visibles must be exactly 0 or 1."""
        return self.latent_model.visibles.binary

    @final
    def check(self, v: Any) -> Tensor:
        """Refuse visibles this model cannot take; return them in the model's dtype and device.

        Arrays, data frames, sparse matrices and nested lists of numbers become tensors. Whole numbers
        and truth values are taken for 0 and 1 where visibles are; bytes of images where they lie in
        [-1, 1], to which they are scaled.

        Raises:
            TypeError: if they are no such thing, or whole numbers that need a scale.
            ValueError: if they are empty, of the wrong shape or range, or not finite (by index).
            RuntimeError: while the model is trained on standardised rows.
        """
        if self.units is not None:
            self.units.refuse_visibles()
        return self.as_visibles(self.admit(v))

    @final
    def admit(self, data: Any, numbers: list[int] | None = None) -> Tensor:
        """Refuse what `check` refuses; the rest on the model's device, bytes as bytes."""
        return self.latent_model.visibles.admitted_bytes(data, next(self.parameters()), numbers)

    @final
    def as_visibles(self, rows: Tensor) -> Tensor:
        """Rows of admitted data as the networks take them: bytes scaled, in the model's dtype."""
        return self.latent_model.visibles.as_numbers(rows, next(self.parameters()))

    @final
    def evaluating(self, statistics: Statistics | None = None) -> AbstractContextManager[None]:
        """No gradients, dropout off, batch norm by `statistics`; buffers and modes stay as they are."""
        return evaluating(self, self.statistics if statistics is None else statistics)

    @final
    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `model.json` (what the model is) and `weights.safetensors` into `folder`.

        A model in training with `standardise` is saved as one of the data's units.

        Raises:
            WriteError: if the disk is full, say; what was there before is whole.
        """
        write_model(in_units_of_data(self), folder)

    @final
    @classmethod
    def load(cls, folder: str | os.PathLike[str], **modules: Any) -> Self:
        """Read a model that `save` wrote: in evaluation mode, and in the dtype it was saved in.

        Args:
            folder: where it was saved.
            **modules: constructor arguments, needed if the model was made of your own modules.

        Raises:
            FileNotFoundError: if there is no model.
            ValueError: if it is another method's, its modules are needed, or the weights are damaged.
        """
        return loaded(cls, folder, modules)

    @final
    @classmethod
    def from_recipe(cls, recipe: dict[str, Any]) -> Self:
        """Build the model a recipe describes, by the constructor whose arguments it holds."""
        return built(cls, recipe)

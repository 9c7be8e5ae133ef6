"""`EBLVM`: what every energy-based latent-variable model can do, whatever trains it."""

import copy
import os
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypeVar, final

import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, Distribution, Independent, Normal

from bilevel import Alternating, Problem, Solver, Step
from bilevel.distributed import alone
from bilevel.methods.data.images import scaled
from bilevel.methods.data.visibles import admitted, as_tensor, refuse_shape
from bilevel.methods.training.fit import Evaluate, History, fit
from bilevel.methods.training.json_lines import read_document, write_document
from bilevel.methods.training.preconditions import begun_with
from bilevel.methods.training.schemas import Model
from bilevel.methods.training.settings import Training, one_of, refuse_idle, validated
from bilevel.methods.training.standardising import Units, standardised
from bilevel.methods.training.weights import fill, read_weights, write_weights
from bilevel.optimizers import Optimizers
from bilevel.sync_batch_norm import BatchNorm

Statistics = Literal["running", "batch"]
AnyModel = TypeVar("AnyModel", bound="EBLVM")


class EBLVM(Problem):
    """An energy-based latent-variable model that is its own bilevel learning problem.

    Attributes:
        visible_shape: shape of one visible, `None` if any will do.
        visible_range: smallest and largest value of a visible, `None` if unbounded.
        binary: whether visibles must be exactly 0 or 1.
        recipe: arguments of the constructor that built the networks; `None` for a model made of the
            caller's own modules, which `load` then needs again.
        units: those of the rows while it is trained with `standardise`; otherwise `None`.
        standardised: whether it was, so that its parameters are those of the data's units.
        statistics: batch-norm statistics at evaluation: "running" averages (each output depends on
            its own input only), or those of the "batch" at hand, as the BiDVL paper evaluates.
    """

    training_defaults: ClassVar[dict[str, Any]] = {}
    visible_shape: tuple[int, ...] | None = None
    visible_range: tuple[float, float] | None = None
    binary: bool = False
    recipe: dict[str, Any] | None = None
    statistics: Statistics = "running"
    units: Units | None = None
    standardised: bool = False

    @abstractmethod
    def energy(self, v: Tensor) -> Tensor:
        """Free energy of visibles up to a constant, shape (n,); low where the model has mass."""

    @abstractmethod
    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw n visibles from the model."""

    @abstractmethod
    def posterior(self, v: Tensor) -> Distribution:
        """The (variational) posterior over the latent of visibles."""

    @abstractmethod
    def reconstruct(self, v: Tensor) -> Tensor:
        """Visibles from the posterior mean of visibles, same shape."""

    def optimizers(self, training: Training) -> tuple[Optimizers, Optimizers]:
        """The upper and the lower optimizer this method uses by default.

        Adam in fused kernels for both levels, each with its own rate and weight decay.
        """
        settings: dict[str, Any] = {"betas": training.betas, "fused": True}
        upper = torch.optim.Adam(
            trainable(self.upper),
            lr=training.upper_lr,
            weight_decay=training.upper_weight_decay,
            **settings,
        )
        if not (variables := trainable(self.lower)):
            return upper, []
        decay = training.lower_weight_decay
        return upper, torch.optim.Adam(
            variables, lr=training.lower_lr, weight_decay=decay, **settings
        )

    def default_solver(self) -> Solver:
        """The solver `fit` takes where none is given: `Alternating()` for most methods."""
        return Alternating()

    @classmethod
    @abstractmethod
    def from_recipe(cls, recipe: dict[str, Any]) -> Self:
        """Build the model a recipe describes."""

    @abstractmethod
    def probe(self, v: Tensor) -> None:
        """Run two visibles through all networks.

        Raises:
            ValueError: if shapes do not fit, naming the network.
        """

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
        **settings: Any,
    ) -> History:
        """Train the model in place; with `ema` it has the averaged weights at the end.

        Args:
            data: visibles, shape (n, *visible_shape), within `visible_range`: a tensor, or what `check`
                makes one of; images may be bytes, which stay bytes on the model's device until a batch
                is drawn.
            solver: how the hypergradient is computed; `default_solver()` if not given.
            callbacks: called with every `Step`; one that returns `True` ends the training. With
                `standardise` they see the model of the standardised rows.
            run: folder to write config, metrics and checkpoints to; nothing is written without.
            resume: continue the run in that folder from its newest checkpoint, to the bit. It keeps its
                settings; only its end (`num_steps`, the steps in total, `max_seconds`) and what it
                records beside training may be changed.
            overwrite: replace the run in that folder.
            optimizers: the upper and lower optimizer(s), if not the method's own.
            notes: plain values to keep in the run's `config.json`, such as where the data came from.
            evaluate: called every `evaluate_every` steps with a copy of the model; returns numbers by
                name. The run is the same to the bit without. The best copy is kept in `run/best`, by the
                number that the setting `best` names, such as "log_likelihood" or "lowest my_number".
            **settings: any field of `Training`, such as `num_steps`, `batch_size`, `seed`.

        Returns:
            The history: one record per `log_every` steps, and the solver that was used.

        Raises:
            ValueError: for bad data or settings, before the first step.
            FileExistsError: if `run` already holds a run.
            CheckpointError: if a run is resumed with settings other than its own.
            DivergenceError: if a loss becomes NaN or infinite; the last good checkpoint is kept.
        """
        levels = 2 if self.variables("lower") else 1
        kept = begun_with(run, evaluated=evaluate is not None) if resume else {}
        values = {**self.training_defaults, **kept, **settings}
        training = validated(Training, values, levels=levels)
        usual = validated(Training, self.training_defaults)
        own = optimizers is not None
        refuse_idle(training, settings, usual, levels=levels, own_optimizers=own)
        with standardised(self, self.admit(data), training.standardise) as rows:
            return fit(
                self,
                rows,
                training,
                solver=solver,
                callbacks=callbacks,
                run=run,
                resume=resume,
                overwrite=overwrite,
                optimizers=optimizers,
                notes=notes,
                evaluate=evaluate,
            )

    @final
    def in_data_units(self) -> None:
        """Rewrite a model that is being trained on standardised rows as one of the rows as they came."""
        if self.units is not None:
            self.units.leave(self)
            self.units, self.standardised = None, True

    @final
    def check(self, v: Any) -> Tensor:
        """Refuse visibles this model cannot take; return them in the model's dtype and device.

        Arrays, data frames, sparse matrices and nested lists of numbers become tensors. Whole numbers
        and truth values are taken by a model whose visibles are 0 or 1, if that is what they are.
        Images may be bytes: they are scaled to [-1, 1], by a model whose visibles lie there.

        Raises:
            TypeError: if they are no such thing, or whole numbers that need a scale.
            ValueError: if they are empty, of the wrong shape or range, or not finite (by index).
            RuntimeError: while the model is trained on standardised rows.
        """
        if self.units is not None:
            raise RuntimeError(
                "the model is being trained on standardised rows; look at a copy in the data's units, "
                "`other = copy.deepcopy(model); other.in_data_units()`, or give `fit` the function "
                "`evaluate`, which gets one"
            )
        return self.as_visibles(self.admit(v))

    @final
    def admit(self, data: Any) -> Tensor:
        """Refuse what `check` refuses; return the rest on the model's device, bytes as bytes.

        Raises:
            TypeError: as `check`.
            ValueError: as `check`.
        """
        rows, parameter = as_tensor(data), next(self.parameters())
        if rows.dtype == torch.uint8 and self._takes_bytes(rows):
            refuse_shape(rows, self.visible_shape)
            return rows.to(parameter.device)
        return admitted(rows, self, self.visible_shape, parameter)

    @final
    def as_visibles(self, rows: Tensor) -> Tensor:
        """Rows of admitted data as the networks take them: bytes scaled, in the model's dtype."""
        return scaled(rows).to(next(self.parameters()).dtype)

    def _takes_bytes(self, v: Tensor) -> bool:
        return self.visible_range == (-1, 1) or (self.visible_range is None and v.ndim == 4)

    @final
    @contextmanager
    def evaluating(self, statistics: Statistics | None = None) -> Iterator[None]:
        """No gradients, dropout off, batch norm by `statistics`; buffers and modes stay as they are."""
        statistics = statistics if statistics is not None else self.statistics
        one_of("statistics", statistics, ("running", "batch"))
        modes = [(module, module.training) for module in self.modules()]
        buffers = [(b, b.clone()) for b in self.buffers()] if statistics == "batch" else []
        for module, _ in modes:
            module.training = statistics == "batch" and isinstance(module, BatchNorm)
        try:
            with torch.no_grad(), alone():
                yield
        finally:
            for module, training in modes:
                module.training = training
            for buffer, before in buffers:
                buffer.copy_(before)

    @final
    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `model.json` (what the model is) and `weights.safetensors` into `folder`.

        A model that is being trained with `standardise` is saved as one of the data's units.

        Raises:
            WriteError: if the disk is full, say; what was there before is whole.
        """
        if self.units is not None:
            model = copy.deepcopy(self)
            model.in_data_units()
            model.save(folder)
            return
        about: dict[str, Any] = {"method": type(self).__name__, "recipe": self.recipe}
        if self.standardised:
            about["standardised"] = True
        write_weights(Path(folder) / WEIGHTS, self.state_dict(), about)
        write_document(Path(folder) / "model.json", about)

    @final
    @classmethod
    def load(cls, folder: str | os.PathLike[str], **modules: Any) -> Self:
        """Read a model that `save` wrote.

        Args:
            folder: where it was saved.
            **modules: constructor arguments, needed if the model was made of your own modules.

        Raises:
            FileNotFoundError: if there is no model.
            ValueError: if it is another method's, its modules are needed, or the weights are damaged.

        The model is in evaluation mode, as `fit` leaves it, and in the dtype it was saved in.
        """
        path = Path(folder) / "model.json"
        if not path.exists():
            raise FileNotFoundError(f"there is no saved model in `{folder}` (no `model.json`)")
        description = read_document(path, Model)
        if description["method"] != cls.__name__:
            name = description["method"]
            raise ValueError(f"`{folder}` holds a `{name}`; load it with `{name}.load`")
        if modules:
            model = cls(**modules)
        elif description["recipe"] is not None:
            model = rebuilt(cls, description["recipe"], path)
        else:
            raise ValueError(
                f"the model in `{folder}` was made of your own modules; pass them again: "
                f"`{cls.__name__}.load(folder, energy=..., ...)`"
            )
        model.read(folder)
        model.standardised = bool(description.get("standardised", False))
        return model.eval()

    @final
    def read(self, folder: str | os.PathLike[str]) -> None:
        """Take the weights that a model of the same method and settings saved, in their precision.

        Raises:
            FileNotFoundError: if there are none.
            ValueError: if they are damaged, or of another model.
        """
        path = Path(folder) / WEIGHTS
        weights = read_weights(path, read_document(Path(folder) / "model.json", Model))
        for name, own in (*self.named_parameters(), *self.named_buffers()):
            saved = weights.get(name)
            if saved is not None and own.is_floating_point() and own.dtype != saved.dtype:
                own.data = own.data.to(saved.dtype)
        fill(self, weights, path)


WEIGHTS = "weights.safetensors"


def rebuilt(kind: type[AnyModel], recipe: dict[str, Any], source: Path) -> AnyModel:
    """A model from its recipe.

    Args:
        kind: the method.
        recipe: plain values.
        source: the file they are from.

    Raises:
        ValueError: if no model can be made of them.
    """
    try:
        return kind.from_recipe(recipe)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError) as error:
        raise ValueError(
            f"no `{kind.__name__}` can be made of the settings in `{source}`: {error}"
        ) from None


def trainable(module: nn.Module) -> list[nn.Parameter]:
    """The parameters of a module that require grad."""
    return [p for p in module.parameters() if p.requires_grad]


def chunked(function: Callable[[Tensor], Tensor], v: Tensor, size: int = 500) -> Tensor:
    """`function` on bounded pieces: evaluation must not need more memory than training."""
    return torch.cat([function(part) for part in v.split(size)])


def chunked_distribution(
    function: Callable[[Tensor], Distribution], v: Tensor, size: int = 500
) -> Distribution:
    """The distribution that `function` gives of visibles, taken on bounded pieces and joined.

    One of a kind that is not known here is taken in one piece.
    """
    if len(v) <= size:
        return function(v)
    parts = [function(part) for part in v.split(size)]
    joined = _joined(parts)
    return function(v) if joined is None else joined


def _joined(parts: list[Any]) -> Any:
    """Distributions over rows as one over all rows; `None` if it is not known how."""
    first = parts[0]
    if isinstance(first, Independent):
        base = _joined([part.base_dist for part in parts])
        return None if base is None else Independent(base, first.reinterpreted_batch_ndims)
    if type(first) is Normal:
        return Normal(torch.cat([p.loc for p in parts]), torch.cat([p.scale for p in parts]))
    if type(first) in (Bernoulli, Categorical):
        return type(first)(logits=torch.cat([part.logits for part in parts]))
    return None


def attempt(name: str, module: nn.Module, v: Tensor) -> Any:
    """`module(v)`, whose failure is the caller's mistake.

    Raises:
        ValueError: naming the module and the shape it could not take.
    """
    try:
        return module(v)
    except (RuntimeError, ValueError) as error:
        shape = tuple(v.shape)
        raise ValueError(f"the {name} cannot take a tensor of shape {shape}: {error}") from None

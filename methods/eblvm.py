"""`EBLVM`: what every energy-based latent-variable model can do, whatever trains it."""

import json
import os
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, final

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributions import Distribution

from bilevel import Alternating, Problem, Solver, Step
from bilevel.batches import not_finite
from bilevel.distributed import alone
from bilevel.methods.config import Training, one_of, validated
from bilevel.methods.data import scaled
from bilevel.methods.fitting import Evaluate, History, fit
from bilevel.methods.run import write_text
from bilevel.optimizers import Optimizers

Statistics = Literal["running", "batch"]


class EBLVM(Problem):
    """An energy-based latent-variable model that is its own bilevel learning problem.

    Attributes:
        visible_shape: shape of one visible, `None` if any will do.
        visible_range: smallest and largest value of a visible, `None` if unbounded.
        binary: whether visibles must be exactly 0 or 1.
        recipe: arguments of the constructor that built the networks; `None` for a model made of the
            caller's own modules, which `load` then needs again.
        statistics: batch-norm statistics at evaluation: "running" averages (each output depends on
            its own input only), or those of the "batch" at hand, as the BiDVL paper evaluates.
    """

    training_defaults: ClassVar[dict[str, Any]] = {}
    visible_shape: tuple[int, ...] | None = None
    visible_range: tuple[float, float] | None = None
    binary: bool = False
    recipe: dict[str, Any] | None = None
    statistics: Statistics = "running"

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

        Adam in fused kernels for both levels, weight decay in the lower one only.
        """
        settings: dict[str, Any] = {"betas": training.betas, "fused": True}
        upper = torch.optim.Adam(trainable(self.upper), lr=training.upper_lr, **settings)
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
        data: Tensor,
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
            data: visibles, shape (n, *visible_shape), floating point, within `visible_range`; images
                may be bytes, which stay bytes on the model's device until a batch is drawn.
            solver: how the hypergradient is computed; `default_solver()` if not given.
            callbacks: called with every `Step`; one that returns `True` ends the training.
            run: folder to write config, metrics and checkpoints to; nothing is written without.
            resume: continue the run in that folder from its newest checkpoint, to the bit.
            overwrite: replace the run in that folder.
            optimizers: the upper and lower optimizer(s), if not the method's own.
            notes: plain values to keep in the run's `config.json`, such as where the data came from.
            evaluate: called every `evaluate_every` steps with a copy of the model; returns numbers by
                name. The run is the same to the bit without; the best copy is kept in `run/best`.
            **settings: any field of `Training`, such as `num_steps`, `batch_size`, `seed`.

        Returns:
            The history: one record per `log_every` steps, and the solver that was used.

        Raises:
            ValueError: for bad data or settings, before the first step.
            FileExistsError: if `run` already holds a run.
            DivergenceError: if a loss becomes NaN or infinite; the last good checkpoint is kept.
        """
        training = validated(Training, {**self.training_defaults, **settings})
        return fit(
            self,
            self.admit(data),
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
    def check(self, v: Tensor) -> Tensor:
        """Refuse visibles this model cannot take; return them in the model's dtype and device.

        Images may be bytes: they are scaled to [-1, 1], by a model whose visibles lie there.

        Raises:
            TypeError: if they are not a tensor, or integers.
            ValueError: if they are empty, of the wrong shape or range, or not finite (by index).
        """
        return self.as_visibles(self.admit(v))

    @final
    def admit(self, data: Tensor) -> Tensor:
        """Refuse what `check` refuses; return the rest on the model's device, bytes as bytes.

        Raises:
            TypeError: as `check`.
            ValueError: as `check`.
        """
        if not isinstance(data, Tensor):
            raise TypeError(
                f"visibles must be a tensor, got {type(data).__name__}; use `torch.as_tensor`"
            )
        if data.dtype == torch.uint8 and self._takes_bytes(data):
            self._refuse_shape(data)
            return data.to(next(self.parameters()).device)
        if not data.is_floating_point():
            raise TypeError(
                f"visibles must be floating point, got {data.dtype}; scale integer images first, for "
                "bytes to [-1, 1] by `images / 127.5 - 1`"
            )
        self._refuse_shape(data)
        count, which = not_finite(data)
        if count:
            raise ValueError(f"{count} of {len(data)} visibles hold NaN or infinity ({which})")
        self._refuse_values(data)
        parameter = next(self.parameters())
        return data.to(device=parameter.device, dtype=parameter.dtype)

    @final
    def as_visibles(self, rows: Tensor) -> Tensor:
        """Rows of admitted data as the networks take them: bytes scaled, in the model's dtype."""
        return scaled(rows).to(next(self.parameters()).dtype)

    def _takes_bytes(self, v: Tensor) -> bool:
        return self.visible_range == (-1, 1) or (self.visible_range is None and v.ndim == 4)

    def _refuse_shape(self, v: Tensor) -> None:
        if v.ndim == 0 or len(v) == 0:
            raise ValueError("there are no visibles: the first dimension is 0")
        if self.visible_shape is not None and tuple(v.shape[1:]) != self.visible_shape:
            raise ValueError(
                f"this model takes visibles of shape (n, {_join(self.visible_shape)}), "
                f"got {tuple(v.shape)}{_remedy(tuple(v.shape[1:]), self.visible_shape)}"
            )

    def _refuse_values(self, v: Tensor) -> None:
        if self.visible_range is not None:
            low, high = self.visible_range
            least, most = float(v.min()), float(v.max())
            if least < low - 1e-6 or most > high + 1e-6:
                raise ValueError(
                    f"this model takes visibles in [{low:g}, {high:g}], got values from {least:g} to "
                    f"{most:g}; rescale them"
                )
        if self.binary and (count := int(((v != 0) & (v != 1)).sum())):
            raise ValueError(
                f"this model takes visibles that are exactly 0 or 1, but {count} of {v.numel()} values "
                "are not; binarise them, or make the model with `grey=True`, which takes greys for "
                "probabilities as AdvIL does"
            )

    @final
    @contextmanager
    def evaluating(self, statistics: Statistics | None = None) -> Iterator[None]:
        """No gradients, dropout off, batch norm by `statistics`; buffers and modes stay as they are."""
        statistics = statistics if statistics is not None else self.statistics
        one_of("statistics", statistics, ("running", "batch"))
        modes = [(module, module.training) for module in self.modules()]
        buffers = [(b, b.clone()) for b in self.buffers()] if statistics == "batch" else []
        for module, _ in modes:
            module.training = statistics == "batch" and isinstance(module, BATCH_NORMS)
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
        """Write `model.json` (what the model is) and `weights.safetensors` into `folder`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        description = {"method": type(self).__name__, "recipe": self.recipe}
        temporary = folder / "weights.tmp"
        # copies: safetensors stores neither shared memory (a posterior in both levels) nor strides
        save_file({n: t.contiguous().clone() for n, t in self.state_dict().items()}, temporary)
        os.replace(temporary, folder / "weights.safetensors")
        write_text(folder / "model.json", json.dumps(description, indent=2) + "\n")

    @final
    @classmethod
    def load(cls, folder: str | os.PathLike[str], **modules: Any) -> Self:
        """Read a model that `save` wrote.

        Args:
            folder: where it was saved.
            **modules: constructor arguments, needed if the model was made of your own modules.

        Raises:
            FileNotFoundError: if there is no model.
            ValueError: if it is another method's, or its modules are needed.
        """
        path = Path(folder) / "model.json"
        if not path.exists():
            raise FileNotFoundError(f"there is no saved model in `{folder}` (no `model.json`)")
        description = json.loads(path.read_text())
        if description["method"] != cls.__name__:
            name = description["method"]
            raise ValueError(f"`{folder}` holds a `{name}`; load it with `{name}.load`")
        if modules:
            model = cls(**modules)
        elif description["recipe"] is not None:
            model = cls.from_recipe(description["recipe"])
        else:
            raise ValueError(
                f"the model in `{folder}` was made of your own modules; pass them again: "
                f"`{cls.__name__}.load(folder, energy=..., ...)`"
            )
        model.load_state_dict(load_file(Path(folder) / "weights.safetensors"))
        return model


BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def trainable(module: nn.Module) -> list[nn.Parameter]:
    """The parameters of a module that require grad."""
    return [p for p in module.parameters() if p.requires_grad]


def chunked(function: Callable[[Tensor], Tensor], v: Tensor, size: int = 500) -> Tensor:
    """`function` on bounded pieces: evaluation must not need more memory than training."""
    return torch.cat([function(part) for part in v.split(size)])


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


def _remedy(shape: tuple[int, ...], wanted: tuple[int, ...]) -> str:
    """How images of one shape are made those of another, if that is what they are."""
    if len(shape) != 3 or len(wanted) != 3:
        return ""
    options = [f"channels={wanted[0]}"] if shape[0] != wanted[0] else []
    options += [f"side={wanted[2]}"] if shape[1:] != wanted[1:] else []
    return f"; load the images with `{', '.join(options)}`"


def _join(shape: tuple[int, ...]) -> str:
    return ", ".join(map(str, shape))

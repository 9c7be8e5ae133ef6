"""`Trainable`: what training asks of a model, whatever its class."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from bilevel import Solver
from bilevel.methods.training.settings import Training
from bilevel.optimizers import Optimizers

Evaluate: TypeAlias = Callable[[Any], dict[str, float]]
"""A function that is given a copy of the model and returns numbers by name."""


class Trainable(Protocol):
    """A model that can be trained: what `fit`, its run folder and its footprint ask of it.

    `EBLVM` satisfies it. Beside this it is a `bilevel.Problem`, which a protocol cannot say.
    """

    upper: nn.Module
    lower: nn.Module

    @property
    def training_defaults(self) -> Mapping[str, Any]:
        """Settings of the method's paper, where they differ from those of `Training`."""

    @property
    def recipe(self) -> dict[str, Any] | None:
        """The plain values it can be built from again, if it can."""

    @property
    def visible_shape(self) -> tuple[int, ...] | None:
        """Shape of one visible, `None` if any will do."""

    @property
    def visible_range(self) -> tuple[float, float] | None:
        """Smallest and largest value of a visible, `None` if unbounded."""

    @property
    def device(self) -> torch.device:
        """Where its parameters are."""

    def default_solver(self) -> Solver:
        """The solver where none is given."""

    def optimizers(self, training: Training) -> tuple[Optimizers, Optimizers]:
        """The optimizers of both levels where none are given."""

    def variables(self, level: Any) -> Mapping[str, Tensor]:
        """The variables of a level, by name."""

    def admit(self, data: Any, numbers: list[int] | None = None) -> Tensor:
        """Refuse data it does not take, naming rows by these numbers."""

    def as_visibles(self, rows: Tensor) -> Tensor:
        """Rows as the networks take them."""

    def probe(self, v: Tensor) -> None:
        """Refuse visibles whose shape does not fit."""

    def in_data_units(self) -> None:
        """Become a model of the rows as they came, if it is trained on standardised ones."""

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw visibles, where the model can."""

    def reconstruct(self, v: Any) -> Tensor:
        """Visibles through the latent, where the model can."""

    def save(self, folder: Path) -> None:
        """Write what it is and its weights into a folder."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """As `torch.nn.Module`, and so are the following."""

    def buffers(self) -> Iterator[Tensor]: ...
    def train(self) -> Any: ...
    def eval(self) -> Any: ...
    def load_state_dict(self, state_dict: Mapping[str, Any], /) -> Any: ...

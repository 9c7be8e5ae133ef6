"""`Case`: a problem at a point, and what it is asked with."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from bilevel.optimizers import Optimizers
from bilevel.problem import Problem


@final
class Case(NamedTuple):
    """A problem at a point, and what its losses are evaluated on.

    Attributes:
        problem: in float64, or the truth is known less closely.
        upper_batch: of the upper loss; the upper level's data in a training.
        lower_batches: of the lower loss; the first is the lower level's data in a training.
        lower_optimizer: whose steps `Unrolled` unrolls; plain gradient descent by default.
        measures: what else a training is judged by, numbers by name; the only judge where the lower
            level has no minimum.
        rates: learning rates of the upper and of the lower level in a training, where there is no
            value function whose curvature says them.
    """

    problem: Problem
    upper_batch: Any = None
    lower_batches: Sequence[Any] = (None,)
    lower_optimizer: Optimizers | None = None
    measures: Callable[[Problem], Mapping[str, float]] | None = None
    rates: tuple[float, float] | None = None

    def ready(self) -> "Case":
        """The case with an optimizer."""
        if self.lower_optimizer is not None:
            return self
        return self._replace(lower_optimizer=torch.optim.SGD(self.problem.lower.parameters(), 0.1))


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    """Standard normal numbers in float64."""
    return torch.randn(shape, generator=generator, dtype=torch.float64)

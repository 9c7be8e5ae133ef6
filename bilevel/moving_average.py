r"""`MovingAverage`: an exponential moving average of a problem's weights.

$$ \bar\theta \leftarrow \beta \bar\theta + (1 - \beta) \theta $$

after every turn, from the initial weights on. Buffers (batch-norm statistics, power iterations) are
those of the problem in training.
"""

import copy
from typing import Any, final

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from bilevel.problem import Problem


@final
class Detaching(TorchFunctionMode):
    """Lets tensors with a graph be copied: what a pruned or normed layer computed at its last call."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not Tensor.__deepcopy__ or args[0].is_leaf:
            return func(*args, **(kwargs or {}))
        tensor, memo = args
        return memo.setdefault(id(tensor), tensor.detach().clone())


@final
class MovingAverage:
    """The moving average of a problem; `problem` holds it.

    Args:
        source: the problem in training.
        decay: beta.

    Raises:
        ValueError: if the decay is not between 0 and 1.
    """

    def __init__(self, source: Problem, decay: float) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"`ema` must lie between 0 and 1, got {decay}")
        self.decay = decay
        with Detaching():
            self.problem = copy.deepcopy(source).requires_grad_(False)
        self._averages = [p.detach() for p in self.problem.parameters()]
        self._weights = [p.detach() for p in source.parameters()]
        self._buffers = list(zip(self.problem.buffers(), source.buffers(), strict=True))

    @torch.no_grad()
    def update(self) -> None:
        """Take one more step of the weights into the average."""
        torch._foreach_lerp_(self._averages, self._weights, 1 - self.decay)
        for mine, theirs in self._buffers:
            mine.copy_(theirs)

"""One optimizer per level, or several: how that is written and read."""

from collections.abc import Sequence
from typing import TypeAlias, TypeVar

import torch

T = TypeVar("T")
Optimizers: TypeAlias = torch.optim.Optimizer | Sequence[torch.optim.Optimizer]


def listed(one_or_more: T | Sequence[T]) -> list[T]:
    """What was given as one thing or as a sequence of them, as a list."""
    return list(one_or_more) if isinstance(one_or_more, Sequence) else [one_or_more]

"""Evaluation in bounded pieces: it must not need more memory than training."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Distribution, Independent, Normal


def chunked(function: Callable[[Tensor], Tensor], v: Tensor, size: int = 500) -> Tensor:
    """`function` of `size` rows at a time, side by side."""
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

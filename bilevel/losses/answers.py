"""What a loss may return: a scalar, or a scalar and a dict of numbers to log."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bilevel.problem import Level, Problem
from bilevel.refusals import shown


def scalar(out: Any, level: Level, problem: Problem) -> tuple[Tensor, dict[str, Tensor]]:
    """The answer as a scalar with its graph, and what was logged.

    Raises:
        TypeError: if it is neither a scalar nor a pair of a scalar and a dict of numbers.
    """
    loss, logs = out if isinstance(out, tuple) and len(out) == 2 else (out, {})
    mapping = type(logs) is dict or isinstance(logs, Mapping)  # the quick question first
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not mapping:
        got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
        raise TypeError(
            f"`{type(problem).__name__}.{level}_loss` must return a scalar tensor, or a scalar "
            f"tensor and a dict of tensors to log; got {got}. Average it over the batch, for "
            "example with `.mean()`"
        )
    if loss.is_complex():
        raise TypeError(
            f"`{type(problem).__name__}.{level}_loss` is complex; return a real number, for example "
            "`.real` or `.abs()`"
        )
    loss = loss.reshape(()) if loss.ndim else loss  # a view is a node of the graph, too
    loss = loss if loss.dtype.itemsize > 2 else loss.float()
    return loss, {name: _logged(name, v, level, problem) for name, v in logs.items()}


def _logged(name: Any, value: Any, level: Level, problem: Problem) -> Tensor:
    what = f"what `{type(problem).__name__}.{level}_loss` logs"
    if not isinstance(name, str):
        raise TypeError(f"{what} must have names, got {name!r} for one")
    if isinstance(value, Tensor):
        return value.detach()
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            f"{what} as `{name}` must be a number or a tensor, got {shown(value)}; leave it out where "
            "there is none"
        ) from None

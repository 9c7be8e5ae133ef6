"""A problem in float64: a copy that computes what the original does, without its rounding.

Variables, buffers, batches and the states of optimizers are converted. What code holds elsewhere, such
as the tensors that a function closes over, is converted where it meets a float64 tensor. Random numbers
are drawn in the type the original draws them in, so that both see the same ones.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import optree
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from bilevel.moving_average import Detaching
from bilevel.problem import Problem

_CASTS = {
    Tensor.to,
    Tensor.float,
    Tensor.half,
    Tensor.bfloat16,
    Tensor.type,
    Tensor.type_as,
}
_DRAWN_LIKE = {torch.randn_like, torch.rand_like, torch.bernoulli, Tensor.bernoulli}
_WHOLE = {torch.autograd.grad, torch.autograd.backward, Tensor.backward, Tensor.copy_}


@final
class InDouble(TorchFunctionMode):
    """Inside, operations that mix float64 with less are computed in float64.

    Args:
        drawn: the type that random numbers are drawn in.
    """

    def __init__(self, drawn: torch.dtype) -> None:
        super().__init__()
        self._drawn = drawn

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in ("__get__", "__set__", "__delete__") or func in _WHOLE:
            return func(*args, **kwargs)
        if func in _CASTS:
            return _cast(func, args, kwargs)
        if func in _DRAWN_LIKE and _is_double(args[0]):
            return func(args[0].to(self._drawn), *args[1:], **kwargs).double()
        if not _mixed([*args, *kwargs.values()]):
            return func(*args, **kwargs)
        writes = name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
        kept = 1 if writes else 0
        widened = [a if i < kept else _widened(a) for i, a in enumerate(args)]
        return func(*widened, **{n: _widened(v) for n, v in kwargs.items() if n != "out"})


def _cast(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """A cast of a float64 tensor to less moves it to where the cast would, and leaves its type."""
    out = func(*args, **kwargs)
    narrowed = isinstance(out, Tensor) and out.is_floating_point() and not _is_double(out)
    return args[0].to(out.device) if narrowed and _is_double(args[0]) else out


def _is_double(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.float64


def _mixed(values: Sequence[Any]) -> bool:
    """Whether there are float64 tensors among others of less precision."""
    kinds = set()
    for value in values:
        for leaf in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(leaf, Tensor) and leaf.is_floating_point():
                kinds.add(leaf.dtype)
    return len(kinds) > 1 and torch.float64 in kinds


def _widened(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if type(value) in (tuple, list):
        return type(value)(_widened(v) for v in value)
    return value


@final
@dataclass(frozen=True)
class Doubled:
    """A copy of a problem, its batches and its lower optimizers, in float64.

    Attributes:
        problem: the copy.
        upper_batch: the upper batch.
        lower_batches: the lower batches.
        optimizers: copies of the optimizers that hold the copy's variables.
        drawn: the type that the original draws random numbers in.
        types: the types of the original's parameters and buffers.
        mixed: whether the original holds less than float64, so that code may mix the two.
    """

    problem: Problem
    upper_batch: Any
    lower_batches: list[Any]
    optimizers: list[torch.optim.Optimizer]
    drawn: torch.dtype
    types: list[torch.dtype]
    mixed: bool

    def convert(self, types: Sequence[torch.dtype]) -> None:
        """Give the copy's parameters and buffers, and what optimizers hold of them, other types."""
        for tensor, kind in zip(_floating(self.problem), types, strict=True):
            tensor.data = tensor.data.to(kind)
        for optimizer in self.optimizers:
            for parameter, state in optimizer.state.items():
                for name, value in state.items():
                    if isinstance(value, Tensor) and value.is_floating_point() and name != "step":
                        state[name] = value.to(parameter.dtype)


def doubled(
    problem: Problem,
    upper_batch: Any,
    lower_batches: Sequence[Any],
    optimizers: Sequence[torch.optim.Optimizer],
) -> Doubled:
    """Copy a problem into float64; the original is left as it was.

    Raises:
        ValueError: if an optimizer has step hooks, which may write into the original.
    """
    for optimizer in optimizers:
        if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
            raise ValueError(
                f"`{type(optimizer).__name__}` has step hooks, which may write into the problem itself "
                "while its steps are replayed on a copy; remove them, or compare with "
                "`against='solution'`"
            )
    kinds = {t.dtype for t in (*problem.parameters(), *problem.buffers()) if t.is_floating_point()}
    with Detaching():
        made = copy.deepcopy(problem)
        memo: dict[int, Any] = {
            id(old): new for old, new in zip(problem.parameters(), made.parameters(), strict=True)
        }
        moved = [copy.deepcopy(optimizer, dict(memo)) for optimizer in optimizers]
    for parameter in made.parameters():
        parameter.grad = None
    for optimizer in moved:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None
    drawn = next(iter(p.dtype for p in problem.lower.parameters()), torch.get_default_dtype())
    given = [upper_batch, *lower_batches]
    copied = Doubled(
        problem=made,
        upper_batch=upper_batch,
        lower_batches=given[1:],
        optimizers=moved,
        drawn=drawn,
        types=[t.dtype for t in _floating(made)],
        mixed=not kinds <= {torch.float64},
    )
    copied.convert([torch.float64] * len(copied.types))
    batches = [optree.tree_map(_widened, batch, none_is_leaf=True) for batch in given]
    return replace(copied, upper_batch=batches[0], lower_batches=batches[1:])


def _floating(problem: Problem) -> list[Tensor]:
    """Parameters and buffers that are converted, each once."""
    return [t for t in (*problem.parameters(), *problem.buffers()) if t.is_floating_point()]

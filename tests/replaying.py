"""A stand-in for a CUDA graph on a processor: it records what torch runs, and runs it again."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bilevel.compile.cuda_graph import copied


class _Operations(TorchDispatchMode):
    """Keeps every operation with the tensors that it read and wrote, as a capture does."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        out = func(*args, **(kwargs or {}))
        self.kept.append((func, args, kwargs or {}, out))
        return out


class Replayed:
    """`run(*arguments, *live)`, whose Python runs once: later calls repeat its operations.

    As in a CUDA graph every operation reads and writes the memory that it was recorded with.

    Attributes:
        made: all that there are, over all tests.
    """

    made: int = 0

    def __init__(
        self, run: Callable[..., Any], arguments: Sequence[Tensor], live: Sequence[Tensor]
    ) -> None:
        Replayed.made += 1
        self._arguments = [copied(t) for t in arguments]
        for _ in range(3):
            run(*self._arguments, *live)
        operations = _Operations()
        with operations:
            self._answers = [t.detach() for t in run(*self._arguments, *live)]
        self._operations = operations.kept

    def __call__(self, *tensors: Tensor) -> list[Tensor]:
        with torch.no_grad():
            for mine, given in zip(self._arguments, tensors, strict=False):
                mine.copy_(given)
            for func, args, kwargs, out in self._operations:
                _write(out, func(*args, **kwargs))
            return [answer.clone() for answer in self._answers]


def _write(old: Any, new: Any) -> None:
    """Put a result where the first one lies, unless it lies there already."""
    if isinstance(old, Tensor):
        if old.numel() and old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
            old.copy_(new)
    elif isinstance(old, (list, tuple)):
        for mine, theirs in zip(old, new, strict=True):
            _write(mine, theirs)

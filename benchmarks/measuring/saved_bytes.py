"""What autograd keeps for the backward pass."""

from collections.abc import Callable
from typing import final

import torch
from torch import Tensor

from benchmarks.measuring.turns import Run


@final
class SavedBytes:
    """Peak of the bytes that autograd keeps for the backward pass, each storage counted once."""

    def __init__(self) -> None:
        self.peak = self._live = 0
        self._holders: dict[int, int] = {}

    def measure(self, run: Run) -> int | None:
        """The peak during one run; `None` where torch refuses to look (inside `torch.func`)."""
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda box: box.tensor):
                run()
        except RuntimeError:
            return None
        return self.peak

    def _pack(self, tensor: Tensor) -> "_Box":
        storage = tensor.untyped_storage()
        key, size = storage.data_ptr(), storage.nbytes()
        self._holders[key] = self._holders.get(key, 0) + 1
        self._live += size if self._holders[key] == 1 else 0
        self.peak = max(self.peak, self._live)
        # detached: an output that its own node holds would never be freed
        return _Box(tensor.detach(), lambda: self._release(key, size))

    def _release(self, key: int, size: int) -> None:
        self._holders[key] -= 1
        self._live -= size if self._holders[key] == 0 else 0


@final
class _Box:
    def __init__(self, tensor: Tensor, release: Callable[[], None]) -> None:
        self.tensor = tensor
        self._release = release

    def __del__(self) -> None:
        self._release()

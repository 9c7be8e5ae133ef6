"""`CudaGraph`: a function of CUDA tensors, captured once as a CUDA graph and replayed.

A step launches some hundred kernels, each for microseconds of work; a replay launches them all at once.
The graph reads and writes the memory it was captured with: arguments are copied in, answers out.
"""

from collections.abc import Callable, Sequence
from typing import Any, final

import torch
from torch import Tensor

_WARM_UP = 3  # calls before the capture, in which libraries choose their algorithms


@final
class CudaGraph:
    """`run(*arguments, *live)` as a CUDA graph.

    Args:
        run: a function that waits for nothing; its last calls must have had these shapes.
        arguments: tensors that differ from call to call.
        live: tensors that keep their place in memory. The warm-up writes into them.

    Raises:
        ValueError: if a tensor is not on a CUDA device: the graph would freeze its value.
    """

    def __init__(
        self, run: Callable[..., Any], arguments: Sequence[Tensor], live: Sequence[Tensor]
    ) -> None:
        elsewhere = [t for t in (*arguments, *live) if not t.is_cuda]
        if elsewhere:
            raise ValueError(f"{len(elsewhere)} tensors of the step are not on the CUDA device")
        self._arguments = [t.clone() for t in arguments]
        current, aside = torch.cuda.current_stream(), torch.cuda.Stream()
        aside.wait_stream(current)
        with torch.cuda.stream(aside):
            for _ in range(_WARM_UP):
                run(*self._arguments, *live)
        current.wait_stream(aside)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._answers = list(run(*self._arguments, *live))

    def __call__(self, *tensors: Tensor) -> list[Tensor]:
        """The answers for new arguments; the live tensors behind them are those of the capture."""
        for mine, given in zip(self._arguments, tensors, strict=False):
            mine.copy_(given)
        self._graph.replay()
        return [answer.clone() for answer in self._answers]


Recorded = CudaGraph
"""The earlier name of `CudaGraph`."""

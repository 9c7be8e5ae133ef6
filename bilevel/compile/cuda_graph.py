"""`CudaGraph`: a function of CUDA tensors, captured once as a CUDA graph and replayed.

A step launches some hundred kernels, each for microseconds of work; a replay launches them all at once.
The graph reads and writes the memory it was captured with: arguments are copied in, answers out.

torch's own rules for such graphs, and how they are kept here:

- libraries choose their algorithms in the first calls, which may wait for the device: three calls come
  before the capture, on the stream that is captured (one of their own is not captured at all);
- nothing may wait for the device: the last of the three calls is an error where something does, before
  a capture has begun that would have to be abandoned;
- other threads (a loader that pins memory) may go on: the capture forbids its own thread alone;
- graphs may share one pool of memory if what outlives a replay is held, here arguments and answers
  (`Pool`).
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, final

import torch
from torch import Tensor

_WARM_UP = 3  # calls before the capture


class Capture(Protocol):
    """What makes a replayable function of `run(*arguments, *live)`; `CudaGraph` is one."""

    def __call__(
        self, run: Callable[..., Any], arguments: Sequence[Tensor], live: Sequence[Tensor]
    ) -> Callable[..., list[Tensor]]: ...


@final
class Pool:
    """The memory that the graphs of a run share, and the stream they are captured on.

    Each graph needs room for what a step computes on the way; one after the other they can use the same.

    Args:
        device: the CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)  # the default one may lie on another device
        self.handle = torch.cuda.graph_pool_handle()
        # torch gives a pool up with its last graph, and refuses to open it again: one stays
        self._keeper = torch.cuda.CUDAGraph()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The CUDA Graph is empty")
            with self.capturing(self._keeper):
                pass

    @contextlib.contextmanager
    def capturing(self, graph: torch.cuda.CUDAGraph) -> Iterator[None]:
        """Capture what runs inside."""
        device = self.stream.device
        current = torch.cuda.current_stream(device)
        with torch.cuda.device(device):
            try:
                with torch.cuda.graph(
                    graph, pool=self.handle, stream=self.stream, capture_error_mode="thread_local"
                ):
                    yield
            finally:
                if torch.cuda.current_stream(device) != current:  # ending the capture failed
                    torch.cuda.set_stream(current)

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Run what is inside on the stream of the captures."""
        current = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(current)
        try:
            with torch.cuda.stream(self.stream):
                yield
        finally:
            current.wait_stream(self.stream)


@final
class CudaGraph:
    """`run(*arguments, *live)` as a CUDA graph.

    Args:
        run: a function that waits for nothing; what it needs to be called with once it has been.
        arguments: tensors that differ from call to call.
        live: tensors that keep their place in memory. The warm-up writes into them.
        pool: the memory it shares with other graphs; its own by default.

    Raises:
        ValueError: if a tensor is not on a CUDA device: the graph would freeze its value.
        RuntimeError: if `run` waits for the device.
    """

    def __init__(
        self,
        run: Callable[..., Any],
        arguments: Sequence[Tensor],
        live: Sequence[Tensor],
        *,
        pool: Pool | None = None,
    ) -> None:
        elsewhere = [t for t in (*arguments, *live) if not t.is_cuda]
        if elsewhere:
            raise ValueError(f"{len(elsewhere)} tensors of the step are not on the CUDA device")
        self._arguments = [copied(t) for t in arguments]
        found = [*self._arguments, *live]
        device = found[0].device if found else torch.device("cuda", torch.cuda.current_device())
        self._pool = Pool(device) if pool is None else pool  # held as long as the graph
        with self._pool.aside():
            for _ in range(_WARM_UP - 1):
                run(*self._arguments, *live)
            with _waiting_is_an_error():
                run(*self._arguments, *live)
        self._graph = torch.cuda.CUDAGraph()
        with self._pool.capturing(self._graph):
            self._answers = Packed(run(*self._arguments, *live))

    def __call__(self, *tensors: Tensor) -> list[Tensor]:
        """The answers for new arguments; the live tensors behind them are those of the capture."""
        given = list(tensors[: len(self._arguments)])
        with torch.no_grad():
            if given:
                torch._foreach_copy_(self._arguments, given)
            self._graph.replay()
            return self._answers.copies()


@final
class Recorder:
    """Makes CUDA graphs that share one pool of memory.

    Args:
        device: the CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Pool | None = None

    def __call__(
        self, run: Callable[..., Any], arguments: Sequence[Tensor], live: Sequence[Tensor]
    ) -> CudaGraph:
        """`run(*arguments, *live)` as a CUDA graph."""
        if self._pool is None:
            self._pool = Pool(self._device)
        return CudaGraph(run, arguments, live, pool=self._pool)


@final
class Packed:
    """Tensors laid out one after the other, so that one kernel copies many of them.

    Scalars lie apart: a loss that somebody keeps must not keep all gradients in memory.

    Args:
        tensors: any tensors; what is packed are their values now.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._shapes = [t.shape for t in tensors]
        places: dict[tuple[torch.dtype, bool], list[int]] = {}
        for i, tensor in enumerate(tensors):
            places.setdefault((tensor.dtype, tensor.numel() == 1), []).append(i)
        self._places = list(places.values())
        self._sizes = [[tensors[i].numel() for i in places] for places in self._places]
        self._vectors = [
            torch.cat([tensors[i].detach().reshape(-1) for i in places]) for places in self._places
        ]

    def copies(self) -> list[Tensor]:
        """Tensors of their own with the values that are packed now."""
        found: dict[int, Tensor] = {}
        for places, sizes, vector in zip(self._places, self._sizes, self._vectors, strict=True):
            found.update(zip(places, vector.clone().split(sizes), strict=True))
        return [found[i].view(shape) for i, shape in enumerate(self._shapes)]


def copied(tensor: Tensor) -> Tensor:
    """A tensor of its own with these values, a leaf that requires grad if that one does."""
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


@contextlib.contextmanager
def _waiting_is_an_error() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


Recorded = CudaGraph
"""The earlier name of `CudaGraph`."""

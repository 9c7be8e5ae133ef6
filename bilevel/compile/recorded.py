"""`recorded`: a step as torch runs it, captured as a CUDA graph - no tracer and no compiler in between.

What Python does happens once, while the step is captured: it decides which kernels are launched, on
which memory. A replay launches them again. So a step is recorded only if nothing in it depends on what
the next one may hold:

- its arguments are copied to where the graph reads them;
- variables, buffers and the optimizers' states are read and written where they lie;
- a value that Python looks at (`.item()`, `if`) would be the first one for ever: refused;
- a random number would need a generator whose state moves with the replays. Here every loss of a turn
  draws from one seed, so that all products of a hypergradient see the same masks; to seed a generator
  is what a capture forbids. So losses that draw are refused;
- a tensor on the processor is a number in the graph: the versions of those are remembered;
- what it reads without being given it (a plain tensor that a module keeps) must stay where it lies.

It knows torch alone; what makes a graph is given (`capture`).
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, final

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from bilevel.compile.cuda_graph import Capture, copied
from bilevel.compile.lowering import unchanged
from bilevel.compile.tracing import traced

_LOOKS = {"item", "tolist", "numpy", "__array__", "__dlpack__", "equal", "allclose"} | {
    f"__{kind}__" for kind in ("bool", "int", "float", "complex", "index")
}


@final
@dataclass(frozen=True)
class Recording:
    """A recorded function and the tensors it reads and writes besides its arguments.

    Attributes:
        run: gives the answers for new arguments; what follows them is ignored.
        live: the tensors that it writes.
        extra: further tensors that it reads.
        constants: tensors whose values it holds, and the versions these had.
        aliases: where live and extra tensors lay when it was recorded.
    """

    run: Callable[..., list[Tensor]]
    live: list[Tensor]
    extra: list[Tensor]
    constants: list[tuple[Tensor, int]]
    aliases: list[Tensor]

    def stale(self) -> bool:
        """Whether a constant was written to."""
        return any(tensor._version != version for tensor, version in self.constants)

    def in_place(self, count: int) -> bool:
        """Whether the first `count` live tensors, and those found, lie where they did."""
        now = chain(self.live[:count], self.extra)
        before = chain(self.aliases[:count], self.aliases[len(self.live) :])
        return all(map(Tensor.is_set_to, now, before))

    def follow(self, live: Sequence[Tensor], arguments: Sequence[Tensor]) -> bool:
        """Whether these tensors are those of the recording; if not, a step must be recorded anew."""
        now = [*live, *self.extra]
        return len(now) == len(self.aliases) and all(map(Tensor.is_set_to, now, self.aliases))


def recorded(
    function: Callable[..., list[Tensor]],
    arguments: Sequence[Tensor],
    live: Sequence[Tensor],
    device: torch.device,
    *,
    capture: Capture,
) -> Recording:
    """`function(*arguments)`, which reads and writes the live tensors, as one recording.

    The live tensors are afterwards what they were, also if it fails.

    Args:
        function: what is recorded; called five times.
        arguments: tensors as it will be called with.
        live: the tensors that it writes, and those it reads that may move.
        device: where it runs.
        capture: makes the graph.

    Raises:
        ValueError: if it draws random numbers or looks at values.
        RuntimeError: if torch cannot capture it.
    """
    elsewhere = [t for t in (*arguments, *live) if t.device != device]
    if elsewhere:
        raise ValueError(f"{len(elsewhere)} tensors of the step are not on the device `{device}`")
    aliases = [tensor.detach() for tensor in live]
    with unchanged(aliases), traced(), _no_autocast_cache():
        found = _tried(function, arguments, live, device)
        run = capture(function, arguments, ())
    extra = [tensor for tensor in found if tensor.device == device]
    constants = [t for t in found if t.device != device and not t.is_inference()]
    return Recording(
        run=run,
        live=list(live),
        extra=extra,
        constants=[(tensor, tensor._version) for tensor in constants],
        aliases=[*aliases, *(tensor.detach() for tensor in extra)],
    )


def _tried(
    function: Callable[..., Any],
    arguments: Sequence[Tensor],
    live: Sequence[Tensor],
    device: torch.device,
) -> list[Tensor]:
    """Call the function once; the tensors that it reads without being given them.

    Raises:
        ValueError: if it draws or looks.
    """
    generators = [torch.default_generator]
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        generators.append(torch.cuda.default_generators[index])
    before = [generator.get_state() for generator in generators]
    arguments = [copied(argument) for argument in arguments]
    outside = _Outside([*arguments, *live])
    with _Looks(device), outside:
        function(*arguments)
    drew = False
    for generator, state in zip(generators, before, strict=True):
        drew |= not torch.equal(generator.get_state(), state)
        generator.set_state(state)
    if drew:
        raise ValueError("a loss draws random numbers (dropout?); draw them in `draw`")
    return list(outside.found.values())


@final
class _Looks(TorchFunctionMode):
    """Refuses to take values of the device's tensors out of torch.

    Args:
        device: where the step runs.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        looks = getattr(func, "__name__", None) in _LOOKS
        if looks and isinstance(args[0], Tensor) and args[0].device == self._device:
            raise ValueError(
                "it looks at the value of a tensor (`if`, `.item()`, `.numpy()`, a solver that "
                "watches itself)"
            )
        return func(*args, **(kwargs or {}))


@final
class _Outside(TorchDispatchMode):
    """Finds the tensors that a function reads and has neither been given nor made.

    They are told apart by their memory: nothing that is made inside lies where they do.

    Args:
        known: those that need not be found.

    Attributes:
        found: those tensors.
    """

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._known = set(map(_memory, known)) | {0}  # 0: tensors without entries
        self.found: dict[int, Tensor] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for tensor in _tensors([args, kwargs or {}]):
            if _memory(tensor) not in self._known:
                self.found.setdefault(_memory(tensor), tensor)
        out = func(*args, **(kwargs or {}))
        self._known.update(m for m in map(_memory, _tensors(out)) if m not in self.found)
        return out


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if tensor.layout is torch.strided else 0


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (list, tuple)):
        yield from chain.from_iterable(map(_tensors, tree))
    elif isinstance(tree, dict):
        yield from _tensors(list(tree.values()))


@contextlib.contextmanager
def _no_autocast_cache() -> Iterator[None]:
    """Let autocast convert weights each time: one that it kept would be converted in no replay."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)

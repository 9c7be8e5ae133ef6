"""`lower` and `trace`: a function of tensors as a graph, with all that it reads, and compiled.

`make_fx` follows the function down to the kernels. Tensors that it reads without being given them (a
plain tensor that a module keeps, a teacher's weights) are found in the graph and read live, like the
given ones. Those that lie on another device, or whose values Python has taken, are constants;
`Lowered.stale` says when one was changed.
"""

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from bilevel.compile.cuda_graph import CudaGraph
from bilevel.compile.tracing import traced

if TYPE_CHECKING:
    from torch.fx import GraphModule, Node

_LOOKS = {"item", "tolist", "numpy", "__array__", "__dlpack__"} | {
    f"__{kind}__" for kind in ("bool", "int", "float", "complex", "index")
}


@final
class _Looks(TorchFunctionMode):
    """Notices where a function takes a value out of torch.

    Attributes:
        seen: the constants whose values were taken, which the graph holds from then on.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        from torch.fx.experimental.proxy_tensor import get_proxy_mode, has_proxy_slot

        if getattr(func, "__name__", None) in _LOOKS and isinstance(args[0], Tensor):
            mode = get_proxy_mode()
            if mode is not None and has_proxy_slot(args[0], mode.tracer):
                raise ValueError(
                    "it looks at the value of a tensor (`if`, `.item()`, `.numpy()`, a solver that "
                    "watches itself)"
                )
            self.seen.append(args[0])
        return func(*args, **(kwargs or {}))


@final
@dataclass
class Lowered:
    """A compiled function and the tensors it reads and writes besides its arguments.

    Attributes:
        cuda_graph: whether it is captured as a CUDA graph, on a GPU.
        extra: further tensors that it reads.
        constants: tensors whose values it holds, and the versions these had.
    """

    compiled: Callable[..., Any]
    device: torch.device
    cuda_graph: bool
    live: list[Tensor]
    extra: list[Tensor]
    constants: list[tuple[Tensor, int]]
    aliases: list[Tensor]
    run: Callable[..., Any]

    def stale(self) -> bool:
        """Whether a constant was written to."""
        return is_stale(self.constants)

    def in_place(self, count: int) -> bool:
        """Whether the first `count` live tensors, and those found, lie where they did."""
        now = chain(self.live[:count], self.extra)
        before = chain(self.aliases[:count], self.aliases[len(self.live) :])
        return all(map(Tensor.is_set_to, now, before))

    def follow(self, live: Sequence[Tensor], arguments: Sequence[Tensor]) -> bool:
        """Read and write these tensors from now on, if they are like those before.

        A checkpoint loaded inside the loop brings new momenta; `p.data = ...` moves a variable.
        """
        now = [*live, *self.extra]
        if len(now) != len(self.aliases):
            return False
        if all(map(Tensor.is_set_to, now, self.aliases)):
            return True
        if any(_kind(a) != _kind(b) for a, b in zip(now, self.aliases, strict=True)):
            return False
        self.live = list(live)
        self.bind(arguments)
        return True

    def bind(self, arguments: Sequence[Tensor]) -> None:
        """Take the live tensors as they are now; on a GPU, capture the function with them."""
        # a graph cannot write into leaves
        self.aliases = [tensor.detach() for tensor in (*self.live, *self.extra)]
        self.run = self.compiled
        if self.device.type == "cuda" and self.cuda_graph:
            with unchanged(self.aliases), torch.no_grad():
                self.run = CudaGraph(self.compiled, arguments, self.aliases)


def lower(
    function: Callable[..., list[Tensor]],
    arguments: Sequence[Tensor],
    live: Sequence[Tensor],
    device: torch.device,
    *,
    cuda_graph: bool,
) -> Lowered:
    """`function(*arguments)`, which reads and writes the live tensors, as one compiled graph.

    Args:
        function: what is compiled; traced once.
        arguments: tensors as it will be called with.
        live: the tensors that it reads and writes besides.
        device: where the graph runs.
        cuda_graph: whether to capture it as a CUDA graph, on a GPU.

    Raises:
        ValueError: if it draws random numbers or takes values out of torch.
    """
    with unchanged(live):
        traced_step = trace(function, arguments, device, live)
    extra = traced_step.extra
    lowered = Lowered(
        compiled=traced_step.graph,
        device=device,
        cuda_graph=cuda_graph,
        live=list(live),
        extra=extra,
        constants=traced_step.constants,
        aliases=[t.detach() for t in (*live, *extra)],
        run=traced_step.graph,
    )
    with unchanged(lowered.aliases), torch.no_grad():
        inputs: list[Any] = [*map(on_its_own, arguments), *lowered.aliases]
        lowered.compiled = compiled(traced_step.graph, inputs)
        lowered.compiled(*inputs)
    lowered.bind(arguments)
    return lowered


@final
@dataclass(frozen=True)
class Traced:
    """A function of tensors as a graph.

    Attributes:
        graph: takes the arguments, the live tensors, and `extra`.
        extra: further tensors that it reads.
        constants: tensors whose values it holds, and the versions these had.
    """

    graph: "GraphModule"
    extra: list[Tensor]
    constants: list[tuple[Tensor, int]]


def trace(
    function: Callable[..., list[Tensor]],
    arguments: Sequence[Tensor],
    device: torch.device,
    live: Sequence[Tensor] = (),
) -> Traced:
    """Follow `function(*arguments, *live)` down to the kernels.

    Raises:
        ValueError: if it draws random numbers or takes values out of torch.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    looks = _Looks()
    with traced(), _one_fake_mode(), looks:
        graph = make_fx(function, _norms())(*map(on_its_own, arguments), *live)
    _refuse_random(graph)
    extra, constants = _constants(graph, device)
    constants += looks.seen
    held = [(c, c._version) for c in constants if not c.is_inference()]
    return Traced(graph, extra, held)


def compiled(graph: "GraphModule", inputs: Sequence[Any]) -> Callable[..., Any]:
    """The graph through the compiler; call both under `torch.no_grad()`."""
    # imported here: it takes four seconds and only compiling needs it
    import torch._inductor
    from torch.fx import GraphModule

    graph = GraphModule(graph, copy.deepcopy(graph.graph))  # the compiler writes into what it gets
    for node in graph.graph.find_nodes(op="placeholder"):
        node.meta.pop("val", None)  # or it is taken for all inputs, and not all have one
    on_processor = all(tensor.device.type == "cpu" for tensor in inputs)
    # the shapes are compared before each call
    options = {"size_asserts": False, "cpp_wrapper": on_processor and _many_kernels(graph)}
    run: Callable[..., Any] = torch._inductor.compile(graph, list(inputs), options)
    return run


_CALLS = [["mm"], ["addmm"], ["bmm"], ["baddbmm"], ["mv"], ["addmv"], ["convolution"]]
_MANY = 6


def _many_kernels(graph: "GraphModule") -> bool:
    """Whether a graph is quicker to compile with its wrapper in C++, all kernels in one file.

    That file takes the compiler as long as three files of a kernel each. What is fused into a kernel
    ends where a matrix product is called. Factorisations have no interface in C++.
    """
    targets = [str(node.target) for node in graph.graph.nodes]
    if any("linalg_" in target or "cholesky" in target for target in targets):
        return False
    return sum(target.split(".")[1:2] in _CALLS for target in targets) >= _MANY


def direct(
    run: Callable[..., Any], graph: "GraphModule", inputs: Sequence[Tensor]
) -> Callable[..., Any]:
    """A compiled graph that writes nothing, without what torch wraps around it.

    The wrapper deals with inputs that are written and with answers that autograd sees; there are none,
    and it takes longer than a small graph. It is left out where the graph's own answers are the same.
    A graph that holds tensors keeps it: the wrapper passes them, and code in C++ reads what it is not
    given.
    """
    if any(node.op == "get_attr" for node in graph.graph.nodes):
        return run
    inner: Any = inspect.unwrap(run)
    try:
        ours, theirs = inner(list(inputs)), run(*inputs)
        same = len(ours) == len(theirs) and all(map(_alike, ours, theirs))
    except Exception:  # another kind of wrapper
        same = False
    if not same:
        return run

    def call(*tensors: Tensor) -> Any:
        return inner([*tensors])

    return call


def _alike(a: Tensor, b: Tensor) -> bool:
    kinds = a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype
    return kinds and torch.equal(a.nan_to_num(), b.nan_to_num())


def on_its_own(tensor: Tensor) -> Tensor:
    """A tensor of its own: two arguments that are one tensor now may be two the next time."""
    return tensor.detach().requires_grad_(tensor.requires_grad)


def is_stale(constants: Sequence[tuple[Tensor, int]]) -> bool:
    """Whether a constant was written to."""
    return any(tensor._version != version for tensor, version in constants)


def _norms() -> dict[Any, Callable[..., Any]]:
    """Euclidean norms as roots of sums, which a compiler can fuse; torch's own are calls."""
    aten = torch.ops.aten

    def one(tensor: Tensor, order: Any = 2, dim: Any = None, *rest: Any, **more: Any) -> Any:
        plain = order == 2 and dim is None and not rest and not more and tensor.is_floating_point()
        return tensor.square().sum().sqrt() if plain else NotImplemented

    def each(tensors: list[Tensor], order: Any = 2, dtype: Any = None) -> Any:
        if order != 2 or dtype is not None:
            return NotImplemented
        return [tensor.square().sum().sqrt() for tensor in tensors]

    return {aten.linalg_vector_norm.default: one, aten._foreach_norm.Scalar: each}


@contextlib.contextmanager
def _one_fake_mode() -> Iterator[None]:
    """Let the tracer describe all tensors in one mode; it makes one per tensor, half of its time."""
    from torch._guards import TracingContext, tracing
    from torch._subclasses import FakeTensorMode

    with tracing(TracingContext(FakeTensorMode(allow_fallback_kernels=True))):
        yield


def _constants(graph: "GraphModule", device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors the graph found by itself: those made inputs of it, and those that stay inside."""
    inputs: dict[int, Any] = {}
    tensors: list[Tensor] = []
    kept: list[Tensor] = []
    last = [n for n in graph.graph.nodes if n.op == "placeholder"][-1]
    for node in list(graph.graph.nodes):
        held = getattr(graph, node.target) if node.op == "get_attr" else None
        if not isinstance(held, Tensor):
            continue
        if held.device != device:
            # those made while tracing (`torch.tensor(2.0)`) belong to the graph alone
            if not all("lift_fresh" in str(u.target) for u in node.users):
                kept.append(held)
            continue
        if id(held) not in inputs:
            with graph.graph.inserting_after(last):
                last = inputs[id(held)] = graph.graph.placeholder(f"found_{len(tensors)}")
            tensors.append(held)
        node.replace_all_uses_with(inputs[id(held)])
        graph.graph.erase_node(node)
    graph.recompile()
    return tensors, kept


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


@contextlib.contextmanager
def unchanged(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Undo what happens to the tensors inside: tracing and compiling run the step."""
    before = [tensor.detach().clone() for tensor in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(tensors, before, strict=True):
                tensor.copy_(value)


def _drops(node: "Node") -> bool:
    """Whether an operation draws; attention can, and does not without dropout."""
    schema = node.target._schema  # type: ignore[union-attr]
    places = [i for i, a in enumerate(schema.arguments) if a.name == "dropout_p"]
    return not places or any((*node.args, *[0] * 9)[i] != 0 for i in places) or bool(node.kwargs)


def _refuse_random(graph: "GraphModule") -> None:
    for node in graph.graph.nodes:
        tags = getattr(node.target, "tags", ())
        if torch.Tag.nondeterministic_seeded in tags and _drops(node):
            raise ValueError(
                f"a loss draws random numbers (`{node.target}`; dropout?); draw them in `draw`"
            )

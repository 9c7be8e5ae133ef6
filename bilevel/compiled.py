"""`Compiled`: a training step traced once and run as one compiled graph.

A step of a small model is a hundred kernels of microseconds, each behind tens of microseconds of
Python and autograd. Traced (`make_fx` follows `torch.autograd.grad`, second derivatives included,
down to the kernels) and compiled, the step is a handful of fused loops. On a GPU it is recorded as a
CUDA graph besides.

The graph reads and writes in place what the step reads and writes: variables, buffers and the
optimizers' state. What is decided in Python while tracing is decided for good: the optimizers'
settings other than the learning rate, which modules are in training mode, plain tensors that are
neither parameter nor buffer.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, ParamSpec, TypeVar, cast, final

import optree
import torch
from torch import Tensor
from torch.optim import SGD, Adam, Optimizer

from bilevel.distributed import world_size
from bilevel.recorded import Recorded
from bilevel.state import State
from bilevel.tracing import traced

if TYPE_CHECKING:
    from torch.fx import GraphModule

P = ParamSpec("P")
R = TypeVar("R")


class _Graph(NamedTuple):
    """A compiled graph, the tensors it reads and writes beside its arguments, and its answer."""

    run: Callable[..., Any]
    live: list[Tensor]
    answer: list[Any]
    structure: Any


@final
class Compiled(Generic[P, R]):
    """`step` as compiled graphs, one for each structure and shape of its arguments.

    What cannot be compiled runs as it is, after one warning.

    Args:
        step: reads its arguments and the run's state, writes the state, returns a pytree.
        state: the run's state.
    """

    def __init__(self, step: Callable[P, R], state: State) -> None:
        self._step = step
        self._state = state
        self._optimizers = [o for group in state.optimizers.values() for o in group]
        groups = [group for optimizer in self._optimizers for group in optimizer.param_groups]
        device = state.problem.device  # a CUDA graph would freeze a number that lies elsewhere
        self._rates = [
            (g, torch.tensor(g["lr"], dtype=torch.double, device=device)) for g in groups
        ]
        self._current = [group["lr"] for group in groups]
        self._parameters = list(state.problem.parameters())
        self._graphs: dict[Any, _Graph] = {}
        self._refused = False

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        if self._refused:
            return self._step(*args, **kwargs)
        leaves, structure = _flatten((args, kwargs))
        frozen = tuple(p.requires_grad for p in self._parameters)
        key = (structure, frozen, *(_signature(leaf) for leaf in leaves))
        graph = self._graphs.get(key)
        if graph is None:
            try:
                graph = self._graphs[key] = self._compile(leaves, structure)
            except Exception as error:  # whatever the tracer or the compiler did not like
                self._refused = True
                _warn(error)
                return self._step(*args, **kwargs)
        self._follow_rates()
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        with torch.no_grad():
            new = iter(graph.run(*tensors, *graph.live))
        answer = [next(new) if isinstance(leaf, Tensor) else leaf for leaf in graph.answer]
        return cast(R, optree.tree_unflatten(graph.structure, answer))

    def _follow_rates(self) -> None:
        """Give the graphs the learning rates of the schedules."""
        rates = [group["lr"] for group, _ in self._rates]
        if rates != self._current:
            for (_, tensor), rate in zip(self._rates, rates, strict=True):
                tensor.fill_(rate)
            self._current = rates

    def _compile(self, leaves: list[Any], structure: Any) -> _Graph:
        for optimizer in self._optimizers:
            _begin(optimizer)
        live = [*self._parameters, *self._state.problem.buffers()]
        for optimizer in self._optimizers:
            held = [value for s in optimizer.state.values() for value in s.values()]
            live += [value for value in held if isinstance(value, Tensor)]
        live += [rate for _, rate in self._rates]
        found: dict[str, Any] = {}

        def flat(*tensors: Tensor) -> list[Tensor]:
            given = iter(tensors)
            filled = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            args, kwargs = cast(Any, optree.tree_unflatten(structure, filled))
            found["answer"], found["structure"] = _flatten(self._step(*args, **kwargs))
            return [leaf for leaf in found["answer"] if isinstance(leaf, Tensor)]

        arguments = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)  # torch's own use
            run, aliases = self._lowered(flat, arguments, live)
        return _Graph(run, aliases, found["answer"], found["structure"])

    def _lowered(
        self, flat: Callable[..., list[Tensor]], arguments: list[Tensor], live: list[Tensor]
    ) -> tuple[Callable[..., Any], list[Tensor]]:
        """`flat` traced and compiled, and the tensors it reads and writes beside its arguments."""
        import torch._inductor  # four seconds that nobody waits for who does not compile
        from torch.fx.experimental.proxy_tensor import make_fx

        with _unchanged(live), traced(), self._rates_as_tensors():
            graph = make_fx(flat)(*arguments, *live)
        _refuse_random(graph)
        aliases = [tensor.detach() for tensor in live]  # a graph cannot write into leaves
        with _unchanged(aliases), torch.no_grad():
            # the key of `_graphs` holds the shapes already
            options = {"size_asserts": False}
            run = torch._inductor.compile(graph, [*arguments, *aliases], options)
            run(*arguments, *aliases)
            if self._state.problem.device.type == "cuda" and world_size() == 1:
                run = Recorded(run, arguments, aliases)
        return run, aliases

    @contextlib.contextmanager
    def _rates_as_tensors(self) -> Iterator[None]:
        """Let the graph read the learning rates, so that schedules go on working."""
        before = [group["lr"] for group, _ in self._rates]
        for group, rate in self._rates:
            group["lr"] = rate
        try:
            yield
        finally:
            for (group, _), value in zip(self._rates, before, strict=True):
                group["lr"] = value


def _flatten(tree: Any) -> tuple[list[Any], Any]:
    leaves, structure = optree.tree_flatten(tree, namespace="bilevel")
    return list(leaves), structure


def _signature(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.stride(), leaf.dtype, leaf.device
    return leaf


def _begin(optimizer: Optimizer) -> None:
    """Give every parameter the state that the optimizer would give it at its first step.

    Raises:
        TypeError: for an optimizer whose first step differs from the others.
    """
    vars(optimizer)["_opt_called"] = True  # or schedulers believe that it never steps
    for group in optimizer.param_groups:
        for p in group["params"]:
            state = optimizer.state[p]
            if isinstance(optimizer, SGD):
                if group["momentum"] and group["dampening"]:
                    raise TypeError("`SGD` with dampening begins with a step of another kind")
                if group["momentum"] and state.get("momentum_buffer") is None:
                    state["momentum_buffer"] = torch.zeros_like(p)
            elif isinstance(optimizer, Adam):  # `AdamW` is one
                names = ["exp_avg", "exp_avg_sq", *["max_exp_avg_sq"] * group["amsgrad"]]
                count = state.setdefault("step", torch.zeros((), device=p.device))
                state["step"] = count.to(p.device)  # a CUDA graph counts on the device
                for name in names:
                    state.setdefault(name, torch.zeros_like(p))
            else:
                raise TypeError(
                    f"`{type(optimizer).__name__}` has no twin that a graph could hold; use `Adam`, "
                    "`AdamW` or `SGD`"
                )


@contextlib.contextmanager
def _unchanged(tensors: list[Tensor]) -> Iterator[None]:
    """Undo what happens to the tensors inside: tracing and compiling run the step."""
    before = [tensor.detach().clone() for tensor in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(tensors, before, strict=True):
                tensor.copy_(value)


def _refuse_random(graph: "GraphModule") -> None:
    for node in graph.graph.nodes:
        tags = getattr(node.target, "tags", ())
        if torch.Tag.nondeterministic_seeded in tags:
            raise ValueError(
                f"a loss draws random numbers (`{node.target}`; dropout?); draw them in `draw`"
            )


def _warn(error: Exception) -> None:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    if "tracing tensor" in reason:  # torch's words for it are about its own insides
        reason = "it looks at the value of a tensor (`if`, `.item()`, a solver that watches itself)"
    warnings.warn(
        f"the step is not compiled and runs as without `compile`: {reason}",
        RuntimeWarning,
        stacklevel=4,
    )

"""`CompiledStep`: a training step traced once and run as one compiled graph.

A step of a small model runs about a hundred kernels. Each takes microseconds, and costs tens of
microseconds of Python and autograd. Traced (`make_fx` follows `torch.autograd.grad`, second
derivatives included, down to the kernels) and compiled, the step is a handful of fused loops. On a GPU
it is also captured as a CUDA graph.

The graph reads and writes in place what the step reads and writes: variables, buffers, the
optimizers' state and their moving numbers (`settings`). What Python decides while tracing holds for the
whole graph, so it is compared before every run (`guards`): this tells which graph fits, if one does.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Generic, NamedTuple, ParamSpec, TypeVar, cast, final

import optree
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim import optimizer as hooks

from bilevel.compile.capturable import Capturable
from bilevel.compile.cuda_graph import Capture
from bilevel.compile.guards import Guard, reading
from bilevel.compile.lowering import Lowered, lower
from bilevel.compile.recorded import Recording, recorded
from bilevel.compile.settings import Settings, as_before
from bilevel.compile.tracing import why_not_compiled
from bilevel.compile.trees import constant, flatten, modes, signature

P = ParamSpec("P")
R = TypeVar("R")

_MOST = 8  # graphs of one step; each takes some seconds to compile
_FEW = 4  # graphs for the same tensors; beyond that, something changes in every step
_TWO = 2  # graphs that differ by a float in the batch, which seldom has few values


@final
class _Key(NamedTuple):
    """What tells one graph from another before Python's values are looked at."""

    structure: Any
    tensors: tuple[Any, ...]
    others: tuple[Any, ...]
    settings: Any
    modes: tuple[Any, ...]


@final
@dataclass(eq=False)
class _Graph:
    """A compiled graph, what it takes for granted, and its answer.

    Attributes:
        named: how many of its tensors are parameters and buffers, which the guard knows.
        held: which objects the optimizers kept when it was last bound to the tensors.
        memory: where the tensors lie that it writes: an argument must not lie there.
    """

    key: _Key
    guard: Guard
    lowered: Lowered | Recording
    named: int
    held: list[int]
    memory: frozenset[int]
    answer: list[Any]
    structure: Any


@final
class CompiledStep(Generic[P, R]):
    """`step` as compiled graphs, one for each set of decisions that Python takes in it.

    What cannot be compiled runs as it is, after one warning.

    Args:
        step: reads its arguments, the module and the optimizers, writes the latter two, returns a
            pytree.
        traced: the same in operations that a graph can hold (`optimizer.step` is none).
        module: whose parameters and buffers the step reads and writes, all on one device.
        optimizers: those whose state it reads and writes.
        cuda_graph: whether to capture it as a CUDA graph, on a GPU; a graph holds no exchange
            between processes.
        said: the warnings given so far; none is given twice.
        capture: records the step as torch runs it, without a tracer and a compiler.
    """

    def __init__(
        self,
        step: Callable[P, R],
        traced: Callable[P, R],
        module: nn.Module,
        optimizers: Sequence[Optimizer],
        *,
        cuda_graph: bool,
        said: set[str],
        capture: Capture | None = None,
    ) -> None:
        self._step = step
        self._traced = traced
        self._module = module
        self._device = next(module.parameters()).device
        self._optimizers = optimizers
        self._cuda_graph = cuda_graph
        self._capture = capture
        form = Settings if capture is None else Capturable
        self._settings: Settings | Capturable = form(optimizers, self._device)
        self._graphs: list[_Graph] = []
        self._said = said
        self._refused = self._full = False

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        graph = None
        if not self._refused:
            try:
                leaves, structure = flatten((args, kwargs))
                graph = self._graph(leaves, structure)
            except Exception as error:  # any failure of the tracer or the compiler
                self._refused = True
                self._warn(error)
        if graph is None:
            return self._step(*args, **kwargs)
        tensors = [
            t.clone() if t.untyped_storage().data_ptr() in graph.memory else t
            for t in leaves
            if isinstance(t, Tensor)
        ]
        with torch.no_grad():
            new = iter(graph.lowered.run(*tensors, *graph.lowered.aliases))
        answer = [next(new) if isinstance(leaf, Tensor) else leaf for leaf in graph.answer]
        return cast(R, optree.tree_unflatten(graph.structure, answer))

    def _graph(self, leaves: list[Any], structure: Any) -> _Graph | None:
        """The graph for these arguments as things are; `None` if there are too many."""
        for optimizer in self._optimizers:
            _refuse_hooks(optimizer)
        self._settings.follow()
        key = self._key(leaves, structure)
        like = [graph for graph in self._graphs if graph.key == key]
        for graph in reversed(like):
            if graph.guard.holds() and not graph.lowered.stale():
                return self._bound(graph, leaves)
        same = [g for g in self._graphs if g.key[:2] == key[:2]]
        few = _TWO if not like and _new_float(key, same) else _FEW
        if len(self._graphs) >= _MOST or len(same) >= few:
            if not self._full:
                self._warn(ValueError(_too_many(key, like, same, len(self._graphs))))
            self._full = True
            return None
        return self._compile(key, leaves)

    def _key(self, leaves: list[Any], structure: Any) -> _Key:
        return _Key(
            structure,
            tuple(signature(leaf) for leaf in leaves if isinstance(leaf, Tensor)),
            tuple(constant(leaf) for leaf in leaves if not isinstance(leaf, Tensor)),
            self._settings.fixed(),
            modes(self._device.type),
        )

    def _bound(self, graph: _Graph, leaves: list[Any]) -> _Graph:
        """The graph, reading and writing the tensors as they are now."""
        if graph.held == self._held() and graph.lowered.in_place(graph.named):
            return graph
        arguments = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        self._settings.begin()
        if not graph.lowered.follow(self._live(), arguments):
            self._graphs.remove(graph)
            return self._compile(graph.key, leaves)
        graph.held, graph.memory = self._held(), _memory(graph.lowered)
        return graph

    def _named(self) -> list[Tensor]:
        return [*self._module.parameters(), *self._module.buffers()]

    def _held(self) -> list[int]:
        """What the optimizers keep, by identity: quicker to look at than the tensors."""
        states = [s for optimizer in self._optimizers for s in optimizer.state.values()]
        return [*map(id, chain.from_iterable([s.values() for s in states]))]

    def _live(self) -> list[Tensor]:
        """The tensors that a step reads and writes besides its arguments."""
        live = self._named()
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                for p in group["params"]:
                    held = optimizer.state.get(p, {})
                    live += [held[n] for n in _STATE if isinstance(held.get(n), Tensor)]
        return live + self._settings.tensors

    def _compile(self, key: _Key, leaves: list[Any]) -> _Graph:
        found: dict[str, Any] = {}

        def flat(*tensors: Tensor) -> list[Tensor]:
            given = iter(tensors)
            filled = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            args, kwargs = cast(Any, optree.tree_unflatten(key.structure, filled))
            found["answer"], found["structure"] = flatten(self._traced(*args, **kwargs))
            return [leaf for leaf in found["answer"] if isinstance(leaf, Tensor)]

        arguments = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)  # torch's own use
            with as_before(self._optimizers):  # if this fails
                self._settings.begin()
                with reading() as reads, self._settings.as_tensors():
                    lowered = self._lowered(flat, arguments)
        guard = Guard(self._module)
        guard.add(reads)
        memory = _memory(lowered)
        named, answer, answered = len(self._named()), found["answer"], found["structure"]
        graph = _Graph(key, guard, lowered, named, self._held(), memory, answer, answered)
        self._graphs.append(graph)
        return graph

    def _lowered(
        self, flat: Callable[..., list[Tensor]], arguments: list[Tensor]
    ) -> Lowered | Recording:
        live, device = self._live(), self._device
        if self._capture is None:
            return lower(flat, arguments, live, device, cuda_graph=self._cuda_graph)
        return recorded(flat, arguments, live, device, capture=self._capture)

    def _warn(self, error: Exception) -> None:
        made = "compiled" if self._capture is None else "recorded"
        words = f"the step is not {made} and runs as without `compile`: {why_not_compiled(error)}"
        if words not in self._said:
            self._said.add(words)
            warnings.warn(words, RuntimeWarning, stacklevel=5)


# what SGD and Adam keep of a parameter, in the order in which a graph takes it
_STATE = ("step", "momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")


def _memory(lowered: Lowered | Recording) -> frozenset[int]:
    return frozenset(t.untyped_storage().data_ptr() for t in lowered.aliases)


def _refuse_hooks(optimizer: Optimizer) -> None:
    """Refuse step hooks: a graph does what `optimizer.step` does, but calls no hooks."""
    before, after = optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks
    if before or after or hooks._global_optimizer_pre_hooks or hooks._global_optimizer_post_hooks:
        raise ValueError(
            f"`{type(optimizer).__name__}` has step hooks, which a graph does not call"
        )


def _new_float(key: _Key, graphs: list[_Graph]) -> bool:
    """Whether the batch holds a float that it held in none of the graphs."""
    seen = {constant for graph in graphs for constant in graph.key.others}
    return any(c not in seen and isinstance(c[1], float) for c in key.others)


def _too_many(key: _Key, like: list[_Graph], same: list[_Graph], count: int) -> str:
    """Why there is no further graph."""
    if like:
        what = f"{like[-1].guard.changed()} has changed"
        advice = "make what changes in every step a buffer (`register_buffer`) or part of the batch"
    elif same and same[-1].key.others != key.others:
        pairs = zip(same[-1].key.others, key.others, strict=True)
        (_, old), (_, new) = next((a, b) for a, b in pairs if a != b)
        what = f"the batch holds a constant that changes ({old!r}, {new!r})"
        advice = "make it a tensor, `torch.tensor(...)`"
    else:
        what = "structure, shapes or settings have changed"
        advice = "pad the batches to few shapes"
    return f"there are {count} graphs of it and {what}; {advice}"

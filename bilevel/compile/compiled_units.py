"""`CompiledUnits`: a solver's units, each traced once for what it depends on, and compiled.

What Python decides while a unit is traced holds for its graph: structure, shapes, dtypes and constants
of the arguments tell one graph from another, and what was read of modules, their modes, flags and
hooks, and torch's global settings are compared before every hypergradient (`guards`).
"""

import contextlib
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn

from bilevel.compile.cuda_graph import Capture
from bilevel.compile.graphs import Graphs, Unit
from bilevel.compile.guards import Guard, reading
from bilevel.compile.lowering import Traced, compiled, direct, trace
from bilevel.compile.prepared import (
    Prepared,
    all_tensors,
    filled_with,
    hollow,
    tensors_in,
    trees_with,
)
from bilevel.compile.split import split
from bilevel.compile.tracing import why_not_compiled
from bilevel.compile.trees import flatten, kinds, laid_out, modes, signature
from bilevel.compile.units import EagerStage, Rest, Stage, UnitRunner

if TYPE_CHECKING:
    from torch.fx import GraphModule

_MOST = 8  # sets of decisions that graphs are kept for


@final
class CompiledUnits(UnitRunner):
    """Units as graphs, one for each set of decisions that Python takes in them.

    What cannot be compiled runs as it is, after one warning.

    Args:
        module: whose parameters, buffers and attributes the units read.
        capture: records the traced units as CUDA graphs, without a compiler.
    """

    compiled = True

    def __init__(
        self, module: nn.Module, capture: Capture | None = None, said: set[str] | None = None
    ) -> None:
        self.module = module
        self._capture = capture
        self._context: Callable[[], AbstractContextManager[Any]] = nullcontext
        self._said = set() if said is None else said
        self._kept: list[Graphs] = []
        self._worked = self._broken = False  # the compiler, if it has been tried
        self._device = next(module.parameters()).device
        self._graphs = Graphs(None, Guard(module))

    def begin(self) -> None:
        """Find the graphs that fit things as they are now; to be called before a hypergradient."""
        if self._broken:
            self._graphs = Graphs(None, self._graphs.guard, full=True)
            return
        self._device = next(self.module.parameters()).device
        now = modes(self._device.type)
        for graphs in reversed(self._kept):
            if graphs.modes == now and graphs.holds():
                self._graphs = graphs
                return
        if len(self._kept) >= _MOST:
            changed = self._kept[-1].guard.changed()
            self.warn(
                ValueError(
                    f"there are {_MOST} graphs of it and {changed} has changed; make what changes in "
                    "every step a buffer (`register_buffer`) or part of the batch"
                )
            )
            self._graphs = Graphs(now, self._kept[-1].guard, full=True)
            return
        self._graphs = Graphs(now, Guard(self.module))
        self._kept.append(self._graphs)

    def settle(self) -> None:
        """A hypergradient has been computed; to be called after it."""
        self._graphs.settled = not self._graphs.full and None not in self._graphs.units.values()

    def end(self) -> None:
        """Let the batches go; to be called at the end, whatever happened."""
        self._context = nullcontext

    def prepared(
        self, context: Callable[[], AbstractContextManager[Any]]
    ) -> AbstractContextManager[Any]:
        self._context = context
        return nullcontext() if self._graphs.settled else context()

    def once(self, key: Hashable, function: Callable[[], Any], given: Any = None) -> Any:
        graphs = self._graphs
        if not graphs.whole:  # what a unit that runs as it is depends on is not compared
            return function()
        try:
            full = key, None if given is None else given.kinds()
            if full not in graphs.facts:
                graphs.facts[full] = function()
            return graphs.facts[full]
        except TypeError:  # no graph can hold what is given
            return function()

    def call(self, key: Hashable, function: Callable[..., Any], *arguments: Any) -> Any:
        given: list[Prepared] = [*arguments]
        unit = self._unit(key, given, partial(self._whole, key, function))
        if unit is None:
            with self._context():
                return function(*(part.tree for part in given))
        return unit.answered(given)

    def attempt(self, key: Hashable, function: Callable[..., Any], *arguments: Any) -> Any:
        graphs, make = self._graphs, partial(self._whole, key, function)
        if graphs.full or self._broken:
            return None
        try:
            unit = graphs.unit(graphs.attempts, key, arguments, make)
        except Exception as error:  # any failure of the tracer or the compiler
            if self._broken:  # the other way would fail, too
                self.warn(error)
            return None
        return None if unit is None else unit.answered(arguments)

    def ready(self, tree: Any) -> Any:
        return Prepared(tree)

    def stage(
        self,
        key: Hashable,
        function: Callable[..., tuple[Any, Rest]],
        fixed: Sequence[Any],
        like: Sequence[Any],
    ) -> Stage:
        given: list[Prepared] = [*fixed]
        unit = self._unit(key, given, partial(self._halves, key, function, tuple(like)))
        if unit is None:
            self._graphs.settled = False
            with self._context():
                answer = function(*(part.tree for part in given))
            return EagerStage(*answer, self.again(key, function, fixed, like), self._context)
        again = self.again(key, function, given, like)
        return _CompiledStage(self, unit, [t for part in given for t in part.tensors], again)

    def warn(self, error: Exception) -> None:
        """Say once that a unit runs as it is."""
        words = f"the step is not compiled and runs as without `compile`: {why_not_compiled(error)}"
        if words not in self._said:
            self._said.add(words)
            warnings.warn(words, RuntimeWarning, stacklevel=5)

    def _unit(
        self,
        key: Hashable,
        given: Sequence[Prepared],
        make: Callable[[Sequence[Prepared]], Unit],
    ) -> Unit | None:
        """The unit for these arguments, compiled if it is new; `None` if it cannot be."""
        graphs = self._graphs
        if graphs.full or self._broken:
            return None
        try:
            return graphs.unit(graphs.units, key, given, make)
        except Exception as error:  # any failure of the tracer or the compiler
            graphs.whole = False
            self.warn(error)
            return None

    @contextlib.contextmanager
    def _tracing(self, key: Hashable) -> Iterator[None]:
        """Inside, a unit is traced; what it reads, and the functions in its key, is guarded."""
        with reading() as reads, self._context(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)  # torch's own use
            reads.watch(key)
            yield
        self._graphs.guard.add(reads)

    def _traced(self, flat: Callable[..., list[Tensor]], arguments: list[Tensor]) -> Traced:
        found = trace(flat, arguments, self._device)
        self._graphs.constants += found.constants
        self._graphs.extra += [(tensor, signature(tensor)) for tensor in found.extra]
        return found

    @torch.no_grad()
    def _made(self, graph: "GraphModule", inputs: Sequence[Tensor]) -> Callable[..., Any]:
        inputs = [tensor.detach() for tensor in inputs]
        if self._capture is not None:
            return self._capture(graph, inputs, ())
        try:
            run = compiled(graph, inputs)
        except Exception:
            self._broken = not self._worked  # none has worked: do not try unit after unit
            raise
        self._worked = True
        return direct(run, graph, inputs)

    def _whole(
        self, key: Hashable, function: Callable[..., Any], given: Sequence[Prepared]
    ) -> Unit:
        """Compile a unit without a second part."""
        answer: dict[str, Any] = {}

        def flat(*tensors: Tensor) -> list[Tensor]:
            answer["leaves"], answer["structure"] = flatten(function(*trees_with(given, tensors)))
            return tensors_in(answer["leaves"])

        inputs = [t for part in given for t in part.tensors]
        with self._tracing(key):
            found = self._traced(flat, inputs)
        run = self._made(found.graph, [*inputs, *found.extra])
        return Unit(found.extra, hollow(answer["leaves"]), answer["structure"], run)

    def _halves(
        self,
        key: Hashable,
        function: Callable[..., tuple[Any, Rest]],
        like: tuple[Any, ...],
        given: Sequence[Prepared],
    ) -> Unit:
        """Compile a stage."""
        more, moving = flatten(like)
        inputs, others = [t for part in given for t in part.tensors], tensors_in(more)
        answer: dict[str, Any] = {}

        def flat(*tensors: Tensor) -> list[Tensor]:
            early, rest = function(*trees_with(given, tensors))
            late = rest(*filled_with(more, moving, tensors[len(inputs) :]))
            answer["early"], answer["late"] = flatten(early), flatten(late)
            return [*tensors_in(answer["early"][0]), *tensors_in(answer["late"][0])]

        with self._tracing(key):
            found = self._traced(flat, [*inputs, *others])
        moves = [False] * len(inputs) + [True] * len(others) + [False] * len(found.extra)
        parts = split(found.graph, moves, len(tensors_in(answer["early"][0])))
        fixed = [t.detach() for t in (*inputs, *found.extra)]
        before = self._made(parts.before, fixed)
        residuals = parts.residuals(fixed, before(*fixed)[parts.count :])
        after = self._made(parts.after, [*residuals, *others])
        (early, shape), (late, late_shape) = answer["early"], answer["late"]
        return Unit(
            found.extra,
            hollow(early),
            shape,
            before,
            parts,
            after,
            hollow(late),
            late_shape,
            tuple(map(Tensor.stride, others)),
        )

    def compose(
        self,
        unit: Unit,
        residuals: list[Tensor],
        key: Hashable,
        step: Callable[..., Any],
        given: list[Tensor],
    ) -> Callable[..., Any]:
        """`step(rest, *tensors)` with the rest of a stage inside, compiled."""
        assert unit.parts is not None
        after, count = unit.parts.after, len(residuals)

        def flat(*tensors: Tensor) -> list[Tensor]:
            def rest(*moving: Any) -> Any:
                new = after(*tensors[:count], *tensors_in(flatten(moving)[0]))
                return filled_with(unit.late_answer, unit.late_structure, new)

            return list(step(rest, *tensors[count:]))

        with self._tracing(key):
            found = self._traced(flat, [*residuals, *given])
        run = self._made(found.graph, [*residuals, *given, *found.extra])
        return (lambda *tensors: run(*tensors, *found.extra)) if found.extra else run


@final
class _CompiledStage(Stage):
    """A stage whose rest runs as a graph."""

    def __init__(
        self, units: CompiledUnits, unit: Unit, given: list[Tensor], again: Callable[..., Stage]
    ) -> None:
        assert unit.parts is not None
        self._units = units
        self._unit = unit
        self._given = given
        self._again = again
        tensors = given + unit.extra
        with torch.no_grad():
            computed = unit.before(*tensors)
        self._computed = computed[: unit.parts.count]
        self._residuals = unit.parts.residuals(tensors, computed[unit.parts.count :])

    @property
    def early(self) -> Any:
        return filled_with(self._unit.answer, self._unit.structure, self._computed)

    def follow(self) -> Stage:
        unit = self._unit
        last = self._computed[: len(self._computed) - 1]  # without the report
        first = self._given[: len(self._given) - len(last)]
        if unit.steady is None:  # a state may hold numbers that count, or lie in another way
            before = self._given[len(first) :]
            unit.steady = all_tensors(unit.answer) and kinds(before) == kinds(last)
        if not unit.steady:
            return self._again(*self.early[:-1])
        return _CompiledStage(self._units, unit, first + list(last), self._again)

    def __call__(self, *moving: Any) -> Any:
        unit = self._unit
        assert unit.after is not None
        given = tensors_in(flatten(moving)[0])
        with torch.no_grad():
            if tuple(map(Tensor.stride, given)) != unit.strides:  # a graph reads memory as it lies
                given = [laid_out(t, s) for t, s in zip(given, unit.strides, strict=True)]
            new = unit.after(*self._residuals, *given)
        return filled_with(unit.late_answer, unit.late_structure, new)

    def then(self, key: Hashable, step: Callable[..., Any]) -> Callable[..., Any]:
        run: Callable[..., Any] | None = None

        def advance(*tensors: Tensor) -> Any:
            nonlocal run
            if run is None:  # found once: the tensors are of the same kinds at every call
                found = self._composed(key, step, list(tensors))
                run = found or partial(self._as_it_is, step)
            with torch.no_grad():
                return run(*self._residuals, *tensors)

        return advance

    def _as_it_is(self, step: Callable[..., Any], *tensors: Tensor) -> Any:
        return step(self, *tensors[len(self._residuals) :])

    def _composed(
        self, key: Hashable, step: Callable[..., Any], given: list[Tensor]
    ) -> Callable[..., Any] | None:
        try:
            steps, full = self._unit.steps, (key, kinds(given))
            if full not in steps:
                steps[full] = None
                steps[full] = self._units.compose(self._unit, self._residuals, key, step, given)
            return steps[full]
        except Exception as error:  # any failure of the tracer or the compiler
            self._units.warn(error)
            return None

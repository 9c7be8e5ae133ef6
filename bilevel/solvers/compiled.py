"""`Compiled`: a solver whose pieces of work run as compiled graphs."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, final

import torch

from bilevel.arguments import explained_settings
from bilevel.choices import HOWS, How, how_made
from bilevel.compile import CompiledUnits
from bilevel.compile.cuda_graph import Capture, Recorder
from bilevel.losses.slots import Slots
from bilevel.optimizers import Optimizers
from bilevel.oracles import Oracles
from bilevel.problem import Problem, refuse_no_problem
from bilevel.refusals import one_of
from bilevel.solvers.answers import Answer, AtOnce, UnrolledSteps
from bilevel.solvers.base import Solver
from bilevel.solvers.given import given_solver

_MOST = 4  # problems whose graphs a record keeps


@final
@explained_settings
@dataclass(frozen=True)
class Compiled(Solver):
    """A solver, compiled: the same hypergradient, with the time that Python takes taken out.

    Compiled is what a solver repeats: one step of the lower level and its adjoint, one step of the
    linear solver with its Hessian-vector product, one evaluation of the upper loss. The loop over them
    stays in Python, so that the first call takes as long for 10 steps as for 10,000, and linear solvers
    watch themselves as ever.

    A graph holds what Python decided while it was made. Before every call all of that is compared:
    shapes, dtypes and constants of the batches; which variables require grad; the mode of every
    module; the attributes, globals and closures that the losses read; an optimizer's options; torch's
    global settings. If something differs, another graph is made, up to eight. A loss that looks at
    values or draws random numbers runs as it is, with one warning; so does everything where there is
    no C++ compiler.

    Args:
        solver: the solver.
        how: "record" keeps the kernels of each piece as a CUDA graph, "inductor" compiles them; by
            default a CUDA device records and others compile.
        capture: records the pieces, whatever `how` says; for a device without CUDA graphs.

    Attributes:
        said: the warnings given so far; none is given twice.

    Raises:
        TypeError: if it is none.
        ValueError: for another `how`; at the first call, if it is not possible on the device.

    Example:
        >>> from bilevel import ConjugateGradient, Implicit
        >>> Compiled(Implicit(ConjugateGradient(max_steps=20))).solver.linear_solver.max_steps
        20
    """

    solver: Solver
    how: How | None = None
    capture: Capture | None = field(default=None, repr=False, compare=False, kw_only=True)
    said: set[str] = field(default_factory=set, init=False, repr=False, compare=False)
    _units: dict[int, CompiledUnits] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        given_solver("None" if self.solver is None else self.solver)  # there is no usual one
        if self.how is not None:
            one_of("how", self.how, HOWS)
        for asked in ("drops_response", "moves_lower"):
            object.__setattr__(self, asked, getattr(self.solver, asked))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.solver, self.how)  # graphs are neither copied nor saved

    def respond(self, oracles: Oracles, state: Any, lower_optimizer: Optimizers | None) -> Answer:
        return self.solver.respond(oracles, state, lower_optimizer)

    def begin(self, oracles: Oracles) -> Any:
        return self.solver.begin(oracles)

    def at_once(
        self, oracles: Oracles, state: Any, lower_optimizer: Optimizers | None
    ) -> AtOnce | None:
        return self.solver.at_once(oracles, state, lower_optimizer)

    def bound(
        self, problem: Problem, upper_batch: Any, lower_batches: Sequence[Any], seed: int
    ) -> Oracles:
        refuse_no_problem(problem)
        units = self._of(problem)
        units.begin()
        slots = units.once("slots", partial(Slots, problem))
        oracles = Oracles(problem, upper_batch, lower_batches, seed=seed, slots=slots)
        oracles.units = units
        return oracles

    @contextlib.contextmanager
    def context(self, oracles: Oracles) -> Iterator[None]:
        units = self._of(oracles.problem)
        if oracles.units is not units:
            units.begin()
            oracles.units = units
        try:
            with self.solver.context(oracles):
                yield
                units.settle()
        finally:
            units.end()

    def check(self, oracles: Oracles, lower_optimizer: Optimizers | None) -> None:
        self.solver.check(oracles, lower_optimizer)

    def rehearse(self, oracles: Oracles) -> None:
        self.solver.rehearse(oracles)

    def num_lower_batches(self) -> int:
        return self.solver.num_lower_batches()

    def unrolled_steps(self) -> UnrolledSteps | None:
        return self.solver.unrolled_steps()

    def approximates(self) -> bool:
        return self.solver.approximates()

    def _of(self, problem: Problem) -> CompiledUnits:
        """The graphs for a problem; those of the problem used longest ago make room."""
        units = self._units.pop(id(problem), None)
        if units is None or units.module is not problem:
            units = CompiledUnits(problem, said=self.said, capture=self._recorder(problem.device))
        self._units[id(problem)] = units
        if len(self._units) > _MOST:
            del self._units[next(iter(self._units))]
        return units

    def _recorder(self, device: torch.device) -> Capture | None:
        """What records the pieces of work; `None` where they are compiled."""
        if self.capture is not None:
            return self.capture
        return Recorder(device) if how_made(self.how or True, device) == "record" else None

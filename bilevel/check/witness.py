"""`Witness`: a copy of a problem on which the truth is measured, taken before anything moves."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, final

import torch
from torch import Tensor

from bilevel.check.causes import DIRECT, EXACT, EXCHANGED, IN_DOUBLE, SOLVED
from bilevel.check.doubling import Doubled, InDouble, doubled
from bilevel.check.lower_solution import UnsolvedError, solve_closely
from bilevel.check.procedures import Site, replayed, solution, write
from bilevel.errors import HypergradientError
from bilevel.linear import GMRES, ConjugateGradient
from bilevel.oracles import Oracles
from bilevel.refusals import one_of, positive, whole
from bilevel.solvers import Alternating, Implicit, Solver, Unrolled, UnrolledSteps
from bilevel.tree import Tree

_PRODUCTS = 1000  # most of the conjugate gradients of the exact response
FAILS = (
    ValueError,
    TypeError,
    RuntimeError,
    NotImplementedError,
    ArithmeticError,
    AttributeError,
    LookupError,
    HypergradientError,
)


@final
@dataclass(frozen=True)
class Truth:
    """What a hypergradient is compared with, and how closely; named as the arguments of `certify`."""

    against: Literal["procedure", "solution"] | None = None
    lower_steps: int | None = None
    clip_lower: float | None = None
    num_directions: int = 8
    tolerance: float = 0.1
    confidence: float = 0.95

    def __post_init__(self) -> None:
        if self.against is not None:
            one_of("against", self.against, ("procedure", "solution"))
        if self.lower_steps is not None:
            whole("lower_steps", self.lower_steps)
        if self.clip_lower is not None:
            positive("clip_lower", self.clip_lower)
        whole("num_directions", self.num_directions)
        positive("tolerance", self.tolerance)
        positive("confidence", self.confidence)
        if not self.confidence < 1:
            raise ValueError(f"`confidence` must lie between 0 and 1, got {self.confidence}")
        if self.against == "solution" and self.lower_steps is not None:
            raise ValueError(
                "`lower_steps` are replayed, `against='solution'` solves the lower level; give one of "
                "the two"
            )

    def steps(self, solver: Solver, optimizers: Sequence[Any]) -> UnrolledSteps | None:
        """The lower steps whose end is the truth; `None` for the lower solution.

        Raises:
            ValueError: if there are none although they were asked for, or nothing that takes them.
        """
        if self.against == "solution":
            return None
        own = solver.unrolled_steps()
        if self.lower_steps is not None:
            steps = UnrolledSteps(self.lower_steps, None, self.clip_lower)
        elif own is not None:
            steps = own
        elif self.against is None:
            return None
        else:
            raise ValueError(
                f"`{solver}` takes no lower steps of its own; give `lower_steps`, how many of "
                "`lower_optimizer` to replay, or `against='solution'`"
            )
        if steps.optimizer is None and not optimizers:
            raise ValueError(
                "the lower steps are those of `lower_optimizer`, which was not given; give it, or "
                "compare with `against='solution'`"
            )
        return steps


@final
class Witness:
    """A copy of a problem, and ways to ask it.

    Args:
        oracles: the problem with its batches, seed and precision.
        solver: the solver whose hypergradient will be judged.
        optimizers: the running lower optimizers.
        truth: what to compare with.

    Attributes:
        against: what is taken for the truth, in words.
        seconds: spent so far.
    """

    def __init__(
        self,
        oracles: Oracles,
        solver: Solver,
        optimizers: Sequence[torch.optim.Optimizer],
        truth: Truth,
    ) -> None:
        begun = time.perf_counter()
        self.solver = solver
        self.truth = truth
        self.steps = truth.steps(solver, optimizers)
        self._seed = oracles.seed
        kinds = {v.dtype for v in (*oracles.upper.values(), *oracles.lower.values())}
        kinds |= {oracles.precision} if oracles.precision is not None else set()
        rounded = sorted(kinds - {torch.float64}, key=lambda kind: -torch.finfo(kind).eps)
        self.rounded = str(rounded[0]).removeprefix("torch.") if rounded else None
        given = oracles.problem, oracles.upper_batch, oracles.lower_batches
        self._moved = list(optimizers) if self.steps and self.steps.optimizer is None else []
        self._given = given[1:]
        self._copy = doubled(*given, self._moved)
        self.seconds = time.perf_counter() - begun

    @property
    def against(self) -> str:
        """What is taken for the truth."""
        if self.steps is None:
            return "the lower solution"
        whose = "its own" if self.truth.lower_steps is None else "the lower optimizer's"
        return f"a replay of {whose} {self.steps.num_steps} lower steps"

    @contextlib.contextmanager
    def opened(self) -> Iterator["Stand"]:
        """The copy, ready to be asked; in its own type if float64 does not work.

        Raises:
            UnsolvedError: if the lower level is to be solved and cannot be.
        """
        with self._arithmetic():
            stand = self._stand()
            if stand is not None:
                yield stand
                return
        with torch.enable_grad():
            yield Stand(self._narrowed(), self.solver, self.steps, self._seed)

    @contextlib.contextmanager
    def _arithmetic(self) -> Iterator[None]:
        mixed = InDouble(self._copy.drawn) if self._copy.mixed else contextlib.nullcontext()
        with mixed, torch.enable_grad():
            yield

    def _stand(self) -> "Stand | None":
        """The copy in float64; `None` where its code cannot be run so."""
        try:
            return Stand(self._copy, self.solver, self.steps, self._seed)
        except UnsolvedError:
            raise
        except (RuntimeError, TypeError):
            if self.rounded is None:
                raise
            return None

    def _narrowed(self) -> Doubled:
        """The copy in the original's types."""
        copy = self._copy
        copy.convert(copy.types)
        upper_batch, lower_batches = self._given
        return replace(
            copy, upper_batch=upper_batch, lower_batches=list(lower_batches), mixed=False
        )


@final
class Stand:
    """A copied problem at the point where a hypergradient was taken, and at its lower answer.

    Args:
        copy: the copy.
        solver: the solver.
        steps: the lower steps of the truth, `None` for the lower solution.
        seed: of what the losses draw.

    Attributes:
        site: F at the lower level's answer, as a function of the upper variables.
        error: about how far that answer is off.
        precision: the type of the copy.
    """

    def __init__(
        self, copy: Doubled, solver: Solver, steps: UnrolledSteps | None, seed: int
    ) -> None:
        self._copy = copy
        self._solver = solver
        self._steps = steps
        self._oracles = self._bound(copy.upper_batch, copy.lower_batches, seed)
        self._seed = seed
        problem = copy.problem
        self._lower = problem.variables("lower")
        self._start = {n: y.detach().clone() for n, y in self._lower.items()}
        self._buffers = {n: b.detach().clone() for n, b in self._oracles.slots.buffers().items()}
        self._found: Tree | None = None
        self.error: Tree = {}
        if steps is None:
            if self._lower:
                self._found, self.error = solve_closely(self._oracles)
                write(self._lower, self._found)
            settle: Callable[[], None] = solution(self._oracles) if self._lower else _nothing
        else:
            settle = replayed(self._oracles, solver, steps, copy.optimizers)
        self._settle = settle
        self.site = Site(self._oracles, solver, settle, self._start)
        kinds = {x.dtype for x in self.site.points.values()}
        kind = max(kinds, key=lambda k: torch.finfo(k).eps)
        self.precision = str(kind).removeprefix("torch.")

    def _bound(self, upper_batch: Any, lower_batches: Sequence[Any], seed: int) -> Oracles:
        return Oracles(self._copy.problem, upper_batch, lower_batches, seed=seed)

    def _back(self, lower: Tree) -> None:
        write(self.site.upper, self.site.points)
        write(self._lower, lower)
        self._oracles.slots.commit(self._buffers)

    def guess(self, name: str) -> Tree | None:
        """Another hypergradient to compare with; `None` where it cannot be had."""
        asked = self._guesses().get(name)
        try:
            return asked() if asked is not None else None
        except FAILS:
            return None
        finally:
            if asked is not None:
                self.site.value({})

    def _guesses(self) -> Mapping[str, Callable[[], Tree]]:
        found, steps = self._found, self._steps
        guesses: dict[str, Callable[[], Tree]] = {
            IN_DOUBLE: lambda: self._answer(self._solver, self._start),
            DIRECT: lambda: self._answer(Alternating(), self._direct_at()),
            EXCHANGED: self._exchanged,
        }
        if steps is not None:
            exact = Unrolled(
                steps.num_steps,
                steps.optimizer,
                mode="recompute",
                max_grad_norm=steps.max_grad_norm,
            )
            guesses[EXACT] = lambda: self._answer(exact, self._start)
        elif found is not None:
            symmetric = not self._copy.problem.gives_lower_condition
            system = ConjugateGradient(max_steps=_PRODUCTS, rtol=1e-9)
            closely = Implicit(system if symmetric else GMRES(max_steps=_PRODUCTS, rtol=1e-9))
            guesses[EXACT] = lambda: self._answer(closely, found)
            guesses[SOLVED] = lambda: self._answer(self._solver, found)
        return guesses

    def _direct_at(self) -> Tree:
        """Where the direct term of the solver's answer is taken."""
        if self._solver.unrolled_steps() is None:
            return self._start
        self.site.value({})
        return {n: y.detach().clone() for n, y in self._lower.items()}

    def _answer(self, solver: Solver, lower: Tree, oracles: Oracles | None = None) -> Tree:
        self._back(lower)
        optimizers = self._copy.optimizers or None
        bound = self._oracles if oracles is None else oracles
        return solver.solve(bound, lower_optimizer=optimizers, throw=False).grad

    def _exchanged(self) -> Tree:
        copy = self._copy
        first, *more = copy.lower_batches
        if first is None and copy.upper_batch is None:
            raise ValueError("there are no batches")
        batches = [copy.upper_batch] * (1 + len(more))
        return self._answer(self._solver, self._start, self._bound(first, batches, self._seed))

    def buffers_matter(self) -> bool:
        """Whether F differs when buffers stay where they are in the lower steps."""
        if self._steps is None or not self._buffers:
            return False
        held = replayed(
            self._oracles, self._solver, self._steps, self._copy.optimizers, carried=False
        )
        self._back(self._start)
        held()
        other = float(self.site.upper_loss().detach())
        apart = abs(other - self.site.center)
        self.site.value({})
        return apart > 1e-9 * max(abs(other), self.site.largest)


def _nothing() -> None:
    """A problem without lower variables has no lower level to answer."""


def vector(tree: Tree, like: Tree) -> Tensor:
    """The parts of a tree in the order of another, as one vector in float64 on the processor."""
    return torch.cat([tree[n].detach().reshape(-1).double().cpu() for n in like])

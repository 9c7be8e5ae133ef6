"""`Scene`: a problem and its solver as an explanation sees them, and copies that may be moved.

The problem itself is only evaluated. Whatever has to move moves on copies: one in float64, on which
everything but rounding is measured, and a fresh one for each rehearsal. Where the losses cannot be
evaluated in float64 (they close over float32 constants), the copy keeps the problem's own precision and
the measurements are as coarse as that.
"""

import contextlib
import copy
import dataclasses
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, final

import torch
from torch import Tensor, nn

from bilevel.check.differences import sizes
from bilevel.check.doubling import InDouble, doubled
from bilevel.check.explaining.lanczos import Spectrum, lanczos
from bilevel.check.lower_solution import UnsolvedError, solve_closely
from bilevel.check.procedures import restored, shift, write
from bilevel.errors import Result
from bilevel.linear import GMRES, ConjugateGradient
from bilevel.linear.base import Operator, in_own_units
from bilevel.moving_average import Detaching
from bilevel.oracles import Oracles
from bilevel.problem import Problem
from bilevel.second_order import second_order_context
from bilevel.solvers import Alternating, Hypergradient, Implicit, Solver
from bilevel.tree import Layout, Tree, norm

_WHO = "explain"
_NOTHING = 1e-4  # of the upper loss, for moving the upper variables by their own size
_STEPS = 200  # of the linear solves that others are compared with
_MEMORY = 2**23  # numbers that GMRES may keep of a large system
_ROUNDS = 4  # of Newton steps
_LBFGS = 2000  # lower variables up to which L-BFGS is tried where Newton steps do not help


@final
@dataclasses.dataclass(frozen=True)
class Rates:
    """How the two levels are going to be moved.

    Attributes:
        upper: optimizers of the upper level, maybe none.
        lower: those of the lower level, maybe none.
        lower_steps: lower steps in a turn.
        num_steps: turns of the run.
    """

    upper: list[torch.optim.Optimizer]
    lower: list[torch.optim.Optimizer]
    lower_steps: int
    num_steps: int


@final
class Scene:
    """What is looked at; measurements that several findings need are made once.

    Args:
        problem: the problem.
        solver: the solver.
        upper_batch: batch of the upper loss.
        lower_batches: batches of the lower loss.
        rates: optimizers and steps.
        precision: what the losses are computed in, as for `train`.
        seed: of directions, Lanczos' start and dropout.

    Attributes:
        given: the solver's answer on the problem itself.
        eager: the solver, or the one that it compiles: it computes the same, and copies need no graphs.
        double: whether the copy is in float64.
        copy: the copy, at the problem's variables.
        lower_optimizers: copies of the lower optimizers that move the copy.
        oracles: of the copy.
        cut: upper variables on whose way autograd is stopped, filled as they are found.
    """

    def __init__(
        self,
        problem: Problem,
        solver: Solver,
        upper_batch: Any,
        lower_batches: Sequence[Any],
        rates: Rates,
        precision: torch.dtype | None,
        seed: int,
    ) -> None:
        self.problem, self.solver, self.rates, self.seed = problem, solver, rates, seed
        self.upper_batch, self.lower_batches = upper_batch, lower_batches
        self.precision = precision
        self.given = self.given_again()
        self.options = options_within(solver)
        self.eager: Solver = self.options.get("solver", solver)
        self.cut: set[str] = set()
        self.double = self._in_double()

    def given_again(self) -> Hypergradient:
        """The solver's answer on the problem itself."""
        lower_optimizer = self.rates.lower or None
        answer = self.solver.hypergradient(
            self.problem,
            self.upper_batch,
            self.lower_batches,
            lower_optimizer=lower_optimizer,
            seed=self.seed,
            throw=False,
        )
        if self.precision is None:
            return answer
        batches = self.upper_batch, self.lower_batches
        oracles = Oracles(self.problem, *batches, seed=self.seed, precision=self.precision)
        return self.solver.solve(oracles, lower_optimizer=lower_optimizer, throw=False)

    def _in_double(self) -> bool:
        """Make the copy, in float64 if the losses can be computed in it."""
        batches = self.upper_batch, self.lower_batches
        made = doubled(self.problem, *batches, self.rates.lower)
        self.copy, self.lower_optimizers = made.problem, made.optimizers
        self.oracles = Oracles(self.copy, made.upper_batch, made.lower_batches, seed=self.seed)
        self._drawn = made.drawn if made.mixed else None
        try:
            self._evaluated()
        except (RuntimeError, ValueError, TypeError):
            if not made.mixed:
                raise
            self.copy, _, self.lower_optimizers = self.copied()
            self.oracles = Oracles(self.copy, *batches, seed=self.seed)
            self._drawn = None
            return False
        return True

    @contextlib.contextmanager
    def precise(self) -> Iterator[None]:
        """The context in which the copy is evaluated: what it meets in less precision is widened."""
        with contextlib.nullcontext() if self._drawn is None else InDouble(self._drawn):
            yield

    def _evaluated(self) -> None:
        """One evaluation of what will be evaluated."""
        upper, lower = self.oracles.upper, self.oracles.lower
        with self.precise():
            evaluation = self.oracles.evaluate("upper", upper, lower)
            self.oracles.gradient(evaluation.loss, upper)
            if lower:
                self.oracles.lower_gradient(upper, lower)

    def copied(
        self,
    ) -> tuple[Problem, list[torch.optim.Optimizer], list[torch.optim.Optimizer]]:
        """A copy of the problem with copies of the optimizers that move it.

        Raises:
            ValueError: if the problem cannot be copied.
        """
        rates = self.rates
        try:
            with Detaching():
                made = copy.deepcopy((self.problem, list(rates.upper), list(rates.lower)))
        except (
            Exception
        ) as error:  # a tensor with a graph, a lock, a file: each says it differently
            said = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(
                f"`explain` works on a copy, but `{type(self.problem).__name__}` cannot be copied "
                f"({said}); keep out of it what `copy.deepcopy` does not take"
            ) from error
        for parameter in made[0].parameters():
            parameter.grad = None
        return made

    # ------------------------------------------------------------------ where it stands

    @contextlib.contextmanager
    def at(self, lower: Tree) -> Iterator[None]:
        """The copy with these lower variables, until the block ends."""
        with restored(list(self.copy.parameters())):
            write(self.copy.variables("lower"), lower)
            yield

    @property
    def rounding(self) -> float:
        """The relative rounding of what is measured on the copy."""
        return _rounding(self.copy)

    @property
    def own_rounding(self) -> float:
        """The relative rounding of the problem itself."""
        own = _rounding(self.problem)
        return own if self.precision is None else max(own, torch.finfo(self.precision).eps)

    @cached_property
    def second_order(self) -> str | None:
        """Why the lower loss cannot be differentiated twice; `None` if it can."""
        try:
            with self.precise(), self.oracles.differentiated_twice(_WHO):
                self.oracles.linearize_lower(self.oracles.upper, self.oracles.lower)
        except (ValueError, RuntimeError) as error:
            return str(error).splitlines()[0].removeprefix(f"`{_WHO}` ")
        return None

    @contextlib.contextmanager
    def twice(self) -> Iterator[None]:
        """The context in which losses are evaluated, the same one for all measurements."""
        with second_order_context(self.copy), self.precise(), torch.enable_grad():
            yield

    # ------------------------------------------------------------------ what is measured once

    @cached_property
    def spectrum(self) -> Spectrum | None:
        """Of the lower Hessian at the current variables; `None` where there is none."""
        if self.second_order is not None:
            return None
        with self.twice():
            linear = self.oracles.linearize_lower(self.oracles.upper, self.oracles.lower)
            rounding = 1e3 * self.rounding
            return lanczos(linear.hessian, linear.gradient, seed=self.seed, rounding=rounding)

    @property
    def convex(self) -> bool:
        """Whether the Hessian is positive definite, as far as was seen."""
        found = self.spectrum
        return found is not None and found.smallest > 1e3 * self.rounding * found.reach

    @cached_property
    def answer(self) -> Hypergradient:
        """The solver's answer on the copy."""
        return self.solved_by(self.eager)

    def solved_by(self, solver: Solver) -> Hypergradient:
        """A solver's answer on the copy, where it stands."""
        optimizers = self.lower_optimizers or None
        with self.precise():
            return solver.solve(self.oracles, lower_optimizer=optimizers, throw=False)

    @cached_property
    def direct(self) -> Tree:
        """The direct term alone."""
        return self.solved_by(Alternating()).grad

    def negligible(self, one: Tree, other: Tree) -> bool:
        """Whether the difference of two hypergradients is nothing beside the upper loss.

        Near an optimum what is left of a hypergradient is rounding, and relative errors mean nothing.
        """
        sized = {n: sizes(x.detach().double().reshape(-1)) for n, x in self.oracles.upper.items()}
        gap = (long_vector(one) - long_vector(other)).norm()
        return float(gap * long_vector(sized).norm()) <= _NOTHING * abs(float(self.given.value))

    def reference(self) -> Hypergradient:
        """The implicit hypergradient where the copy stands, its system solved as well as can be."""
        return self.solved_by(Implicit(_solved))

    @cached_property
    def here(self) -> Hypergradient | None:
        """The reference at the current variables; `None` where there is no Hessian."""
        return None if self.second_order is not None else self.reference()

    @cached_property
    def solution(self) -> Tree | None:
        """The lower minimum nearby, by Newton steps or L-BFGS; `None` where none was found."""
        if self.second_order is not None:
            return None
        variables = self.copy.variables("lower")
        few = sum(y.numel() for y in variables.values()) <= _LBFGS
        if not self.convex and not few:  # a Newton step leads to no minimum, and takes long
            return None
        with restored(list(self.copy.parameters())):
            first, last = self.follow(_ROUNDS)
            found = {n: y.detach().clone() for n, y in variables.items()}
        if last <= max(1e-3 * first, 1e3 * self.rounding) and self.convex:
            return found
        if few:
            with contextlib.suppress(UnsolvedError, RuntimeError), self.precise():
                return solve_closely(self.oracles, 200)[0]
        return None

    def follow(self, rounds: int) -> tuple[float, float]:
        """Move the copy's lower variables by Newton steps, as long as these help.

        Returns:
            The lower residual before and after.
        """
        variables = self.copy.variables("lower")
        first, step = self._newton()
        last = first
        for _ in range(rounds):
            if not step or last == 0:
                break
            kept = {n: y.detach().clone() for n, y in variables.items()}
            shift(variables, {n: -s for n, s in step.items()})
            after, step = self._newton()
            if not after < last:
                write(variables, kept)
                break
            last = after
        return first, last

    def _newton(self) -> tuple[float, Tree]:
        """The lower residual, and the Newton step from here; none if it is not finite."""
        with self.twice():
            linear = self.oracles.linearize_lower(self.oracles.upper, self.oracles.lower)
            step = _solved(linear.hessian, linear.gradient)
        parts = dict(zip(self.oracles.lower, linear.layout.unravel(step), strict=True))
        return float(linear.gradient.norm()), parts if bool(step.isfinite().all()) else {}

    @cached_property
    def there(self) -> Hypergradient | None:
        """The reference at the lower minimum nearby."""
        if self.solution is None:
            return None
        with self.at(self.solution):
            return self.reference()


def _rounding(module: nn.Module) -> float:
    kinds = {p.dtype for p in module.parameters() if p.is_floating_point()}
    return max(torch.finfo(kind).eps for kind in kinds)


def _solved(operator: Operator, rhs: Tensor) -> Tensor:
    """The system solved by conjugate gradients, by GMRES where the operator is not for these."""
    if not bool(rhs.any()):
        return torch.zeros_like(rhs)
    own, unit = in_own_units(rhs)
    most, goal = min(2 * rhs.numel() + 2, _STEPS), max(1e2 * torch.finfo(rhs.dtype).eps, 1e-10)
    first = ConjugateGradient(max_steps=most, rtol=goal).solve(operator, own)
    plain = rhs.dtype in (torch.float64, torch.float32)  # others have no factorisations for GMRES
    if first.result is Result.SUCCESS or not plain:
        return unit * first.value
    most = min(most, 100, max(10, _MEMORY // rhs.numel()))
    second = GMRES(max_steps=most, restart=100, rtol=goal).solve(operator, own)
    residuals = [x.residual for x in (first, second)]
    better = residuals[0] is not None and residuals[1] is not None and residuals[0] < residuals[1]
    return unit * (first if better else second).value


def options_within(record: Any) -> dict[str, Any]:
    """The settings of a frozen record and of the records in it, by name."""
    if not dataclasses.is_dataclass(record) or isinstance(record, type):
        return {}
    found: dict[str, Any] = {}
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        found = {field.name: value, **options_within(value), **found}
    return found


def changed(record: Any, name: str, value: Any) -> Any:
    """The record with one setting changed, in itself or in a record in it."""
    own = [field.name for field in dataclasses.fields(record)]
    if name in own:
        return dataclasses.replace(record, **{name: value})
    inner = {n: getattr(record, n) for n in own if name in options_within(getattr(record, n))}
    return dataclasses.replace(record, **{n: changed(r, name, value) for n, r in inner.items()})


def long_vector(tree: Tree) -> Tensor:
    """The tree as one vector in float64 on the processor."""
    if not tree:
        return torch.zeros(0, dtype=torch.float64)
    return Layout(list(tree.values())).ravel([t.detach().double().cpu() for t in tree.values()])


def apart(a: Tree, b: Tree) -> float:
    """How far two trees of the same names are apart, relative to the second; 0 where both are 0."""
    difference = float(norm([long_vector(a) - long_vector(b)]))
    size = float(norm([long_vector(b)]))
    if difference == 0:
        return 0.0
    return difference / size if size > 0 else float("inf")


def angle(a: Tree, b: Tree) -> float:
    """The cosine of the angle between two trees of the same names, 1 where both are 0."""
    one, other = long_vector(a), long_vector(b)
    sizes = float(one.norm()) * float(other.norm())
    return float(one @ other) / sizes if sizes > 0 else float(bool(one.norm() == other.norm()))

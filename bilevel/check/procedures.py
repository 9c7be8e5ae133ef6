"""What a hypergradient is checked against: the lower level's answer, found without the solver's code.

The problem's own modules are written into and evaluated with gradients on, as a training loop would:
their hooks run, parameters require grad, and code that runs again later meets the same numbers. Only
seeds, batches and copies of buffers are those of `Oracles`.
"""

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Sequence
from typing import final

import torch
from torch import Tensor

from bilevel.autodiff import fill, gradients
from bilevel.check.lower_solution import UnsolvedError, solve_closely
from bilevel.distributed import mean_over_ranks
from bilevel.losses.initial import initial_lower
from bilevel.lower_field import hold
from bilevel.optimizers import Optimizers, listed
from bilevel.oracles import Oracles
from bilevel.solvers import Solver, UnrolledSteps
from bilevel.tree import Tree
from bilevel.twins import transformation_at


@final
class Site:
    """A problem's own modules, into which numbers are written.

    Args:
        oracles: the problem with its batches and its seed.
        solver: the solver to check; losses are evaluated in its context.
        settle: writes the lower level's answer at the current upper variables into the modules.
        unsolved: lower variables from before the lower level was solved.

    Attributes:
        points: the upper variables at the point that is checked.
        center: F there, at the lower level's answer.
        largest: the larger of that and of F before: how large F is where the answer makes it 0.
    """

    def __init__(
        self, oracles: Oracles, solver: Solver, settle: Callable[[], None], unsolved: Tree
    ) -> None:
        self.oracles = oracles
        self.solver = solver
        self._settle = settle
        problem = oracles.problem
        self.lower = problem.variables("lower")
        self.upper = problem.variables("upper")
        self.points = {n: x.detach().clone() for n, x in self.upper.items()}
        self._start = {n: y.detach().clone() for n, y in self.lower.items()}
        self._answer: Tree | None = None
        write(self.lower, unsolved)
        before = self._now()
        self.center = self.value({})
        self.largest = max([abs(f) for f in (before, self.center) if math.isfinite(f)], default=0.0)

    def _own_upper(self) -> Tree:
        return {n: x for n, x in self.upper.items() if n not in self.oracles.shared}

    def upper_loss(self) -> Tensor:
        """F at what the modules hold, with its graph."""
        with self.solver.context(self.oracles), torch.enable_grad():
            return self.oracles.evaluate("upper", self._own_upper(), self.lower).loss

    def value(self, offsets: Tree) -> float:
        """F at the lower level's answer, upper variables moved; NaN where there is no answer.

        Variables of both levels are moved after the lower level has answered: their hypergradient is
        the partial derivative of F.
        """
        own = {n: d for n, d in offsets.items() if n not in self.oracles.shared}
        write(self._own_upper(), self.points)
        shift(self.upper, own)
        if own or self._answer is None:
            write(self.lower, self._start)
            try:
                self._settle()
            except UnsolvedError:
                return math.nan
        else:
            write(self.lower, self._answer)
        if not own and self._answer is None:
            self._answer = {n: y.detach().clone() for n, y in self.lower.items()}
        shift(self.upper, {n: d for n, d in offsets.items() if n not in own})
        return self._now()

    def _now(self) -> float:
        return float(mean_over_ranks([self.upper_loss().detach()])[0])

    def direct_term(self) -> Tree:
        """dF/dx at the answer, the lower variables held."""
        self.value({})
        variables = list(self.upper.values())
        grads = fill(gradients(self.upper_loss(), variables), variables)
        return dict(zip(self.upper, mean_over_ranks(grads), strict=True))

    def unsolved(self, error: Tree) -> float:
        """How much F changes if the lower variables are off by `error`."""
        self.value({})
        shift(self.lower, error)
        return abs(self._now() - self.center)


def write(variables: Tree, values: Tree) -> None:
    """Put numbers into parameters."""
    with torch.no_grad():
        for name, parameter in variables.items():
            parameter.copy_(values[name])


def shift(variables: Tree, offsets: Tree) -> None:
    """Move parameters."""
    with torch.no_grad():
        for name, offset in offsets.items():
            variables[name].add_(offset)


@contextlib.contextmanager
def restored(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Leave parameters and their `.grad` as they were."""
    before = [(p, p.detach().clone(), p.grad) for p in parameters]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value, grad in before:
                parameter.copy_(value)
                parameter.grad = grad


def solution(oracles: Oracles) -> Callable[[], None]:
    """The lower minimum, on the branch of the one that the modules hold."""

    def settle() -> None:
        write(oracles.problem.variables("lower"), solve_closely(oracles, near=True)[0])

    return settle


def procedure(
    oracles: Oracles, solver: Solver, optimizers: Optimizers | None
) -> Callable[[], None]:
    """What the solver attributes to the lower level: its steps in a plain loop, if it takes any."""
    steps = solver.unrolled_steps()
    if steps is not None:
        return _loop(oracles, solver, steps, optimizers)

    def settle() -> None:
        with solver.context(oracles):
            found = solver.respond(oracles, solver.begin(oracles), optimizers)
            answer = found.at(oracles)
        write(oracles.problem.variables("lower"), {n: y.detach() for n, y in answer.items()})

    return settle


def _loop(
    oracles: Oracles, solver: Solver, steps: UnrolledSteps, optimizers: Optimizers | None
) -> Callable[[], None]:
    def settle() -> None:
        begin_turn(oracles)
        step = stepper(oracles, steps, optimizers)
        with solver.context(oracles), torch.enable_grad():
            for t in range(steps.num_steps):
                step(_lower_gradients(oracles, t)[0])

    return settle


def replayed(
    oracles: Oracles,
    solver: Solver,
    steps: UnrolledSteps,
    optimizers: Optimizers | None,
    *,
    carried: bool = True,
) -> Callable[[], None]:
    """Lower steps as a training takes them: buffers advance from step to step.

    Args:
        oracles: the problem, whose modules and buffers are written into.
        solver: losses are evaluated in its context.
        steps: how many, by what, clipped to which norm.
        optimizers: the running optimizers; copies of them step.
        carried: whether buffers advance; otherwise each step begins with those of now.
    """
    start = {n: b.detach().clone() for n, b in oracles.slots.buffers().items()}

    def settle() -> None:
        oracles.slots.commit(start)
        begin_turn(oracles)
        step = stepper(oracles, steps, optimizers)
        with solver.context(oracles), torch.enable_grad():
            for t in range(steps.num_steps):
                grads, buffers = _lower_gradients(oracles, t)
                step(grads)
                if carried:
                    oracles.slots.commit(buffers)

    return settle


def _lower_gradients(oracles: Oracles, t: int) -> tuple[dict[str, Tensor | None], Tree]:
    """The lower gradient in step t, at what the modules hold, and the buffers this left behind."""
    lower = oracles.problem.variables("lower")
    upper = {n: x for n, x in oracles.problem.variables("upper").items() if n not in oracles.shared}
    index = t % len(oracles.lower_batches)  # one for all steps, or one for each
    if oracles.problem.gives_lower_condition or oracles.problem.constrains_lower:
        found, lower_grads = oracles.lower_gradient(upper, lower, index)
        return lower_grads, found.buffers
    evaluation = oracles.evaluate("lower", upper, lower, index)
    grads = gradients(evaluation.loss, list(lower.values()))
    means = iter(mean_over_ranks([g for g in grads if g is not None]))
    filled = {n: None if g is None else next(means) for n, g in zip(lower, grads, strict=True)}
    return filled, evaluation.buffers


def begin_turn(oracles: Oracles) -> None:
    """Put the lower variables where the problem says that a turn begins, if it says so."""
    problem = oracles.problem
    upper = {n: x for n, x in problem.variables("upper").items() if n not in oracles.shared}
    with torch.no_grad():
        made = initial_lower(oracles, upper)
    write({n: y for n, y in problem.variables("lower").items() if n in made}, made)


def stepper(
    oracles: Oracles, steps: UnrolledSteps, optimizers: Optimizers | None
) -> Callable[[dict[str, Tensor | None]], None]:
    """A function that moves the modules' lower variables by one step with given gradients."""
    lower = oracles.problem.variables("lower")
    if steps.optimizer is not None:
        upper = {n: x.detach() for n, x in oracles.problem.variables("upper").items()}
        move = _transformation(lower, transformation_at(steps.optimizer, upper))
    else:
        assert optimizers is not None
        move = _running(list(oracles.problem.parameters()), listed(optimizers))

    def step(grads: dict[str, Tensor | None]) -> None:
        for name, parameter in lower.items():
            grad = grads[name]
            # in the parameter's own memory format, as fused optimizers want it
            parameter.grad = None if grad is None else torch.empty_like(parameter).copy_(grad)
        if steps.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(list(lower.values()), steps.max_grad_norm)
        move()
        hold(oracles)

    return step


def _running(
    parameters: list[torch.nn.Parameter], optimizers: Sequence[torch.optim.Optimizer]
) -> Callable[[], None]:
    """Steps of copies of the optimizers: the same parameters, learned rates among them, own state."""
    for parameter in [
        *parameters,
        *(p for o in optimizers for g in o.param_groups for p in g["params"]),
    ]:
        parameter.grad = None
    copies = [_copied(optimizer, parameters) for optimizer in optimizers]

    def move() -> None:
        for optimizer in copies:
            optimizer.step()

    return move


def _copied(
    optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]
) -> torch.optim.Optimizer:
    held = [value for group in optimizer.param_groups for value in group.values()]
    moved = [p for group in optimizer.param_groups for p in group["params"]]
    kept = [*parameters, *moved, *(v for v in held if isinstance(v, Tensor) and not v.is_leaf)]
    made = copy.deepcopy(optimizer, {id(tensor): tensor for tensor in kept})
    for hooks in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):  # projections
        setattr(made, hooks, getattr(optimizer, hooks))
    return made


def _transformation(lower: Tree, transformation: object) -> Callable[[], None]:
    """Steps of a torchopt transformation, by torchopt's own functions."""
    import torchopt

    state: object = None
    used: list[str] = []

    def move() -> None:
        nonlocal state, used
        first = state is None
        used = [n for n, y in lower.items() if y.grad is not None] if first else used
        points = {n: lower[n].detach().clone() for n in used}
        with torch.no_grad():
            if first:
                state = transformation.init(points)  # type: ignore[attr-defined]
            grads = {n: lower[n].grad for n in used}
            updates, state = transformation.update(  # type: ignore[attr-defined]
                grads, state, params=points, inplace=False
            )
            write(
                {n: lower[n] for n in used}, torchopt.apply_updates(points, updates, inplace=False)
            )

    return move

"""`check_hypergradient`: a solver's answer against finite differences of the whole procedure."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from bilevel.autodiff import fill
from bilevel.linear.base import dense
from bilevel.optimizers import Optimizers
from bilevel.oracles import Oracles
from bilevel.problem import Level, Problem
from bilevel.solvers import Solver, Unrolled
from bilevel.tree import Layout, Tree


@dataclass(frozen=True)
class HypergradientCheck:
    """How a solver's hypergradient compares with the truth.

    Attributes:
        cosine: cosine of the angle between the two (over the directions tried).
        relative_error: |answer - truth| / |truth|.
        noise: relative uncertainty of the finite differences themselves.
        verdict: one sentence.
        passed: whether the relative error is within the tolerance.
        answer: the solver's directional derivatives, shape (directions,).
        truth: those of the procedure, shape (directions,).
    """

    cosine: float
    relative_error: float
    noise: float
    verdict: str
    passed: bool
    answer: Tensor
    truth: Tensor

    def __str__(self) -> str:
        return self.verdict


def check_hypergradient(
    problem: Problem,
    solver: Solver,
    upper_batch: Any = None,
    lower_batches: Sequence[Any] = (None,),
    *,
    against: Literal["procedure", "solution"] | None = None,
    solve_first: bool = True,
    lower_optimizer: Optimizers | None = None,
    num_directions: int = 32,
    tolerance: float = 1e-5,
    seed: int = 0,
) -> HypergradientCheck:
    r"""Compare a solver's hypergradient with finite differences of $x \mapsto F(x, \hat y(x))$.

    The differences are central and of fourth order, along every coordinate if there are at most
    `num_directions`, along random directions otherwise. Use float64; the problem is left as it was.
    Each direction costs four procedures; against the solution each of these solves the lower level
    anew, with dense Newton steps below 1000 lower variables: keep the problem small.

    Args:
        problem: the problem at the point to check.
        solver: the solver to check.
        upper_batch: batch of the upper loss.
        lower_batches: batches of the lower loss.
        against: "procedure" - what the solver itself does, `Unrolled`'s steps from the current lower
            variables (its default); or "solution" - the lower minimum, by `problem.best_response`
            where it has one, by L-BFGS and Newton steps otherwise (default of all others).
        solve_first: with "solution", put the lower variables at the minimum before asking the
            solver, so that its answer is not blamed for a lower level that was not solved.
        lower_optimizer: running lower optimizer for `Unrolled`.
        num_directions: most directions to try.
        tolerance: largest relative error that passes.
        seed: seed of the directions and of dropout.

    Returns:
        Cosine, relative error and a verdict.

    Raises:
        ValueError: if the problem is not in float64.

    Example:
        >>> problem = Problem.from_functions(
        ...     lambda x, y, _: (y["y"] - 3).square().sum(),
        ...     lambda x, y, _: (y["y"] - x["x"].sin()).square().sum(),
        ...     {"x": torch.ones(2).double()}, {"y": torch.zeros(2).double()},
        ... )
        >>> from bilevel import Alternating, Implicit
        >>> check_hypergradient(problem, Implicit()).passed
        True
        >>> check_hypergradient(problem, Alternating()).verdict  # doctest: +ELLIPSIS
        'disagrees: relative error 1.0e+00 (tolerance 1e-05), cosine 0.000; Alternating() drops ...'
    """
    _check_dtype(problem)
    if against is None:
        against = "procedure" if isinstance(solver, Unrolled) else "solution"

    def oracles() -> Oracles:
        return Oracles(problem, upper_batch, lower_batches, seed=seed)

    def settle() -> Tree:
        if against == "solution":
            return solve_lower(oracles())
        made = oracles()
        with solver.context(made):
            return solver.respond(made, None, lower_optimizer).lower

    def procedure(point: Tensor) -> Tensor:
        _write(upper, dict(zip(upper, layout.unravel(point), strict=True)))
        settled, made = settle(), oracles()
        with solver.context(made), torch.no_grad():
            return made.evaluate("upper", made.upper, settled).loss

    upper = problem.variables("upper")
    layout = Layout(list(upper.values()))
    with _restored(problem):
        if against == "solution" and solve_first:
            _write(problem.variables("lower"), solve_lower(oracles()))
        answer = solver.hypergradient(
            problem,
            upper_batch,
            lower_batches,
            lower_optimizer=lower_optimizer,
            seed=seed,
        )
        center = layout.ravel([p.detach() for p in upper.values()])
        directions = _directions(layout.size, num_directions, center, seed)
        fine, coarse = _differences(procedure, center, directions)
    projected = directions @ layout.ravel(list(answer.grad.values()))
    return _judge(solver, projected, fine, coarse, tolerance)


def solve_lower(oracles: Oracles, steps: int = 500) -> Tree:
    """The lower minimum nearest to the current lower variables, to about machine precision.

    In closed form where the problem has one, else L-BFGS, then Newton steps if the level has at most
    1000 variables.
    """
    closed = oracles.problem.best_response(oracles.lower_batches[0])
    if closed is not None:
        return {name: y.detach() for name, y in closed.items()}
    upper = {name: x.detach() for name, x in oracles.upper.items()}
    leaves = {name: y.detach().clone().requires_grad_() for name, y in oracles.lower.items()}
    lbfgs = torch.optim.LBFGS(
        list(leaves.values()),
        max_iter=steps,
        tolerance_grad=1e-13,
        tolerance_change=0.0,
        history_size=50,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        evaluation, grads = oracles.lower_gradient(upper, leaves)
        for name, leaf in leaves.items():
            leaf.grad = grads[name]
        return evaluation.loss.detach()

    with oracles.differentiated_twice("check_hypergradient"):
        lbfgs.step(closure)
        solution = {name: y.detach().requires_grad_() for name, y in leaves.items()}
        for _ in range(4):
            solution = _newton(oracles, upper, solution)
    return {name: y.detach() for name, y in solution.items()}


def _newton(oracles: Oracles, upper: Tree, lower: Tree, most: int = 1000) -> Tree:
    """One Newton step if it makes the gradient smaller; polishes what L-BFGS left."""
    linear = oracles.linearize_lower(upper, lower)
    if linear.layout.size > most:
        return lower
    hessian = dense(linear.hessian, linear.gradient).mT  # the product is with the transpose
    step = torch.linalg.lstsq(hessian, linear.gradient[:, None]).solution[:, 0]
    point = linear.layout.ravel([y.detach() for y in lower.values()]) - step
    moved = [y.detach().requires_grad_() for y in linear.layout.unravel(point)]
    candidate = dict(zip(lower, moved, strict=True))
    _, grads = oracles.lower_gradient(upper, candidate)
    after = linear.layout.ravel(fill(list(grads.values()), moved))
    return candidate if after.norm() < linear.gradient.norm() else lower


def _differences(
    function: Callable[[Tensor], Tensor], center: Tensor, directions: Tensor
) -> tuple[Tensor, Tensor]:
    """Directional derivatives to fourth and to second order."""
    h = torch.finfo(center.dtype).eps ** 0.2 * max(1.0, float(center.abs().max()))
    fine, coarse = [], []
    for d in directions:
        near = function(center + h * d) - function(center - h * d)
        far = function(center + 2 * h * d) - function(center - 2 * h * d)
        fine.append((8 * near - far) / (12 * h))
        coarse.append(near / (2 * h))
    return torch.stack(fine), torch.stack(coarse)


def _directions(size: int, most: int, like: Tensor, seed: int) -> Tensor:
    if size <= most:
        return torch.eye(size).to(like)
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(most, size, generator=generator, dtype=like.dtype).to(like.device)
    return torch.nn.functional.normalize(directions)


def _judge(
    solver: Solver, answer: Tensor, fine: Tensor, coarse: Tensor, tolerance: float
) -> HypergradientCheck:
    tiny = torch.finfo(fine.dtype).tiny
    scale = fine.norm().clamp_min(tiny)
    error = float((answer - fine).norm() / scale)
    noise = float((coarse - fine).norm() / scale) ** 2  # 4th order: about the square of the 2nd's
    cosine = float(torch.dot(answer, fine) / (answer.norm().clamp_min(tiny) * scale))
    numbers = f"relative error {error:.1e} (tolerance {tolerance:.0e}), cosine {cosine:.3f}"
    passed = error <= tolerance
    if passed:
        verdict = f"agrees: {numbers}"
    elif not error < float("inf"):
        verdict = f"disagrees: {numbers}; the hypergradient or the procedure is not finite"
    elif noise > error:
        verdict = f"inconclusive: {numbers}; the procedure is not smooth enough to difference"
    else:
        verdict = f"disagrees: {numbers}; {solver} drops or approximates the "
        verdict += "response term, or another procedure was meant (see `against`)"
    return HypergradientCheck(cosine, error, noise, verdict, passed, answer, fine)


def _write(variables: Tree, values: Tree) -> None:
    with torch.no_grad():
        for name, parameter in variables.items():
            parameter.copy_(values[name])


@contextlib.contextmanager
def _restored(problem: Problem) -> Iterator[None]:
    before = [(p, p.detach().clone()) for p in problem.parameters()]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in before:
                parameter.copy_(value)


def _check_dtype(problem: Problem) -> None:
    levels: tuple[Level, ...] = ("upper", "lower")
    for level in levels:
        for name, p in problem.variables(level).items():
            if p.dtype != torch.float64:
                raise ValueError(
                    f"finite differences need float64, but `{level}.{name}` is {p.dtype}; call "
                    "`problem.double()` and pass batches in float64"
                )

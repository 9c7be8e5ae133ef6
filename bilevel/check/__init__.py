"""`check_hypergradient`: a solver's answer against finite differences of the whole procedure."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from bilevel.arguments import explained
from bilevel.check.certificate import Certificate
from bilevel.check.certifying import certify
from bilevel.check.comparing import compare
from bilevel.check.comparison import Comparison, SolverRow
from bilevel.check.differences import (
    Ladder,
    at_step,
    climb_down,
    directions,
    roughness,
    shares,
    sizes,
)
from bilevel.check.lower_solution import solve_closely, solve_lower
from bilevel.check.procedures import Site, procedure, restored, solution, write
from bilevel.check.verdict import HypergradientCheck, VariableCheck, conclude, judge
from bilevel.errors import HypergradientError, Result
from bilevel.optimizers import Optimizers, optimizers_of
from bilevel.oracles import Oracles
from bilevel.problem import Level, Problem, refuse_no_problem
from bilevel.refusals import SEEDS, flag, one_of, positive, whole
from bilevel.solvers import Hypergradient, Solver
from bilevel.solvers.given import given_solver
from bilevel.tree import Tree

__all__ = [
    "Certificate",
    "Comparison",
    "HypergradientCheck",
    "SolverRow",
    "VariableCheck",
    "certify",
    "check_hypergradient",
    "compare",
    "solve_lower",
]


@explained
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
    step: float | None = None,
) -> HypergradientCheck:
    r"""Compare a solver's hypergradient with finite differences of $x \mapsto F(x, \hat y(x))$.

    Every upper variable is judged by itself, with its own steps, scale and uncertainty. The
    differences are central and extrapolated to fourth order, at steps from a hundredth of a
    variable's size downwards until two of them agree; where they never do, because the procedure has
    kinks everywhere or rounding hides the derivative, the verdict is "inconclusive".

    Use float64; the problem is left as it was. A direction costs four to six procedures where the
    procedure is smooth, about twenty where it is not, and one procedure is one lower solution or one
    run of the unrolled steps: keep the problem small.

    Args:
        problem: the problem at the point to check.
        solver: the solver to check.
        upper_batch: batch of the upper loss.
        lower_batches: batches of the lower loss.
        against: "procedure" - what the solver itself does: for `Unrolled` (its default) the steps of
            the optimizer from the current lower variables, in a plain loop that shares no code with
            the solver and must end at the same upper loss; or "solution" - the lower minimum, by
            `problem.best_response` where it has one, by L-BFGS and Newton steps otherwise (default
            of all others).
        solve_first: with "solution", put the lower variables at the minimum before asking the
            solver, so that its answer is not blamed for a lower level that was not solved.
        lower_optimizer: running lower optimizer for `Unrolled`.
        num_directions: most directions to try: every coordinate if there are so few, random
            directions within the larger variables otherwise, at least one for each variable.
        tolerance: largest relative error that passes.
        seed: seed of the directions and of dropout.
        step: the step to take in every variable, for a procedure that is smooth at a scale you
            know; differences at `step` and at an eighth of it.

    Returns:
        Cosine, relative error and a verdict that names the variable which fails.

    Raises:
        ValueError: if the problem is not in float64, or if its lower level could not be solved.

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
        'disagrees: relative error 1.0e+00 (tolerance 1e-05), cosine 0.000 in `x`; Alternating() ...'
    """
    refuse_no_problem(problem)
    solver = given_solver("None" if solver is None else solver)  # there is no usual one to check
    held = [
        p
        for o in optimizers_of("lower_optimizer", lower_optimizer)
        for g in o.param_groups
        for p in g["params"]
    ]
    flag("solve_first", solve_first)
    seed = whole("seed", seed, *SEEDS)
    _check(problem, against, tolerance, num_directions, step)
    if against is None:
        against = "solution" if solver.unrolled_steps() is None else "procedure"
    oracles = Oracles(problem, upper_batch, lower_batches, seed=seed)
    lower = problem.variables("lower")
    found: Tree | None = None
    error: Tree = {}
    with restored([*problem.parameters(), *held]), torch.enable_grad():
        unsolved = {n: y.detach().clone() for n, y in lower.items()}
        if against == "solution" and lower:
            found, error = solve_closely(oracles)
            if solve_first:
                write(lower, found)
        answer = _answer(
            solver, problem, upper_batch, lower_batches, lower_optimizer=lower_optimizer, seed=seed
        )
        settle = procedure(oracles, solver, lower_optimizer)
        if found is not None:
            write(lower, found)
            settle = solution(oracles)
        site = Site(oracles, solver, settle, unsolved)
        checks, blur = _compare(site, answer, error, num_directions, tolerance, seed, step)
    return conclude(
        checks,
        solver,
        tolerance,
        value=(float(answer.value), site.center) if against == "procedure" else None,
        blur=blur,
        early=found is not None and not solve_first,
    )


def _answer(solver: Solver, *given: Any, **more: Any) -> Hypergradient:
    """The solver's answer; NaN is one that disagrees."""
    try:
        return solver.hypergradient(*given, **more)
    except HypergradientError as error:
        if error.hypergradient.result is not Result.NOT_FINITE:
            raise
        found: Hypergradient = error.hypergradient
        return found


def _compare(
    site: Site,
    answer: Hypergradient,
    error: Tree,
    num_directions: int,
    tolerance: float,
    seed: int,
    step: float | None,
) -> tuple[list[VariableCheck], float]:
    """The check of each variable, and how far F is off by rounding and by an inexact solution."""
    generator = torch.Generator().manual_seed(seed)
    points = {n: x.reshape(-1) for n, x in site.points.items()}
    blur = _blur(site, points, error, generator)
    direct = site.direct_term()
    claimed = answer.stats.linear_residual
    accuracy = max(1e-13, 0.0 if claimed is None else float(claimed))
    given = shares([len(x) for x in points.values()], num_directions)
    checks = []
    for (name, point), count in zip(points.items(), given, strict=True):
        along, lengths = directions(point, count, generator)
        ladders = [
            Ladder(_line(site, name, d), site.center, blur, size)
            for d, size in zip(along, lengths, strict=True)
        ]
        kept = along @ direct[name].reshape(-1)
        if step is None:
            estimates = climb_down(ladders, tolerance, float(kept.norm()))
        else:
            estimates = at_step(ladders, step)
        check = judge(
            name,
            along @ answer.grad[name].reshape(-1),
            estimates,
            kept,
            resolution=max(site.largest, *(rung.largest for rung in ladders)) / max(lengths),
            accuracy=accuracy,
            coordinates=count == len(point),
            tolerance=tolerance,
        )
        checks.append(check)
    return checks, blur


def _line(site: Site, name: str, direction: Tensor) -> Callable[[float], float]:
    shaped = direction.view(site.points[name].shape)
    return lambda t: site.value({name: t * shaped})


def _blur(site: Site, points: Tree, error: Tree, generator: torch.Generator) -> float:
    moves = {
        n: (sizes(x) * torch.randn(len(x), generator=generator, dtype=torch.float64).to(x))
        for n, x in points.items()
    }
    shaped = {n: d.view(site.points[n].shape) for n, d in moves.items()}
    rough = roughness(lambda t: site.value({n: t * d for n, d in shaped.items()}), site.center)
    return rough + site.unsolved(error)


def _check(
    problem: Problem,
    against: str | None,
    tolerance: float,
    num_directions: int,
    step: float | None,
) -> None:
    if against is not None:
        one_of("against", against, ("procedure", "solution"))
    positive("tolerance", tolerance)
    whole("num_directions", num_directions)
    if step is not None:
        positive("step", step)
    levels: tuple[Level, ...] = ("upper", "lower")
    for level in levels:
        for name, p in problem.variables(level).items():
            if p.dtype != torch.float64 and not p.is_complex():  # the oracles refuse complex ones
                raise ValueError(
                    f"finite differences need float64, but `{level}.{name}` is {p.dtype}; call "
                    "`problem.double()` and pass batches in float64"
                )

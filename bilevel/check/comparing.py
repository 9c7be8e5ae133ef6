"""`compare`: solvers on one problem, how far each hypergradient is from the truth and what it costs."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from bilevel.arguments import explained
from bilevel.check.common_truth import CommonTruth, measure_truth
from bilevel.check.comparison import Comparison, SolverRow, short_name
from bilevel.check.costs import Call, measure, seconds_of
from bilevel.check.procedures import restored, write
from bilevel.check.witness import Truth, Witness, vector
from bilevel.errors import Result
from bilevel.losses.purity import examine
from bilevel.optimizers import Optimizers, optimizers_of
from bilevel.oracles import Oracles
from bilevel.problem import Level, Problem, refuse_no_problem
from bilevel.refusals import SEEDS, flag, shown, whole
from bilevel.solvers import Alternating, Hypergradient, Implicit, Solver
from bilevel.solvers.given import given_solver
from bilevel.tree import Tree

Solvers = Sequence[Solver] | Mapping[str, Solver]


@explained
def compare(
    problem: Problem,
    solvers: Solvers,
    upper_batch: Any = None,
    lower_batches: Sequence[Any] = (None,),
    *,
    against: Literal["procedure", "solution"] | None = None,
    lower_steps: int | None = None,
    solve_first: bool = True,
    lower_optimizer: Optimizers | None = None,
    num_directions: int = 32,
    repeats: int = 7,
    seed: int = 0,
) -> Comparison:
    r"""Solvers side by side: how far each hypergradient is from the truth, and what it costs.

    There is one truth for all solvers, measured once, in float64 on a copy of the problem: the
    derivative of the upper loss at the lower level's answer, by finite differences. Up to
    `num_directions` upper variables it is measured in every coordinate; above, along the solvers' own
    hypergradients and along random directions across them, and errors come with an interval.

    Times are medians of calls in turns. Memory is the most that torch holds at a time during one more
    call, beyond what was there before: on a CUDA device by its allocator (whose record of the peak is
    reset), on the processor by torch's profiler, which makes that call several times slower. A solver
    that fails has a row that says why; the others go on. The problem and its optimizers are left as
    they were.

    Args:
        problem: the problem at the point to look at, in any type.
        solvers: a list of solvers, or a mapping of names to them.
        upper_batch: batch of the upper loss.
        lower_batches: batches of the lower loss.
        against: "solution" - the lower solution, by `problem.best_response` where it has one, by
            L-BFGS and Newton steps otherwise (default); "procedure" - the end of `lower_steps` steps
            of `lower_optimizer` from the current lower variables (default with `lower_steps`). Solving
            the lower level of a network takes minutes, replaying some steps takes seconds.
        lower_steps: how many steps to replay.
        solve_first: with "solution", put the lower variables at the solution before asking the
            solvers, so that no answer is blamed for a lower level that was not solved.
        lower_optimizer: running optimizer(s) of the lower level, which `Unrolled` branches from.
        num_directions: random directions; more make the intervals narrower.
        repeats: calls of each solver that are timed.
        seed: seed of the directions and of dropout.

    Returns:
        A row for each solver. Print it, or see its `.plot()` and `.to_frame()`.

    Raises:
        TypeError: if there is no problem, or something is no solver.
        ValueError: if there are no solvers, or a setting is out of range.

    Example:
        >>> from bilevel import Alternating, Implicit
        >>> problem = Problem.from_functions(
        ...     lambda x, y, _: (y["y"] - 3).square().sum(),
        ...     lambda x, y, _: (y["y"] - x["x"].sin()).square().sum(),
        ...     {"x": torch.ones(2)}, {"y": torch.zeros(2)},
        ... )
        >>> found = compare(problem, {"dropped": Alternating(), "exact": Implicit()}, repeats=1)
        >>> found["dropped"].cosine, found["exact"].cosine > 0.9999
        (0.0, True)
    """
    refuse_no_problem(problem)
    named = _named(solvers)
    flag("solve_first", solve_first)
    repeats, seed = whole("repeats", repeats), whole("seed", seed, *SEEDS)
    against = against or ("solution" if lower_steps is None else "procedure")
    truth = Truth(against, lower_steps, num_directions=num_directions)
    optimizers = optimizers_of("lower_optimizer", lower_optimizer)
    oracles = Oracles(problem, upper_batch, lower_batches, seed=seed)
    witness = Witness(oracles, _reference(oracles, against), optimizers, truth)
    held = [p for o in optimizers for g in o.param_groups for p in g["params"]]

    def asking(solver: Solver) -> Call:
        return lambda: solver.hypergradient(
            problem,
            upper_batch,
            lower_batches,
            lower_optimizer=optimizers or None,
            seed=seed,
            throw=False,
        )

    lower = problem.variables("lower")
    found, reason = _solution(witness) if against == "solution" and lower else ({}, "")
    with restored([*problem.parameters(), *held]), _same_draws(problem.device):
        if found and solve_first:
            write(lower, found)
        _look(oracles)
        calls = {name: asking(solver) for name, solver in named.items()}
        rows, answers = _asked(named, calls, repeats, problem.device)
    measured: CommonTruth | None = None
    if not reason and answers:
        measured, reason = _truth(witness, answers, num_directions, seed)
    if measured is not None:
        rows = [_judged(row, measured, answers) for row in rows]
    where = _where(measured, witness, reason, solved=bool(found) and solve_first)
    name: str = problem._get_name()  # type: ignore[no-untyped-call]  # torch's
    return Comparison(tuple(rows), name, where)


def _named(solvers: Any) -> dict[str, Solver]:
    """The solvers by name; names that were not given say what is set.

    Raises:
        TypeError: if they are neither listed nor named, or one is no solver.
        ValueError: if there are none.
    """
    if isinstance(solvers, Mapping):
        for name in solvers:
            if not isinstance(name, str):
                raise TypeError(f"a solver's name must be a string, got {shown(name)}")
        named = {name: given_solver(_thing(solver)) for name, solver in solvers.items()}
    elif isinstance(solvers, Sequence) and not isinstance(solvers, str | bytes):
        named = {}
        for solver in map(given_solver, map(_thing, solvers)):
            name = short_name(solver)
            twice = sum(known.partition(" (")[0] == name for known in named)
            named[f"{name} ({twice + 1})" if twice else name] = solver
    else:
        raise TypeError(
            "`solvers` must be a list of solvers, or a mapping of names to them, such as "
            f"`[Alternating(), Implicit()]`; got {shown(solvers)}"
        )
    if not named:
        raise ValueError("`solvers` is empty; give at least one, such as `[Implicit()]`")
    return named


def _thing(given: Any) -> Any:
    return "None" if given is None else given  # there is no usual one to compare


def _reference(oracles: Oracles, against: str) -> Solver:
    """A solver in whose context the losses of the truth are evaluated."""
    second_order = against == "solution" and oracles.lower
    declared = oracles.problem.stops_lower_gradient is not None
    return Implicit() if second_order and not declared else Alternating()


def _solution(witness: Witness) -> tuple[Tree, str]:
    """The lower solution, or why there is none."""
    try:
        with witness.opened() as stand:
            stand.site.value({})
            return {n: y.detach().clone() for n, y in stand.site.lower.items()}, ""
    except Exception as error:  # whatever the problem's code raises: costs can still be told
        return {}, said(error)


def _truth(
    witness: Witness, answers: Mapping[str, Tensor], num_directions: int, seed: int
) -> tuple[CommonTruth | None, str]:
    """The truth, or why it is not known."""
    try:
        with witness.opened() as stand:
            return measure_truth(stand, answers, num_directions, seed), ""
    except Exception as error:  # as above
        return None, said(error)


def _look(oracles: Oracles) -> None:
    """Examine the losses now, so that it costs no solver its first call."""
    levels: tuple[Level, ...] = ("upper", "lower") if oracles.lower else ("upper",)
    with suppress(Exception), _reference(oracles, "solution").context(oracles):
        examine(oracles, levels, whole=True)  # what is wrong is said by the solvers it concerns


def _where(truth: CommonTruth | None, witness: Witness, reason: str, *, solved: bool) -> str:
    """What the hypergradients are compared with, in words."""
    if truth is None:
        return f"a truth that is not known: {reason or 'no solver gave a hypergradient'}"
    count = len(truth.along) + len(truth.across)
    seen = f"all {count}" if truth.complete else f"{count} of their {truth.basis.shape[1]:,}"
    place = "where solvers are asked" if solved else "asked at the current lower variables"
    return f"{witness.against}, {place}; {seen} directions measured"


def _asked(
    named: Mapping[str, Solver], calls: Mapping[str, Call], repeats: int, device: torch.device
) -> tuple[list[SolverRow], dict[str, Tensor]]:
    """Rows with what calls cost, and the hypergradients that are finite."""
    rows: dict[str, SolverRow] = {}
    answers: dict[str, Tensor] = {}
    for name, call in calls.items():
        row = SolverRow(name, named[name])
        try:
            seconds, answer = seconds_of(call, device)
        except Exception as error:  # of a solver of the user's: the others go on
            rows[name] = replace(row, reason=said(error))
            continue
        grad = vector(answer.grad, answer.grad)
        finite = bool(grad.isfinite().all())
        if finite:
            answers[name] = grad
        reason = _doubt(answer, finite)
        count = answer.stats.num_products
        rows[name] = replace(row, first_seconds=seconds, products=count, reason=reason)
    alive = {n: call for n, call in calls.items() if rows[n].first_seconds is not None}
    costs, failed = measure(alive, repeats, device)
    for name, cost in costs.items():
        rows[name] = replace(rows[name], seconds=cost.seconds, peak_bytes=cost.peak_bytes)
    for name, why in failed.items():
        rows[name] = replace(rows[name], reason=f"called again, it failed: {said(why)}")
        answers.pop(name, None)
    return list(rows.values()), answers


def _doubt(answer: Hypergradient, finite: bool) -> str:
    """What a solver says of its own answer."""
    if answer.result is not Result.SUCCESS:
        return str(answer.result.value)
    return "" if finite else str(Result.NOT_FINITE.value)


def _judged(row: SolverRow, truth: CommonTruth, answers: Mapping[str, Tensor]) -> SolverRow:
    if row.name not in answers:
        return row
    cosine, ratio, error = truth.judge(answers[row.name])
    return replace(
        row,
        cosine=cosine.value,
        cosine_interval=cosine.interval,
        norm_ratio=ratio.value,
        relative_error=error.value,
        relative_error_interval=error.interval,
    )


def said(error: Exception) -> str:
    """What an error says, in one paragraph; the name of its class where it is no sentence of ours."""
    words = " ".join(str(error).split())
    plain = isinstance(error, ValueError | TypeError | RuntimeError) and words
    return words if plain else f"{type(error).__name__}: {words}".rstrip(": ")


@contextmanager
def _same_draws(device: torch.device) -> Iterator[None]:
    """Leave torch's global generators as they were, whatever a solver draws."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        yield

"""Curves: whole trainings by one solver, their error against time and against oracle calls."""

import copy
import math
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import final

import torch

from bilevel.check.comparing import said
from bilevel.check.counting import OracleCalls, Tally, counting
from bilevel.check.problems.case import Case
from bilevel.check.value import Value
from bilevel.loop.step import Step
from bilevel.oracles import Oracles
from bilevel.problem import Problem
from bilevel.solvers import Solver
from bilevel.training import train

LOWER_STEPS = 10  # of a solver that does not move both levels at once
_GROWTH = 1.25  # between two points, in steps
_SOLVED = 1e-10  # a gradient of the value function so much smaller than at the start is rounding
_STEPS = 1_000_000


@final
@dataclass(frozen=True)
class TrainingPoint:
    """Where a training is after some steps.

    Attributes:
        step: upper steps so far.
        seconds: in the training loop so far; of the processor where it does the work, so that a busy
            machine changes them little.
        calls: derivatives of the losses so far.
        samples: the same, each as often as its batch has rows.
        loss: the upper loss at the variables as they are, on the upper level's data.
        value: the upper loss at the lower solution.
        error: the norm of the value function's gradient, over that at the start.
        measures: what else the problem measures.
    """

    step: int
    seconds: float
    calls: int
    samples: int
    loss: float
    value: float | None
    error: float | None
    measures: Mapping[str, float]


@final
@dataclass(frozen=True)
class TrainingCurve:
    """A training.

    Attributes:
        rates: learning rates of the upper and of the lower level.
        points: from before the first step to after the last.
        end: why it ended: "time", "solved", or a sentence.
        calls: of all its steps, by kind.
        remark: what was warned of.
    """

    rates: tuple[float, float]
    points: tuple[TrainingPoint, ...]
    end: str
    calls: OracleCalls
    remark: str = ""

    @property
    def failed(self) -> bool:
        """Whether it ended by an error."""
        return self.end not in ("time", "solved")


@final
class CurveJudge:
    """What trainings on one problem are judged by, and the learning rates they try.

    Args:
        case: the problem.

    Attributes:
        least: the least value that L-BFGS finds on the value function; `None` if there is none.
        reason: why there is no value function; empty if there is.

    Raises:
        ValueError: if neither its value function nor the problem itself says the learning rates.
    """

    def __init__(self, case: Case) -> None:
        self.case = case
        self.least: float | None = None
        self.reason = ""
        self._value: Value | None = None
        rates = case.rates
        if rates is None:
            try:
                value = Value(case)
                _, self._scale = value.at(case.problem)
                of_value, of_lower = value.curvatures()
                self.least, self._value = value.least(), value
            except Exception as error:  # whatever the problem's code raises
                raise ValueError(
                    f"no step sizes are known: {said(error)}. Give the `Case` its `rates`"
                ) from error
            rates = 1 / max(of_value, 1e-12), 1 / of_lower
        else:
            self.reason = "the lower level need not have a minimum"
        self.rates = rates

    def tried(self, solver: Solver) -> list[tuple[float, float]]:
        """The learning rates to try with a solver: 1 / curvature, and smaller ones."""
        upper, lower = self.rates
        return [(upper * of_x, lower * of_y) for of_x, of_y in factors(solver)]

    def look(self, problem: Problem) -> tuple[float, float | None, float | None, dict[str, float]]:
        """Upper loss, value, error and measures at a problem's variables."""
        oracles = Oracles(problem, self.case.upper_batch, self.case.lower_batches)
        with torch.no_grad():
            loss = float(oracles.evaluate("upper", oracles.upper, oracles.lower).loss)
        measures = {} if self.case.measures is None else dict(self.case.measures(problem))
        if self._value is None:
            return loss, None, None, measures
        value, norm = self._value.at(problem)
        return loss, value, norm / self._scale, measures


def factors(solver: Solver) -> list[tuple[float, float]]:
    """What the learning rates of the upper and of the lower level are multiplied with, a run each.

    A solver that moves both may descend a penalised loss, whose curvature is larger than either.
    """
    smaller = [(1.0, 1.0), (0.1, 1.0)]
    return [*smaller, (0.1, 0.1), (0.01, 0.1)] if solver.moves_lower else smaller


def train_curve(
    judge: CurveJudge, solver: Solver, rates: tuple[float, float], seconds: float
) -> TrainingCurve:
    """Train with a solver for some seconds, looking at where it is; what went wrong is in the curve.

    The time counts steps only. Oracle calls are counted in a second run that takes the same steps.

    Args:
        judge: of the problem.
        solver: the solver.
        rates: learning rates of the upper and of the lower level.
        seconds: of training.
    """
    problem = copy.deepcopy(judge.case.problem)
    start = copy.deepcopy(problem.state_dict())
    points = [TrainingPoint(0, 0.0, 0, 0, *judge.look(problem))]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RuntimeWarning)
        try:
            next(_steps(judge.case, problem, solver, rates, 1))  # the losses are examined, once
        except Exception as raised:  # of a solver of the user's: the others go on
            return TrainingCurve(rates, tuple(points), said(raised), OracleCalls())
        problem.load_state_dict(start)
        found, end = _timed(judge, problem, solver, rates, seconds)
        problem.load_state_dict(start)
        with counting(problem) as tally:
            told, calls = _count(judge.case, problem, solver, rates, [*points, *found], tally)
    remark = next((str(w.message) for w in caught if w.category is RuntimeWarning), "")
    remark = remark.partition(". ")[0]  # what is so, not what to do
    return TrainingCurve(rates, tuple(told), end, calls, remark)


def _steps(
    case: Case, problem: Problem, solver: Solver, rates: tuple[float, float], num_steps: int
) -> Iterator[Step]:
    """The training, by gradient descent in both levels."""
    upper, lower = case.upper_batch, case.lower_batches[0]
    return train(
        problem,
        lower,
        upper_data=upper,
        solver=solver,
        lower_steps=0 if solver.moves_lower else LOWER_STEPS,
        upper_optimizer=torch.optim.SGD(problem.upper.parameters(), rates[0]),
        lower_optimizer=torch.optim.SGD(problem.lower.parameters(), rates[1]),
        num_steps=num_steps,
        throw=False,
    )


def _timed(
    judge: CurveJudge, problem: Problem, solver: Solver, rates: tuple[float, float], seconds: float
) -> tuple[list[TrainingPoint], str]:
    """The points of a training, and why it ended."""
    clock = time.process_time if problem.device.type == "cpu" else time.perf_counter
    points: list[TrainingPoint] = []
    steps = _steps(judge.case, problem, solver, rates, _STEPS)
    mark, spent, number = 1, 0.0, 0
    while spent < seconds:
        before = clock()
        try:
            number = next(steps).number
        except Exception as raised:  # it diverged, or the solver failed
            return points, said(raised)
        spent += clock() - before
        if number < mark and spent < seconds:
            continue
        mark = max(number + 1, math.ceil(number * _GROWTH))
        try:
            seen = judge.look(problem)
        except Exception:  # whatever stands in the way of a lower solution there
            return points, f"it went where the lower level cannot be solved, within {number} steps"
        if not all(math.isfinite(x) for x in seen[:3] if x is not None):
            return points, f"it diverged within {number} steps"
        points.append(TrainingPoint(number, spent, 0, 0, *seen))
        if seen[2] is not None and seen[2] < _SOLVED:
            return points, "solved"
    return points, "time"


def _count(
    case: Case,
    problem: Problem,
    solver: Solver,
    rates: tuple[float, float],
    points: Sequence[TrainingPoint],
    tally: Tally,
) -> tuple[list[TrainingPoint], OracleCalls]:
    """The points with the oracle calls up to each."""
    at: dict[int, OracleCalls] = {0: OracleCalls()}
    marks, last = {point.step for point in points}, points[-1].step
    if last:
        for step in _steps(case, problem, solver, rates, last):
            if step.number in marks:
                at[step.number] = tally.calls()
    told = [replace(p, calls=at[p.step].total, samples=at[p.step].samples) for p in points]
    return told, at[last]

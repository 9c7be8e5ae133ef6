"""Solvers side by side: how far each hypergradient is from the true one, and what it costs."""

import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any, final

import torch

from bilevel.check import check_hypergradient
from bilevel.check.cases import Case
from bilevel.errors import HypergradientError
from bilevel.solvers import Solver

_WARM, _CALLS = 3, 15


@final
@dataclass(frozen=True)
class SolverRecord:
    """A solver on a problem from a seed.

    Attributes:
        problem: its name.
        solver: name of the solver.
        method: the solver with all its settings.
        seed: of the problem.
        relative_error: of the hypergradient, at the lower level's solution, against finite differences;
            `None` if there is none.
        cosine: of the angle to the true one.
        milliseconds: of one call, the median of fifteen.
        products: Hessian-vector products or differentiated lower steps of a call.
        verdict: in a sentence, or why there is no answer.
    """

    problem: str
    solver: str
    method: str
    seed: int
    relative_error: float | None
    cosine: float | None
    milliseconds: float | None
    products: int | None
    verdict: str

    def plain(self) -> dict[str, Any]:
        """The record as plain values."""
        return asdict(self)


def measure_solver(case: Case, solver: Solver, problem: str, name: str, seed: int) -> SolverRecord:
    """Check and time one solver.

    Args:
        case: the problem at a point; left as it was.
        solver: the solver.
        problem: what the problem is called in the record.
        name: what the solver is called there.
        seed: of the problem, for the record.
    """
    case = case.ready()
    about = (problem, name, repr(solver), seed)
    try:
        check = check_hypergradient(
            case.problem,
            solver,
            case.upper_batch,
            case.lower_batches,
            against="solution",
            lower_optimizer=case.lower_optimizer,
        )
        seconds, products = _timed(case, solver)
    except (ValueError, TypeError, NotImplementedError, RuntimeError, HypergradientError) as error:
        return SolverRecord(*about, None, None, None, None, f"{type(error).__name__}: {error}")
    return SolverRecord(
        *about, check.relative_error, check.cosine, 1000 * seconds, products, check.verdict
    )


def _timed(case: Case, solver: Solver) -> tuple[float, int]:
    """Seconds of a call, and its products."""
    taken: list[float] = []
    products = 0
    for _ in range(_WARM + _CALLS):
        before = time.perf_counter()
        answer = solver.hypergradient(
            case.problem,
            case.upper_batch,
            case.lower_batches,
            lower_optimizer=case.lower_optimizer,
        )
        for part in answer.grad.values():
            if part.is_cuda:
                torch.cuda.synchronize()
        taken.append(time.perf_counter() - before)
        products = answer.stats.num_products
    return statistics.median(taken[_WARM:]), products

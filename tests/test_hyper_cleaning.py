"""Hyper-cleaning by the benchmark's script, and other libraries as solvers of the comparison."""

import pytest
import torch

from benchmarks.cases.cleaning import ENTRANTS, v_pbgd
from benchmarks.competitors.solvers import higher_5, torchopt_5, torchopt_cg
from benchmarks.hyper_cleaning import clean_only, trained
from bilevel import Cholesky, Implicit, Solver, Unrolled
from bilevel.check.cases import CASES
from bilevel.check.problems.cleaning import cleaning


def test_a_cleaning_says_accuracy_f1_time_and_memory() -> None:
    found = trained(v_pbgd(30), cleaning(0))
    assert found["f1"] > 68  # all items kept are 66.7
    assert found["accuracy"] > 60
    assert found["peak_bytes"] > 10_000
    assert clean_only(cleaning(0))["accuracy"] > 80
    assert len({(e.network, e.name) for e in ENTRANTS}) == len(ENTRANTS)


@pytest.mark.filterwarnings("ignore::FutureWarning:torchopt")
@pytest.mark.parametrize(
    ("rival", "ours"),
    [
        (higher_5, Unrolled(5)),
        (torchopt_5, Unrolled(5)),
        (torchopt_cg, Implicit(Cholesky())),
    ],
    ids=repr,
)
def test_an_adapter_computes_what_our_solver_does(rival: Solver, ours: Solver) -> None:
    case = CASES["quadratic"](0).ready()
    if rival is torchopt_cg:
        best = case.problem.best_response(None)
        assert best is not None
        with torch.no_grad():
            case.problem.get_parameter("lower.y").copy_(best["y"])
    one, other = (
        solver.hypergradient(case.problem, None, [None], lower_optimizer=case.lower_optimizer)
        for solver in (rival, ours)
    )
    assert float((one.grad["x"] - other.grad["x"]).norm() / other.grad["x"].norm()) < 1e-10

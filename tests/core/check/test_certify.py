"""`certify`: mistakes are flagged and named, right answers are not, and nothing moves."""

import math
from typing import Any

import pytest
import torch
import torchopt
from torch import Tensor

from benchmarks.cases.certified import FLAWS, Reweighted, quadratic, rows
from bilevel import (
    Alternating,
    Cholesky,
    ConjugateGradient,
    Hypergradient,
    Identity,
    Implicit,
    Problem,
    Solver,
    Unrolled,
    certify,
)
from bilevel.check.interval import Measured, estimates
from tests.problems import ROWS
from tests.test_contract_solvers import SOLVERS, assert_same, build, snapshot


@pytest.mark.parametrize("name", FLAWS)
def test_a_mistake_is_flagged_and_named(name: str) -> None:
    flaw = FLAWS[name](1)
    certificate = flaw.certificate(seed=1)
    assert certificate.outcome == "suspect", certificate
    assert not certificate.passed
    assert flaw.says in certificate.cause


RIGHT = [
    ("tanh network", "unrolled running adam"),
    ("batch norm, in-place relu, dropout", "recompute running adam"),
    ("spectral norm (old style)", "unrolled torchopt adam"),
    ("attention", "forward running sgd"),
    ("mixed dtypes", "unrolled running sgd"),
]


@pytest.mark.parametrize(("row_name", "solver_name"), RIGHT)
def test_a_right_answer_is_certified_and_nothing_moves(row_name: str, solver_name: str) -> None:
    row, solver = ROWS[row_name], SOLVERS[solver_name][0]
    problem, optimizer = build(row, solver_name, "cpu")
    before = snapshot(problem, optimizer)
    certificate = certify(
        problem, solver, row.upper_batch, [row.lower_batch], lower_optimizer=optimizer, seed=3
    )
    assert certificate.passed, certificate
    assert certificate.relative_error < 1e-3
    assert certificate.precision == "float64"
    assert_same(before, snapshot(problem, optimizer))


def test_against_the_closed_form() -> None:
    """The cosine is that of the whole vectors, though few directions were measured."""
    problem = quadratic(3, size=60)
    right = Implicit(Cholesky()).hypergradient(problem).grad["x"].double()
    for solver in (Implicit(Identity()), Implicit(ConjugateGradient(damping=0.3))):
        found = certify(problem, solver)
        answer = solver.hypergradient(problem).grad["x"].double()
        cosine = float(answer @ right / answer.norm() / right.norm())
        assert math.isclose(found.cosine, cosine, abs_tol=1e-4)
        assert math.isclose(found.norm_ratio, float(answer.norm() / right.norm()), rel_tol=1e-4)
        assert found.num_directions < 20


@pytest.mark.parametrize("dimension", [12, 3000])
def test_the_interval_covers_what_it_says(dimension: int) -> None:
    """With no guess at all, the interval holds the true cosine as often as it says."""
    generator = torch.Generator().manual_seed(dimension)
    held = 0
    for _ in range(400):
        truth = torch.randn(dimension, generator=generator, dtype=torch.float64)
        truth[0] += dimension**0.5
        across = torch.randn(8, dimension, generator=generator, dtype=torch.float64)
        across[:, 0] = 0  # the hypergradient lies along the first axis
        none = torch.zeros(1, dtype=torch.float64)
        seen = Measured(1.0, truth[:1], none, across @ truth, none.expand(8), complete=False)
        cosine, ratio, _ = estimates(seen, confidence=0.9, floor=0.0)
        held += cosine.low <= float(truth[0] / truth.norm()) <= cosine.high
        assert ratio.low <= ratio.value <= ratio.high
    assert 340 <= held <= 380  # 360 of 400, give or take three standard deviations


def test_a_function_that_closes_over_float32_is_computed_in_float64() -> None:
    inputs = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))

    def lower(x: Any, y: Any, _: Any) -> Tensor:
        scale = x["x"].exp().to(torch.float32)
        return (inputs @ y["y"] - 1).square().mean() + (scale * y["y"].square()).sum()

    problem = Problem.from_functions(
        lambda x, y, _: y["y"].float().cosh().sum(),
        lower,
        {"x": torch.zeros(30)},
        {"y": torch.zeros(30)},
    )
    certificate = certify(problem, Unrolled(5, torchopt.sgd(0.1)))
    assert certificate.passed, certificate
    assert certificate.precision == "float64"
    assert certificate.guesses["the same in float64"] < 1e-6


def test_a_longer_run_of_the_lower_optimizer_can_be_the_truth() -> None:
    problem, upper, lower = Reweighted(0), rows(1), rows(2)
    sgd = torch.optim.SGD(problem.lower.parameters(), 0.1)
    ask = {"lower_optimizer": sgd, "lower_steps": 5}
    five = certify(problem, Unrolled(5, torchopt.sgd(0.1)), upper, [lower], **ask)
    one = certify(problem, Unrolled(1, torchopt.sgd(0.1)), upper, [lower], **ask)
    assert five.passed
    assert one.outcome == "suspect"
    assert "the lower optimizer's 5 lower steps" in one.verdict


def test_both_are_zero() -> None:
    problem = Problem.from_functions(
        lambda x, y, _: (y["y"] - x["x"]).square().sum(),
        lambda x, y, _: (y["y"] - x["x"]).cosh().sum(),
        {"x": torch.ones(3)},
        {"y": torch.ones(3)},
    )
    certificate = certify(problem, Implicit())
    assert certificate.passed, certificate
    assert certificate.cosine == 1


def test_not_finite_and_not_solvable() -> None:
    problem = quadratic(0)
    broken = {"x": torch.full((30,), math.nan)}
    assert certify(problem, Implicit(), hypergradient=broken).outcome == "suspect"
    endless = Problem.from_functions(
        lambda x, y, _: y["y"].square().sum(),
        lambda x, y, _: (x["x"] * y["y"]).sum(),
        {"x": torch.ones(2)},
        {"y": torch.ones(2)},
    )
    certificate = certify(endless, Alternating())
    assert certificate.outcome == "inconclusive"
    assert "could not be solved" in certificate.verdict


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({"hypergradient": 3}, TypeError, "tensors by the names"),
        ({"hypergradient": {"x": torch.ones(2)}}, ValueError, "names and shapes"),
        ({"confidence": 1.0}, ValueError, "between 0 and 1"),
        ({"against": "procedure"}, ValueError, "takes no lower steps of its own"),
        ({"lower_steps": 3}, ValueError, "which was not given"),
        ({"lower_steps": 3, "against": "solution"}, ValueError, "give one of the two"),
    ],
)
def test_refusals(settings: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        certify(quadratic(0), Implicit(), **settings)


def test_a_record_can_be_judged_and_says_what_it_is() -> None:
    problem, solver = quadratic(0), Implicit(Cholesky())
    record: Hypergradient = solver.hypergradient(problem)
    certificate = certify(problem, solver, hypergradient=record)
    assert certificate.passed
    assert "Certificate: certified: cosine 1.000" in repr(certificate)
    assert "<table" in certificate._repr_html_()
    assert certificate.numbers()["certificate.cosine"] == certificate.cosine


def test_the_solver_is_the_usual_one() -> None:
    usual: Solver | None = None
    assert "`Alternating` drops" in certify(quadratic(0), usual).cause

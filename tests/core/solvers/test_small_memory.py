"""Solvers without second derivatives that look one step ahead, or at values alone."""

from typing import Any

import pytest
import torch
import torchopt
from torch import Tensor

from bilevel import (
    DARTS,
    PZOBO,
    SAMA,
    EvolutionStrategies,
    Hypergradient,
    Problem,
    Solver,
    Unrolled,
)
from tests.problems import Quadratic, normal
from tests.solver_rows import adam, adamw, sgd


def slopes(*, power: int = 2) -> Problem:
    """dF/dy is the same everywhere, and G is not quadratic in y but for the power 2."""
    target = normal(3, seed=4)
    return Problem.from_functions(
        lambda x, y, _: y["y"] @ target,
        lambda x, y, _: (y["y"] - x["x"].sin()).pow(power).sum() / power,
        {"x": normal(3, seed=5)},
        {"y": normal(3, seed=6)},
    )


def test_darts_is_one_unrolled_step() -> None:
    problem = Quadratic()
    truth = Unrolled(1, torchopt.sgd(0.1)).hypergradient(problem)
    found = DARTS(0.1).hypergradient(problem)
    torch.testing.assert_close(found.grad, truth.grad, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(found.value, truth.value, rtol=1e-13, atol=0)


def test_the_difference_of_darts_is_of_second_order() -> None:
    problem = slopes(power=4)
    truth = Unrolled(1, torchopt.sgd(0.1)).hypergradient(problem).grad["x"]

    def error(length: float) -> float:
        return float((DARTS(0.1, length).hypergradient(problem).grad["x"] - truth).norm())

    assert error(0.02) / error(0.01) == pytest.approx(4, rel=1e-3)


@pytest.mark.parametrize("solver", [DARTS(), SAMA()])
def test_a_difference_that_rounding_swallows_is_refused(solver: Solver) -> None:
    """In bfloat16 both gradients were taken at the same point, and the response was 0."""
    problem = Quadratic().bfloat16()
    with pytest.raises(ValueError, match=r"`y` is in torch.bfloat16, and displacements of 0.01"):
        solver.hypergradient(problem, lower_optimizer=sgd(problem))


def test_no_upper_slope_has_no_response() -> None:
    problem = Problem.from_functions(
        lambda x, y, _: x["x"].square().sum() + 0 * y["y"].sum(),
        lambda x, y, _: (y["y"] - x["x"]).square().sum(),
        {"x": torch.ones(2).double()},
        {"y": torch.zeros(2).double()},
    )
    assert torch.equal(DARTS(0.1).hypergradient(problem).grad["x"], torch.full((2,), 2.0).double())


@pytest.mark.parametrize("make", [sgd, adam, adamw])
def test_sama_has_the_jacobian_of_the_running_optimizer(make: Any) -> None:
    """Where the upper slope is constant it is the derivative of one step of that optimizer."""
    problem = slopes()
    optimizer = make(problem)
    for _ in range(3):
        problem.lower.y.grad = normal(3, seed=8)
        optimizer.step()
    truth = Unrolled(1).hypergradient(problem, lower_optimizer=optimizer)
    found = SAMA().hypergradient(problem, lower_optimizer=optimizer)
    torch.testing.assert_close(found.grad, truth.grad, rtol=1e-10, atol=1e-12)


def test_sama_refuses_what_it_cannot_ask() -> None:
    problem = slopes()
    with pytest.raises(ValueError, match=r"pass it as `lower_optimizer`, or choose `DARTS"):
        SAMA().hypergradient(problem)
    other = torch.optim.Rprop(problem.lower.parameters())
    with pytest.raises(TypeError, match="no differentiable twin of `Rprop`"):
        SAMA().hypergradient(problem, lower_optimizer=other)


def mean_error(solvers: list[Any], part: Any) -> float:
    """The mean over many seeds of the relative squared error, of the whole or the response."""
    problem = Quadratic()
    truth = part(Unrolled(2, torchopt.sgd(0.1)).hypergradient(problem))
    errors = [(part(s.hypergradient(problem)) - truth).square().sum() for s in solvers]
    return float(torch.stack(errors).mean() / truth.square().sum())


def whole(answer: Hypergradient) -> Tensor:
    return answer.grad["x"]


def response(answer: Hypergradient) -> Tensor:
    return answer.grad["x"] - Quadratic().upper["x"].detach() / 10


@pytest.mark.parametrize("count", [1, 4])
def test_zero_order_errors_are_what_theory_says(count: int) -> None:
    """Of a linear response: (d + 1) / n of the square, d = 3 upper variables; 40 seeds know it to .3"""
    seeds = range(40)
    pairs = [EvolutionStrategies(2, 0.1, num_pairs=count, seed=i) for i in seeds]
    assert mean_error(pairs, whole) == pytest.approx(4 / count, rel=0.45)
    runs = [PZOBO(2, 0.1, num_directions=count, seed=i) for i in seeds]
    assert mean_error(runs, response) == pytest.approx(4 / count, rel=0.45)


@pytest.mark.parametrize("solver", [EvolutionStrategies(2, 0.1), PZOBO(2, 0.1)])
def test_every_call_draws_others_and_the_state_brings_them_back(solver: Any) -> None:
    problem = Quadratic()
    first = solver.hypergradient(problem)
    second = solver.hypergradient(problem, state=first.state)
    assert not torch.equal(first.grad["x"], second.grad["x"])
    again = solver.hypergradient(problem, state=first.state)
    assert torch.equal(again.grad["x"], second.grad["x"])
    assert second.state == {"seed": 0, "calls": 2}


def test_evolution_strategies_need_no_derivative_of_the_upper_loss() -> None:
    problem = Problem.from_functions(
        lambda x, y, _: (y["y"] > 0).double().mean() - y["y"].detach().sum() + 0 * x["x"].sum(),
        lambda x, y, _: (y["y"] - x["x"]).square().sum() / 2,
        {"x": torch.ones(2).double()},
        {"y": torch.zeros(2).double()},
    )
    grads = [
        EvolutionStrategies(1, 1.0, num_pairs=64, seed=i).hypergradient(problem).grad["x"]
        for i in range(4)
    ]
    torch.testing.assert_close(
        torch.stack(grads).mean(0), torch.full((2,), -1.0).double(), rtol=0.3, atol=0
    )

"""IAPTT: the worst iterate, from an initial value that moves."""

import torch
import torchopt

from bilevel import IAPTT, Problem, Unrolled, check_hypergradient
from tests.problems import ROWS, normal, regression
from tests.solver_rows import sgd


def bend(sign: float) -> Problem:
    """F falls (or grows) along the trajectory."""
    return Problem.from_functions(
        lambda x, y, _: sign * (y["y"] - x["x"].sin()).square().sum(),
        lambda x, y, _: (y["y"] - x["x"].sin()).square().sum() / 2,
        {"x": normal(3)},
        {"y": normal(3, seed=1)},
    )


def test_the_trajectory_is_cut_where_the_upper_loss_is_worst() -> None:
    for sign, cut in ((1.0, 1), (-1.0, 4)):
        problem = bend(sign)
        found = IAPTT(4, torchopt.sgd(0.1), 0.1).hypergradient(problem)
        truth = Unrolled(cut, torchopt.sgd(0.1)).hypergradient(problem)
        assert found.stats.num_products == cut
        assert found.stats.lower_residual == truth.stats.lower_residual
        torch.testing.assert_close(found.grad, truth.grad, rtol=1e-12, atol=1e-14)


def test_it_is_the_derivative_of_what_it_does() -> None:
    row = ROWS["tanh network"]
    problem, solver = row.make(), IAPTT(3, torchopt.adam(0.05, eps=0.1), 0.1)
    check = check_hypergradient(
        problem,
        solver,
        regression(seed=7),
        [regression(seed=9)],
        against="procedure",
        tolerance=1e-7,
    )
    assert check.passed, check.verdict


def test_the_initial_value_goes_down() -> None:
    """By the derivative of F in it: y_k = (1 - a)^k z + ..., dF/dz = (1 - a)^k dF/dy."""
    problem = bend(1.0)
    solver = IAPTT(3, torchopt.sgd(0.1), 0.5)
    start = problem.lower.y.detach().clone()
    answer = solver.hypergradient(problem)
    goal = problem.upper.x.detach().sin()
    slope = 0.9 * 2 * 0.9 * (start - goal)
    torch.testing.assert_close(answer.state["y"], start - 0.5 * slope, rtol=1e-12, atol=0)
    assert torch.equal(problem.lower.y, start)
    later = solver.hypergradient(problem, state=answer.state)
    assert later.value < answer.value


def test_it_branches_from_a_running_optimizer() -> None:
    problem = bend(1.0)
    answer = IAPTT(3).hypergradient(problem, lower_optimizer=sgd(problem))
    assert answer.grad["x"].isfinite().all()
    assert repr(IAPTT(3)) == "IAPTT(num_steps=3, step_size=None)"

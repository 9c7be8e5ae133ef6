"""Online forward mode: the derivative of the whole run so far."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from bilevel import RTHO, Problem, Unrolled
from tests.problems import ROWS, Quadratic
from tests.solver_rows import adam, sgd


def walk(problem: Problem, optimizer: Any, grads: dict[str, torch.Tensor]) -> None:
    for name, y in problem.variables("lower").items():
        y.grad = grads.get(name)
    optimizer.step()


@pytest.mark.parametrize("make", [sgd, adam])
@pytest.mark.parametrize("row_name", ["quadratic", "logistic with logs"])
def test_while_x_stands_still_it_is_the_unrolled_run(
    row_name: str, make: Callable[[Problem], torch.optim.Optimizer]
) -> None:
    row, steps = ROWS[row_name], 5
    problem = row.make()
    truth = Unrolled(steps).hypergradient(
        problem, row.upper_batch, [row.lower_batch], lower_optimizer=make(problem)
    )
    optimizer, state = make(problem), None
    for _ in range(steps):
        answer = RTHO().hypergradient(
            problem, row.upper_batch, [row.lower_batch], state=state, lower_optimizer=optimizer
        )
        state = answer.state
        assert answer.lower_grad is not None
        walk(problem, optimizer, answer.lower_grad)
    found = RTHO().hypergradient(
        problem, row.upper_batch, [row.lower_batch], state=state, lower_optimizer=optimizer
    )
    torch.testing.assert_close(found.grad, truth.grad, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(found.value, truth.value, rtol=1e-10, atol=0)


def test_it_needs_a_running_optimizer_with_a_twin() -> None:
    problem = Quadratic()
    with pytest.raises(ValueError, match="branches from the running lower optimizer"):
        RTHO().hypergradient(problem)
    with pytest.raises(TypeError, match="no differentiable twin of `Rprop`"):
        RTHO().hypergradient(problem, lower_optimizer=torch.optim.Rprop(problem.lower.parameters()))


@pytest.mark.parametrize("entries", [2, 5])
def test_tangents_of_another_problem_are_refused(entries: int) -> None:
    problems = Quadratic(4, 3), Quadratic(4, entries)
    state = RTHO().hypergradient(problems[0], lower_optimizer=sgd(problems[0])).state
    with pytest.raises(
        ValueError, match=f"got 3 tangents for {entries} upper entries.*leave it out"
    ):
        RTHO().hypergradient(problems[1], lower_optimizer=sgd(problems[1]), state=state)

"""Settings of the lower optimizer that the upper level learns."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchopt
from torch import nn

from bilevel import Compiled, Problem, Unrolled, check_hypergradient
from bilevel.solvers.unrolled import MODES
from tests.problems import normal, spd

RUNNING: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "rate of sgd": lambda p: torch.optim.SGD(p.lower.parameters(), p.upper.rate, momentum=0.5),
    "momentum of sgd": lambda p: torch.optim.SGD(p.lower.parameters(), 0.1, momentum=p.upper.rate),
    "rate of adam": lambda p: torch.optim.Adam(p.lower.parameters(), p.upper.rate, eps=0.1),
    "decay of adamw": lambda p: torch.optim.AdamW(
        p.lower.parameters(), 0.1, weight_decay=p.upper.rate, eps=0.1
    ),
}
MADE: dict[str, Callable[[Any], Any]] = {
    "rate of sgd": lambda x: torchopt.sgd(x["rate"].exp() / 10, momentum=0.5),
    "momentum of sgd": lambda x: torchopt.sgd(0.1, momentum=x["rate"].sigmoid()),
    "rate of adam": lambda x: torchopt.adam(x["rate"].exp() / 10, eps=0.1),
}


def make() -> Problem:
    """The rate decides how far the lower level gets; another upper variable moves its goal."""
    hessian, goal = spd(4), normal(4, seed=3)
    return Problem.from_functions(
        lambda x, y, _: (y["y"] - goal).square().sum(),
        lambda x, y, _: (
            (y["y"] - x["goal"]) @ hessian @ (y["y"] - x["goal"]) / 2 + y["y"].cosh().sum()
        ),
        {"rate": torch.tensor(0.2).double(), "goal": normal(4, seed=5)},
        {"y": normal(4, seed=6)},
    )


def agrees(problem: Problem, solver: Unrolled, optimizer: Any = None) -> None:
    check = check_hypergradient(problem, solver, lower_optimizer=optimizer, tolerance=1e-7)
    assert check.passed, check.verdict


@pytest.mark.parametrize("name", RUNNING)
def test_a_running_optimizer_whose_setting_is_an_upper_variable(name: str) -> None:
    problem = make()
    optimizer = RUNNING[name](problem)
    answers = [
        Unrolled(5, mode=mode).hypergradient(problem, lower_optimizer=optimizer).grad
        for mode in MODES
    ]
    assert answers[0]["rate"].abs() > 1e-3
    for other in answers[1:]:
        torch.testing.assert_close(other, answers[0], rtol=1e-9, atol=1e-12)
    agrees(problem, Unrolled(5), optimizer)


@pytest.mark.parametrize("name", MADE)
def test_a_transformation_made_of_upper_variables(name: str) -> None:
    problem = make()
    answers = [Unrolled(5, MADE[name], mode=mode).hypergradient(problem).grad for mode in MODES]
    assert answers[0]["rate"].abs() > 1e-3
    for other in answers[1:]:
        torch.testing.assert_close(other, answers[0], rtol=1e-9, atol=1e-12)
    agrees(problem, Unrolled(5, MADE[name]))


def test_what_cannot_be_learned_is_refused_by_name() -> None:
    problem = make()
    rate = problem.variables("upper")["rate"]
    with pytest.raises(ValueError, match=r"`step_size` of the transformation .*optimizer=lambda x"):
        Unrolled(2, torchopt.sgd(rate))
    optimizer = torch.optim.Adam(problem.lower.parameters(), 0.1, betas=(rate, rate))
    with pytest.raises(ValueError, match="`betas` of the lower optimizer"):
        Unrolled(2).hypergradient(problem, lower_optimizer=optimizer)
    with pytest.raises(TypeError, match="must be a torchopt transformation"):
        Unrolled(2, lambda x: x["rate"]).hypergradient(problem)
    for solver, running in (
        (Unrolled(2, MADE["rate of sgd"]), None),
        (Unrolled(2), torch.optim.SGD(problem.lower.parameters(), nn.Parameter(rate))),
    ):
        if running is not None:
            running.param_groups[0]["lr"] = rate
        with pytest.raises(ValueError, match="use `Unrolled` without `Compiled`"):
            Compiled(solver).hypergradient(problem, lower_optimizer=running)

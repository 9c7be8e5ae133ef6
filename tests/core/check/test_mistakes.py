"""Mistakes that `check_hypergradient` must find, whatever the solver."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torchopt
from torch import Tensor, nn

from benchmarks.cases.mistakes import Spoiled
from bilevel import (
    Alternating,
    Cholesky,
    Identity,
    Implicit,
    Neumann,
    Problem,
    Solver,
    Unrolled,
    check_hypergradient,
)
from bilevel.solvers import Response, UnrolledSteps
from tests.core.check.cases import DOUBLE, number
from tests.problems import Quadratic


def test_a_block_without_response_is_found_beside_one_that_is_larger_by_1e8() -> None:
    def problem(stop: bool) -> Problem:
        def lower(x: Any, y: Any, _: Any) -> Tensor:
            small = x["small"].detach() if stop else x["small"]
            return (y["u"] - x["big"]).square().sum() + (y["v"] - small).square().sum()

        return Problem.from_functions(
            lambda x, y, _: (1e4 * y["u"]).square().sum() + (y["v"] - 1).square().sum(),
            lower,
            {"big": torch.ones(2, **DOUBLE), "small": torch.zeros(2, **DOUBLE)},
            {"u": torch.zeros(2, **DOUBLE), "v": torch.zeros(2, **DOUBLE)},
        )

    check = check_hypergradient(problem(True), Implicit(Cholesky()))
    assert not check.passed
    assert "in `small`; it is the direct term alone" in str(check)
    assert check.variables["big"].outcome == "agrees"
    assert check_hypergradient(problem(False), Implicit(Cholesky())).passed


def test_an_entry_without_response_is_found_beside_larger_ones() -> None:
    scale = torch.tensor([1e4, 1.0, 1.0], **DOUBLE)

    def problem(stop: bool) -> Problem:
        def lower(x: Any, y: Any, _: Any) -> Tensor:
            last = x["x"][2:].detach() if stop else x["x"][2:]
            return (y["y"] - torch.cat([x["x"][:2], last])).square().sum()

        return Problem.from_functions(
            lambda x, y, _: (scale * (y["y"] - 2)).square().sum(),
            lower,
            {"x": torch.ones(3, **DOUBLE)},
            {"y": torch.zeros(3, **DOUBLE)},
        )

    check = check_hypergradient(problem(True), Implicit(Cholesky()))
    assert not check.passed
    assert "in `x`, entry 2" in str(check)
    assert check_hypergradient(problem(False), Implicit(Cholesky())).passed


class Clipped(Problem):
    """The lower optimizer moves one of two variables; both count in the gradient's norm."""

    def __init__(self) -> None:
        super().__init__()
        self.upper = nn.ParameterDict({"x": number(0.5)})
        self.lower = nn.ParameterDict(
            {
                "moved": torch.tensor([1.0, -1.0], **DOUBLE),
                "kept": torch.tensor([2.0, 1.0], **DOUBLE),
            }
        )

    def upper_loss(self, batch: Any) -> Tensor:
        return (self.lower["moved"] - 0.2).square().sum()

    def lower_loss(self, batch: Any) -> Tensor:
        return (self.lower["moved"] * self.lower["kept"] - self.upper["x"]).square().sum()


@dataclass(frozen=True)
class Tighter(Solver):
    """Unrolls with a tighter clip than it says."""

    said: Unrolled

    def respond(self, oracles: Any, state: Any, lower_optimizer: Any) -> Response:
        assert self.said.max_grad_norm is not None
        done = replace(self.said, max_grad_norm=0.9 * self.said.max_grad_norm)
        return done.respond(oracles, state, lower_optimizer)

    def unrolled_steps(self) -> UnrolledSteps:
        return self.said.unrolled_steps()


def test_the_procedure_is_independent_of_the_solver() -> None:
    """A wrong iterate in `Unrolled` is found, by its value and by its derivative."""
    problem = Clipped()
    optimizer = torch.optim.SGD([problem.lower["moved"]], 0.5)
    solver = Unrolled(6, mode="recompute", max_grad_norm=0.5)
    check = check_hypergradient(problem, solver, lower_optimizer=optimizer, tolerance=1e-8)
    assert check.passed, check
    # by the loop a user would write, differences of step 1e-5
    assert float(check.truth) == pytest.approx(-0.1587883007331259, rel=1e-8)

    check = check_hypergradient(problem, Tighter(solver), lower_optimizer=optimizer)
    assert not check.passed
    assert "takes the upper loss to be" in str(check)
    assert "plain loop" in str(check)


def test_momentum_and_state_are_left_as_they_were() -> None:
    problem = Clipped()
    optimizer = torch.optim.Adam(problem.lower.parameters(), 0.1)
    problem.lower_loss(None).backward()
    optimizer.step()
    kept = {p: p.grad for p in problem.parameters()}
    state = {p: {k: v.clone() for k, v in s.items()} for p, s in optimizer.state.items()}
    check = check_hypergradient(problem, Unrolled(3), lower_optimizer=optimizer, tolerance=1e-8)
    assert check.passed, check
    assert all(p.grad is g for p, g in kept.items())
    for p, before in state.items():
        for key, value in before.items():
            assert torch.equal(optimizer.state[p][key], value)


MISTAKES: dict[str, Callable[[Tensor], Tensor]] = {
    "wrong sign": lambda g: -g,
    "a factor of two": lambda g: 2 * g,
    "one part in ten thousand": lambda g: g * 1.0001,
    "dropped": torch.zeros_like,
    "transposed": lambda g: g.flip(0),
    "not a number": lambda g: g * torch.nan,
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_found(mistake: str) -> None:
    check = check_hypergradient(Quadratic(), Spoiled(Implicit(Cholesky()), MISTAKES[mistake]))
    assert not check.passed
    assert str(check).startswith("disagrees: ")
    assert "`x`" in str(check)


def test_causes_are_not_guessed() -> None:
    def words(solver: Solver, **options: Any) -> str:
        return str(check_hypergradient(Quadratic(), solver, **options))

    approximations = [Alternating(), Implicit(Identity()), Implicit(Neumann(2, 0.1))]
    approximations += [Unrolled(4, torchopt.sgd(0.1), truncate=2)]
    for solver in approximations:
        assert "drops or approximates the response term" in words(solver)
    halved = Spoiled(Implicit(Cholesky()), lambda g: g / 2)
    assert "drops" not in words(halved)
    assert "direct term alone" in words(Spoiled(Implicit(Cholesky()), torch.zeros_like))
    early = Problem.from_functions(
        lambda x, y, _: (y["y"] - 3).square().sum(),
        lambda x, y, _: (y["y"] - x["x"].sin()).cosh().sum(),
        {"x": torch.ones(2, **DOUBLE)},
        {"y": torch.zeros(2, **DOUBLE)},
    )
    assert "`solve_first=False`" in str(check_hypergradient(early, Implicit(), solve_first=False))

"""Thirteen defects that were found in other bilevel libraries, each as a test of this one.

D1 to D13 are one each; a library that checks its hypergradients against the truth would have met most
of them.
"""

import math
from typing import Any

import pytest
import torch
import torchopt
from torch import Tensor, nn

from bilevel import (
    GMRES,
    ConjugateGradient,
    DivergenceError,
    HypergradientError,
    Implicit,
    Problem,
    Unrolled,
    best_response,
    train,
)
from tests.problems import ROWS, NetProblem, Quadratic, normal, regression, seeded, spd


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


# ------------------------------------------------------------------ D1, D2: conjugate gradients


def test_d1_the_last_iterate_counts() -> None:
    """With the identity for a Hessian one step of conjugate gradients is the answer, not zero."""
    rhs = normal(8)
    for steps in (1, 8):
        solution = ConjugateGradient(max_steps=steps).solve(lambda v: v, rhs)
        torch.testing.assert_close(solution.value, rhs, rtol=1e-14, atol=1e-14)
    matrix = spd(8)
    solution = ConjugateGradient(max_steps=8, rtol=1e-12).solve(lambda v: matrix @ v, rhs)
    assert relative(solution.value, torch.linalg.solve(matrix, rhs)) < 1e-12


@pytest.mark.parametrize("damping", [0.0, 0.1, 0.5, 2.0])
def test_d2_a_setting_goes_into_the_whole_recurrence(damping: float) -> None:
    matrix, rhs = spd(8), normal(8)
    solver = ConjugateGradient(max_steps=20, damping=damping, rtol=1e-12)
    solution = solver.solve(lambda v: matrix @ v, rhs)
    wanted = torch.linalg.solve(matrix + damping * torch.eye(8).double(), rhs)
    assert relative(solution.value, wanted) < 1e-11


# ------------------------------------------------------------------ D3: unrolling beside what runs


def test_d3_unrolling_runs_beside_the_training_it_belongs_to() -> None:
    """In one loop with the optimizer that it branches from, several lower steps a turn."""
    problem = Quadratic()
    *_, last = train(
        problem,
        solver=Unrolled(5),
        lower_steps=3,
        num_steps=3,
        upper_optimizer=torch.optim.SGD(problem.upper.parameters(), 0.1),
        lower_optimizer=torch.optim.SGD(problem.lower.parameters(), 0.1, momentum=0.9),
    )
    assert last.hypergradient.stats.response_norm > 0


def test_d3_a_problem_between_two_others_has_a_hypergradient() -> None:
    """The lower level of one is the upper level of another: z* = x + y/2, y* = 0.4 x, z* = 1.2 x."""
    zeros = torch.zeros(2, dtype=torch.float64)
    third = Problem.from_functions(
        lambda u, z, _: z["z"].sum(),
        lambda u, z, _: (z["z"] - u["x"] - u["y"] / 2).square().sum(),
        {"x": zeros, "y": zeros.clone()},
        {"z": zeros.clone()},
    )

    def z(x: Any, y: Any) -> Tensor:
        return best_response(third, upper={"x": x["x"], "y": y["y"]})["z"]

    x = normal(2)
    problem = Problem.from_functions(
        lambda x, y, _: (y["y"] - 1).square().sum() + (z(x, y) - 2).square().sum(),
        lambda x, y, _: (y["y"] - x["x"]).square().sum() + z(x, y).square().sum(),
        {"x": x.clone()},
        {"y": 0.4 * x},
    )
    found = Implicit().hypergradient(problem).grad["x"]
    assert relative(found, 0.8 * (0.4 * x - 1) + 2.4 * (1.2 * x - 2)) < 1e-12


# ------------------------------------------------------------------ D4: groups, frozen parameters


def test_d4_parameter_groups_keep_their_settings() -> None:
    a, b = torch.nn.Parameter(normal(2)), torch.nn.Parameter(normal(2, seed=1))

    def problem_of(first: Tensor, second: Tensor) -> Problem:
        return Problem.from_functions(
            lambda x, y, _: (y["a"] + y["b"]).square().sum() + x["x"].square().sum(),
            lambda x, y, _: (y["a"] - x["x"]).square().sum() + (y["b"] - x["x"]).square().sum(),
            {"x": torch.ones(2).double()},
            {"a": first.detach().clone(), "b": second.detach().clone()},
        )

    problem = problem_of(a, b)
    variables = problem.variables("lower")
    groups = [
        {"params": [variables["a"]], "lr": 0.5, "weight_decay": 0.1},
        {"params": [variables["b"]], "lr": 0.01},
    ]
    optimizer = torch.optim.SGD(groups, 0.3)
    *_, last = train(
        problem,
        solver=Unrolled(1),
        num_steps=1,
        upper_optimizer=torch.optim.SGD(problem.upper.parameters(), 0.0),
        lower_optimizer=optimizer,
    )
    first = a - 0.5 * (2 * (a - 1) + 0.1 * a)
    second = b - 0.01 * 2 * (b - 1)
    torch.testing.assert_close(variables["a"].detach(), first.detach())
    torch.testing.assert_close(variables["b"].detach(), second.detach())
    # d y_1 / dx is twice the rate of each group
    moved = first - 0.5 * (2 * (first - 1) + 0.1 * first) + second - 0.01 * 2 * (second - 1)
    wanted = 2 + 2 * moved * (2 * 0.5 + 2 * 0.01)
    torch.testing.assert_close(last.hypergradient.grad["x"], wanted.detach())
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.01]


@pytest.mark.parametrize("solver", [Implicit(ConjugateGradient(damping=1.0)), Unrolled(2)])
def test_d4_a_frozen_parameter_is_a_constant(solver: Any) -> None:
    row = ROWS["frozen and unused"]
    problem = row.make()
    frozen = problem.lower.frozen.weight.clone()
    *_, last = train(
        problem,
        row.upper_batch,
        solver=solver,
        num_steps=2,
        upper_optimizer=torch.optim.SGD(problem.upper.parameters(), 0.1),
        lower_optimizer=torch.optim.SGD(problem.lower.parameters(), 0.1),
    )
    assert torch.equal(problem.lower.frozen.weight, frozen)
    assert last.hypergradient.stats.response_norm > 0


# ------------------------------------------------------------------ D5: truncation


@pytest.mark.parametrize("truncate", [1, 10, 250])
def test_d5_steps_before_a_truncation_leave_nothing_behind(truncate: int) -> None:
    """250 steps with an explicit term dG/dx each; the answer is that of the last steps alone."""
    problem = Quadratic()
    optimizer = torchopt.sgd(0.05)
    found = Unrolled(250, optimizer, truncate=truncate).hypergradient(problem)
    x = problem.upper["x"].detach().requires_grad_()
    y = problem.lower["y"].detach()
    for t in range(250):
        y = y.detach() if t <= 250 - truncate else y
        y = y - 0.05 * (problem.H @ y - (problem.B @ x + problem.c))
    ((y - problem.t).square().sum() / 2 + x.square().sum() / 20).backward()
    assert x.grad is not None
    assert relative(found.grad["x"], x.grad) < 1e-13
    assert all(p.grad is None for p in problem.parameters())


# ------------------------------------------------------------------ D7: NaN


def test_d7_nan_is_not_turned_into_zero() -> None:
    problem = Problem.from_functions(
        lambda x, y, _: (y["y"] - 1).square(),
        lambda x, y, _: (y["y"] - x["x"].sqrt()).square(),
        {"x": torch.tensor(-1.0).double()},
        {"y": torch.tensor(0.0).double()},
    )
    with pytest.raises((HypergradientError, DivergenceError)):
        next(
            train(
                problem,
                solver=Implicit(),
                num_steps=1,
                lower_steps=0,
                upper_optimizer=torch.optim.SGD(problem.upper.parameters(), 0.1),
            )
        )
    answer = Implicit().hypergradient(problem, throw=False)
    assert math.isnan(float(answer.grad["x"]))


# ------------------------------------------------------------------ D8: the lower optimizer's state


def test_d8_the_lower_optimizer_goes_on_from_turn_to_turn() -> None:
    problem = Quadratic()
    lower = torch.optim.Adam(problem.lower.parameters(), 0.05)
    for step in train(
        problem,
        solver=Unrolled(3),
        lower_steps=2,
        num_steps=3,
        upper_optimizer=torch.optim.SGD(problem.upper.parameters(), 0.1),
        lower_optimizer=lower,
    ):
        assert int(lower.state[problem.lower["y"]]["step"]) == 2 * step.number


# ------------------------------------------------------------------ D10: options of optimizers


def test_d10_maximize_goes_up() -> None:
    problem = Problem.from_functions(
        lambda x, y, _: y["y"] * 3,
        lambda x, y, _: x["x"] * y["y"] - y["y"].square(),
        {"x": torch.tensor(2.0).double()},
        {"y": torch.tensor(0.0).double()},
    )
    optimizer = torch.optim.SGD(problem.lower.parameters(), 0.1, maximize=True)
    answer = Unrolled(1).hypergradient(problem, lower_optimizer=optimizer)
    assert float(answer.value) == pytest.approx(3 * 0.1 * 2.0)
    assert float(answer.grad["x"]) == pytest.approx(3 * 0.1)


def test_d10_the_statistics_of_batch_norm_come_back() -> None:
    row = ROWS["batch norm, in-place relu, dropout"]
    problem = row.make()
    before = problem.lower[1].running_mean.clone()
    *_, _ = train(
        problem,
        row.upper_batch,
        solver=Unrolled(2),
        num_steps=1,
        upper_optimizer=torch.optim.SGD(problem.upper.parameters(), 0.1),
        lower_optimizer=torch.optim.SGD(problem.lower.parameters(), 0.1),
    )
    assert not torch.equal(problem.lower[1].running_mean, before)


# ------------------------------------------------------------------ D11 to D13: what networks hold


@pytest.mark.parametrize("solver", [Implicit(GMRES(damping=1.0)), Unrolled(2)])
@pytest.mark.parametrize("frozen", [False, True])
def test_d11_batch_norm_and_frozen_layers_under_both_families(solver: Any, frozen: bool) -> None:
    net = seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)))
    if frozen:
        net[0].requires_grad_(False)
    problem = NetProblem(net)
    lower = torch.optim.SGD(problem.lower.parameters(), 0.1)
    answer = solver.hypergradient(problem, regression(), [regression()], lower_optimizer=lower)
    assert answer.stats.response_norm > 0
    assert int(net[1].num_batches_tracked) == 0


def test_d12_a_network_unrolled_for_several_steps() -> None:
    """An in-place update of the weights would invalidate what the second step needs of the first."""
    problem = NetProblem(seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))))
    data = regression()
    lower = torch.optim.SGD(problem.lower.parameters(), 0.1)
    found = Unrolled(4).hypergradient(problem, data, [data], lower_optimizer=lower)

    def end(log: Tensor) -> Tensor:
        """The upper loss after four steps, by hand."""
        weights = {n: p.detach().clone() for n, p in problem.lower.named_parameters()}
        inputs, targets = data
        importance = problem.upper["weigh"](inputs)[:, 0].detach()
        for _ in range(4):
            weights = {n: w.requires_grad_() if w.is_leaf else w for n, w in weights.items()}
            out = torch.func.functional_call(problem.lower, weights, (inputs,))[:, 0]
            penalty = torch.stack([w.square().sum() for w in weights.values()]).sum()
            loss = (importance * (out - targets).square()).mean() + 0.1 * log.exp() * penalty
            grads = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
            weights = {n: w - 0.1 * g for (n, w), g in zip(weights.items(), grads, strict=True)}
        out = torch.func.functional_call(problem.lower, weights, (inputs,))[:, 0]
        return (out - targets).square().mean()

    log = problem.upper["l2"]["log"].detach().requires_grad_()
    (wanted,) = torch.autograd.grad(end(log), log)
    assert relative(found.grad["l2.log"], wanted) < 1e-12


@pytest.mark.parametrize("solver", [Implicit(ConjugateGradient(damping=1.0)), Unrolled(2)])
def test_d13_attention_is_differentiated_twice(solver: Any) -> None:
    """The default kernel of scaled dot products has no second derivative."""
    layer = seeded(lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True))

    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = seeded(lambda: nn.Linear(1, 4))
            self.layer = layer
            self.head = seeded(lambda: nn.Linear(4, 1))

        def forward(self, inputs: Tensor) -> Tensor:
            out: Tensor = self.head(self.layer(self.embed(inputs[..., None])).mean(dim=1))
            return out

    problem = NetProblem(Reads())
    lower = torch.optim.SGD(problem.lower.parameters(), 0.05)
    answer = solver.hypergradient(
        problem, regression(), [regression()], lower_optimizer=lower, throw=False
    )
    assert answer.stats.response_norm > 0
    assert all(g.isfinite().all() for g in answer.grad.values())

"""The contract: every solver on every problem. A new one adds a row and no test code."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchopt

from bilevel import (
    GMRES,
    Alternating,
    Cholesky,
    ConjugateGradient,
    Hypergradient,
    HypergradientError,
    Identity,
    Implicit,
    Neumann,
    Problem,
    Result,
    Solver,
    Unrolled,
    check_hypergradient,
)
from bilevel.oracles import Oracles
from tests.devices import DEVICES
from tests.problems import ROWS, Row

Optimizer = Callable[[Problem], torch.optim.Optimizer]


def sgd(problem: Problem) -> torch.optim.Optimizer:
    return torch.optim.SGD(problem.lower.parameters(), 0.05, momentum=0.9)


def adam(problem: Problem) -> torch.optim.Optimizer:
    return torch.optim.Adam(problem.lower.parameters(), 0.05)


def adamw(problem: Problem) -> torch.optim.Optimizer:
    return torch.optim.AdamW(problem.lower.parameters(), 0.05, weight_decay=0.1)


# Each solver with the lower optimizer it branches from (`None`: it needs none).
SOLVERS: dict[str, tuple[Solver, Optimizer | None]] = {
    "alternating": (Alternating(), None),
    "unrolled torchopt sgd": (Unrolled(3, torchopt.sgd(0.05)), None),
    # from a fresh state Adam's first step is g / (|g| + eps), a kink that differences step over
    "unrolled torchopt adam": (Unrolled(3, torchopt.adam(0.05, eps=0.1)), None),
    "unrolled running sgd": (Unrolled(3), sgd),
    "unrolled running adam": (Unrolled(3), adam),
    "unrolled running adamw": (Unrolled(3), adamw),
    "recompute running adam": (Unrolled(3, mode="recompute"), adam),
    "forward running sgd": (Unrolled(2, mode="forward"), sgd),
    "truncated": (Unrolled(3, torchopt.sgd(0.05), truncate=2), None),
    "implicit cg": (Implicit(ConjugateGradient(damping=1.0)), None),
    "implicit cholesky": (Implicit(Cholesky()), None),
    "implicit gmres": (Implicit(GMRES()), None),
    "implicit neumann": (Implicit(Neumann(num_steps=5, step_size=0.05)), None),
    "implicit identity": (Implicit(Identity()), None),
}
# Those whose answer is the derivative of what they do, so that finite differences must agree.
PROCEDURES = [
    name
    for name, (solver, _) in SOLVERS.items()
    if isinstance(solver, Unrolled) and solver.truncate is None
]
SOLUTIONS = {"implicit cg": Implicit(ConjugateGradient(rtol=1e-12))} | {
    "implicit cholesky": Implicit(Cholesky()),
    "implicit gmres": Implicit(GMRES(rtol=1e-12)),
    "implicit neumann": Implicit(Neumann(num_steps=2000, step_size=0.1, rtol=1e-9)),
}


# Layers whose CUDA kernels have no forward derivative of their gradient in torch.
NO_FORWARD_ON_CUDA = {"batch norm, in-place relu, dropout", "lstm"}


def to(device: str, batch: Any) -> Any:
    return batch if batch is None else tuple(t.to(device) for t in batch)


def build(row: Row, solver_name: str, device: str) -> tuple[Problem, Any]:
    """The problem, and its lower optimizer after one real step."""
    problem = row.make().to(device)
    make = SOLVERS[solver_name][1]
    if make is None:
        return problem, None
    optimizer = make(problem)
    oracles = Oracles(problem, None, [to(device, row.lower_batch)])
    _, grads = oracles.lower_gradient(oracles.upper, oracles.lower)
    variables = problem.variables("lower")
    for name, p in variables.items():
        p.grad = grads[name]
    optimizer.step()
    for p in variables.values():
        p.grad = None
    return problem, optimizer


def snapshot(problem: Problem, optimizer: Any) -> dict[str, Any]:
    return copy.deepcopy(
        {
            "tensors": problem.state_dict(),
            "grads": {n: p.grad for n, p in problem.named_parameters()},
            "requires_grad": {n: p.requires_grad for n, p in problem.named_parameters()},
            "training": {n: m.training for n, m in problem.named_modules()},
            "optimizer": optimizer.state_dict() if optimizer else None,
            "random": torch.get_rng_state(),
        }
    )


def assert_same(before: Any, after: Any) -> None:
    torch.testing.assert_close(after, before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("solver_name", SOLVERS)
@pytest.mark.parametrize("row_name", ROWS)
def test_contract(row_name: str, solver_name: str, device: str) -> None:
    row, solver = ROWS[row_name], SOLVERS[solver_name][0]
    problem, optimizer = build(row, solver_name, device)
    for p in problem.parameters():
        p.grad = torch.ones_like(p)  # somebody else's: must survive
    upper_batch, lower_batch = to(device, row.upper_batch), to(device, row.lower_batch)
    before = snapshot(problem, optimizer)
    objects = {name: id(p) for name, p in problem.named_parameters()}

    def answer() -> Hypergradient:
        return solver.hypergradient(
            problem, upper_batch, [lower_batch], lower_optimizer=optimizer, seed=3, throw=False
        )

    forward = isinstance(solver, Unrolled) and solver.mode == "forward"
    if device == "cuda" and forward and row_name in NO_FORWARD_ON_CUDA:
        with pytest.raises(RuntimeError, match=r"in forward mode .*use `mode='recompute'`"):
            answer()
        assert_same(before, snapshot(problem, optimizer))
        return
    first, second = answer(), answer()

    assert_same(before, snapshot(problem, optimizer))
    assert objects == {name: id(p) for name, p in problem.named_parameters()}
    assert all(p.is_leaf for p in problem.parameters())
    assert_same(first.value, second.value)
    assert_same(first.grad, second.grad)

    variables = problem.variables("upper")
    assert list(first.grad) == list(variables)
    for name, g in first.grad.items():
        assert g.shape == variables[name].shape
        assert g.dtype == variables[name].dtype
        assert g.device == variables[name].device
        assert not g.requires_grad
        assert g.isfinite().all(), name
    assert first.value.ndim == 0
    assert not first.value.requires_grad
    assert first.result is not Result.NOT_FINITE
    if solver_name != "alternating":  # the response reaches the upper level
        assert first.stats.response_norm > 0
        assert first.stats.lower_residual is not None


@pytest.mark.parametrize("solver_name", PROCEDURES)
@pytest.mark.parametrize("row_name", [name for name, row in ROWS.items() if row.exact])
def test_agrees_with_finite_differences_of_the_steps(row_name: str, solver_name: str) -> None:
    row, solver = ROWS[row_name], SOLVERS[solver_name][0]
    problem, optimizer = build(row, solver_name, "cpu")
    before = snapshot(problem, optimizer)
    check = check_hypergradient(
        problem,
        solver,
        row.upper_batch,
        [row.lower_batch],
        lower_optimizer=optimizer,
        num_directions=4,
        # finite differences of fourth order in float64 leave about 1e-10; networks a little more
        tolerance=1e-7,
        seed=3,
    )
    assert check.passed, check.verdict
    assert_same(before, snapshot(problem, optimizer))


@pytest.mark.parametrize("solver_name", SOLUTIONS)
@pytest.mark.parametrize("row_name", [name for name, row in ROWS.items() if row.solvable])
def test_agrees_with_finite_differences_of_the_solution(row_name: str, solver_name: str) -> None:
    row = ROWS[row_name]
    check = check_hypergradient(
        row.make(),
        SOLUTIONS[solver_name],
        row.upper_batch,
        [row.lower_batch],
        tolerance=1e-7,  # the differences themselves are good to about 1e-9
    )
    assert check.passed, check.verdict


def test_alternating_is_found_out() -> None:
    """The check is not blind: a solver that drops the response fails it."""
    check = check_hypergradient(ROWS["quadratic"].make(), Alternating())
    assert not check.passed
    assert "drops or approximates the response term" in str(check)


@pytest.mark.parametrize("solver_name", ["alternating", "implicit cg", "unrolled running adam"])
def test_called_without_gradients_enabled(solver_name: str) -> None:
    problem, optimizer = build(ROWS["quadratic"], solver_name, "cpu")
    solver = SOLVERS[solver_name][0]
    with torch.no_grad():
        inside = solver.hypergradient(problem, lower_optimizer=optimizer)
    outside = solver.hypergradient(problem, lower_optimizer=optimizer)
    assert_same(inside.grad, outside.grad)


def test_dropout_sees_the_seed() -> None:
    row = ROWS["batch norm, in-place relu, dropout"]
    problem = row.make()
    values = [
        Alternating().hypergradient(problem, row.upper_batch, seed=seed).value for seed in (0, 1, 0)
    ]
    assert values[0] == values[2] != values[1]


def test_evaluation_mode_stays() -> None:
    row = ROWS["batch norm, in-place relu, dropout"]
    problem = row.make().eval()
    answer = Unrolled(2, torchopt.sgd(0.05)).hypergradient(
        problem, row.upper_batch, [row.lower_batch]
    )
    assert not problem.training
    assert_same(dict(problem.named_buffers()), answer.buffers)


def test_failure_is_raised_and_carries_the_answer() -> None:
    solver = Implicit(ConjugateGradient(max_steps=1, rtol=1e-12))
    problem = ROWS["quadratic"].make()
    with pytest.raises(HypergradientError, match="without reaching its tolerance") as caught:
        solver.hypergradient(problem)
    asked = solver.hypergradient(problem, throw=False)
    assert asked.result is Result.NOT_CONVERGED
    assert_same(caught.value.hypergradient.grad, asked.grad)

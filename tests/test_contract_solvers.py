"""The contract: every solver on every problem. A new one adds a row and no test code."""

import copy
import itertools
from pathlib import Path
from typing import Any

import optree
import pytest
import torch
import torchopt

from bilevel import (
    Alternating,
    ConjugateGradient,
    Hypergradient,
    HypergradientError,
    Implicit,
    Problem,
    Result,
    Solver,
    Unrolled,
    check_hypergradient,
)
from bilevel.checkpoint import loadable
from bilevel.oracles import Oracles
from tests.core import resumed
from tests.devices import DEVICES
from tests.problems import ROWS, Quadratic, Row
from tests.solver_rows import ROWS as SOLVER_ROWS
from tests.solver_rows import Exact, Falls, SolverRow

# Each solver with the lower optimizer it branches from (`None`: it needs none).
SOLVERS = {name: (row.solver, row.optimizer) for name, row in SOLVER_ROWS.items()}
# Those whose answer is the derivative of what they do, so that finite differences must agree.
PROCEDURES = [name for name, row in SOLVER_ROWS.items() if row.procedure]
SOLUTIONS = {n: row.solution for n, row in SOLVER_ROWS.items() if row.solution is not None}


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
    row, of = ROWS[row_name], SOLVER_ROWS[solver_name]
    solver = of.solver
    problem, optimizer = build(row, solver_name, device)
    for p in problem.parameters():
        p.grad = torch.ones_like(p)  # somebody else's: must survive
    upper_batch, lower_batch = to(device, row.upper_batch), to(device, row.lower_batch)
    before = snapshot(problem, optimizer)
    objects = {name: id(p) for name, p in problem.named_parameters()}

    def answer(state: Any = None) -> Hypergradient:
        return solver.hypergradient(
            problem,
            upper_batch,
            [lower_batch],
            state=state,
            lower_optimizer=optimizer,
            seed=3,
            throw=False,
        )

    if row_name in of.refuses:
        with pytest.raises(ValueError, match=of.refuses[row_name]):
            answer()
        assert_same(before, snapshot(problem, optimizer))
        return

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

    assert_like(first.grad, problem.variables("upper"))
    assert list(first.grad) == list(problem.variables("upper"))
    assert first.value.ndim == 0
    assert not first.value.requires_grad
    assert first.result is not Result.NOT_FINITE
    assert solver.moves_lower == (first.lower_grad is not None)
    assert_like(first.lower_grad or {}, problem.variables("lower"))
    later = follow(answer, first)
    if not of.silent:  # the response reaches the upper level
        assert later.stats.response_norm > 0
        assert later.stats.lower_residual is not None


def assert_like(found: dict[str, torch.Tensor], variables: dict[str, Any]) -> None:
    """Finite numbers of the variables' kinds, without a graph."""
    for name, g in found.items():
        assert g.shape == variables[name].shape
        assert g.dtype == variables[name].dtype
        assert g.device == variables[name].device
        assert not g.requires_grad
        assert g.isfinite().all(), name


def follow(answer: Any, first: Hypergradient) -> Hypergradient:
    """The third answer of a solver with auxiliary variables: none of its states is written into."""
    answers = [first]
    for _ in range(2 if first.state is not None else 0):
        given = answers[-1].state
        kept = copy.deepcopy(given)
        answers.append(answer(given))
        optree.tree_map(assert_same, given, kept)
        loadable(answers[-1].state, "solver")
        assert all(g.isfinite().all() for g in answers[-1].grad.values())
    return answers[-1]


def error(of: SolverRow, solver: Solver) -> float:
    """The relative error at the lower solution of the quadratic, once a solver's state has settled."""
    problem = Quadratic().solve()
    optimizer = None if of.optimizer is None else of.optimizer(problem)
    state: Any = None
    for _ in range(of.calls):
        answer = solver.hypergradient(problem, state=state, lower_optimizer=optimizer)
        state = answer.state
        for name, g in (answer.lower_grad or {}).items():
            problem.variables("lower")[name].data.sub_(of.lower_step * g)
    truth = Quadratic().solve().hypergradient()
    return float((answer.grad["x"] - truth).norm() / truth.norm())


@pytest.mark.parametrize("name", [n for n, row in SOLVER_ROWS.items() if row.law is not None])
def test_the_error_is_what_theory_says(name: str) -> None:
    of = SOLVER_ROWS[name]
    if isinstance(of.law, Exact):
        assert error(of, of.law.solver or of.solver) < of.law.within
    elif isinstance(of.law, Falls):
        errors = [error(of, solver) for solver in of.law.rungs]
        assert errors[0] < 1, "it must be a small error that falls"
        for one, next_one in itertools.pairwise(errors):
            assert next_one / one == pytest.approx(of.law.ratio, rel=of.law.rtol)


@pytest.mark.parametrize("name", SOLVER_ROWS)
def test_a_resumed_run_is_the_same_to_the_bit(name: str, tmp_path: Path) -> None:
    """Auxiliary variables, tables and generators are part of a run."""
    of = SOLVER_ROWS[name]

    def run(**changes: Any) -> dict[str, Any]:
        steps = {} if of.solver.moves_lower else {"lower_steps": 2}
        settings = resumed.make(solver="alternating", **changes) | {"solver": of.solver}
        settings = settings | {"lower_steps": None, "num_steps": 4, "throw": False} | steps
        if of.optimizer is not None:
            settings["lower_optimizer"] = of.optimizer(settings["problem"])
            settings["lower_scheduler"] = ()
        return settings

    whole, path = resumed.finish(run()), tmp_path / "run.pt"
    resumed.finish(run(), path, 2)
    resumed.assert_same(resumed.finish(run(resume=path)), whole)


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

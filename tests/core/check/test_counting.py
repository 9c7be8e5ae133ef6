"""Oracle calls, counting as autograd takes them, against what the algorithms say of themselves."""

from typing import Any

import pytest
import torch

from bilevel import (
    Alternating,
    Cholesky,
    Identity,
    Implicit,
    Neumann,
    Problem,
    Response,
    ResponseProduct,
    Solver,
    Unrolled,
)
from bilevel.check.cases import CASES, case_named
from bilevel.check.counting import OracleCalls, counting

QUADRATIC = 20  # its lower variables


class Twice(Solver):
    """A solver of somebody's own that reports nothing: a product by hand."""

    def num_lower_batches(self) -> int:
        return 1

    def respond(self, oracles: Any, state: Any, lower_optimizer: Any) -> Response:
        upper, lower = oracles.upper, oracles.lower

        def vjp(cotangent: Any) -> ResponseProduct:
            loss = oracles.evaluate("lower", upper, lower).loss
            (g,) = torch.autograd.grad(loss, list(lower.values()), create_graph=True)
            for _ in range(2):
                torch.autograd.grad(g, list(lower.values()), cotangent["y"], retain_graph=True)
            return ResponseProduct({n: torch.zeros_like(x) for n, x in upper.items()})

        return Response(lower, vjp)


ROWS: list[tuple[Solver, OracleCalls]] = [
    (Alternating(), OracleCalls(1)),
    (Implicit(Identity()), OracleCalls(2, 0, 2, 0, 1, 3)),
    (Implicit(Neumann(num_steps=7, step_size=0.1)), OracleCalls(2, 0, 2, 7, 1, 10)),
    (Implicit(Cholesky()), OracleCalls(2, 0, 2, QUADRATIC, 1, 3 + QUADRATIC)),  # columns at once
    (Unrolled(5), OracleCalls(6, 0, 6, 4, 5, 15)),  # the first step's y is a constant
    (Unrolled(5, mode="recompute"), OracleCalls(11, 0, 11, 5, 5, 21)),
    # a run for each of the five entries of x
    (Unrolled(3, mode="forward"), OracleCalls(19, 0, 19, 15, 0, 34)),
    # gradients with tangents: two sweeps and the products of a third
    (Unrolled(5, mode="mixed"), OracleCalls(15, 5, 15, 5, 5, 30)),
    (Twice(), OracleCalls(2, 0, 2, 2, 0, 4)),
]


@pytest.mark.parametrize(("solver", "calls"), ROWS, ids=lambda value: type(value).__name__)
def test_every_derivative_is_counted_and_no_number_changes(
    solver: Solver, calls: OracleCalls
) -> None:
    case = CASES["quadratic"](0).ready()
    given = case.problem, case.upper_batch, case.lower_batches
    plain = solver.hypergradient(*given, lower_optimizer=case.lower_optimizer, throw=False)
    before = case.problem.state_dict()
    with counting(case.problem) as tally:
        same = solver.hypergradient(*given, lower_optimizer=case.lower_optimizer, throw=False)
    assert tally.calls() == calls
    assert all(torch.equal(same.grad[name], g) for name, g in plain.grad.items())
    assert all(
        torch.equal(before[name], value) for name, value in case.problem.state_dict().items()
    )
    solver.hypergradient(*given, lower_optimizer=case.lower_optimizer, throw=False)
    assert tally.calls() == calls, "only what happens inside counts"


def test_samples_are_the_rows_of_the_batches() -> None:
    case = case_named("ridge", 0)
    assert case is not None
    solver = Implicit(Identity())
    solver.hypergradient(case.problem, case.upper_batch, case.lower_batches)
    with counting(case.problem) as tally:
        solver.hypergradient(case.problem, case.upper_batch, case.lower_batches)
    assert tally.calls().samples == 30 * tally.calls().total == 90


def test_variables_are_put_back_after_a_loss_that_fails() -> None:
    def fails(x: Any, y: Any, batch: Any) -> Any:
        raise RuntimeError("no")

    start = {"x": torch.ones(1)}, {"y": torch.ones(1)}
    problem = Problem.from_functions(fails, fails, *start)
    held = dict(problem.named_parameters())
    with counting(problem) as tally, pytest.raises(RuntimeError, match="no"):
        problem("upper", None)
    assert tally.calls().forward == 1
    assert all(held[name] is value for name, value in problem.named_parameters())

"""Every solver against the truth and each other, and the theorems on their errors."""

import math
from typing import Any

import pytest
import torch
import torchopt
from torch import Tensor

from bilevel import (
    GMRES,
    Alternating,
    Cholesky,
    ConjugateGradient,
    Implicit,
    Neumann,
    Solver,
    Unrolled,
)
from bilevel.check import solve_lower
from bilevel.oracles import Oracles
from tests.problems import ROWS, Problem, Quadratic, Ridge, normal, regression, spd

ETA = 0.4  # spectrum of H: 0.5 ... 4, so |1 - eta lambda| <= 0.8
EXACT: dict[str, Solver] = {
    "cg": Implicit(ConjugateGradient(rtol=1e-13)),
    "cg, looking seldom": Implicit(ConjugateGradient(rtol=1e-13, check_every=3)),
    "cholesky": Implicit(Cholesky()),
    "gmres": Implicit(GMRES(rtol=1e-13)),
    "neumann": Implicit(Neumann(num_steps=200, step_size=ETA, rtol=1e-12)),
    "a function": Implicit(lambda A, b: torch.linalg.solve(torch.stack([A(e) for e in eye(b)]), b)),
    "unrolled": Unrolled(200, torchopt.sgd(ETA)),
    "recomputed": Unrolled(200, torchopt.sgd(ETA), mode="recompute"),
    "truncated": Unrolled(200, torchopt.sgd(ETA), truncate=150),
    "forward": Unrolled(100, torchopt.sgd(ETA), mode="forward"),
}


def eye(b: Tensor) -> Tensor:
    return torch.eye(len(b), dtype=b.dtype)


def put(problem: Problem, level: Any, values: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, p in problem.variables(level).items():
            p.copy_(values[name])


@pytest.mark.parametrize("solver", EXACT.values(), ids=EXACT)
def test_closed_form_of_the_quadratic(solver: Solver) -> None:
    problem = Quadratic().solve()
    answer = solver.hypergradient(problem)
    torch.testing.assert_close(answer.grad["x"], problem.hypergradient(), rtol=1e-9, atol=1e-9)
    assert answer.stats.lower_residual is not None
    assert answer.stats.lower_residual < 1e-12
    direct = problem.upper["x"].detach() / 10
    assert float(answer.stats.direct_norm) == pytest.approx(float(direct.norm()))
    response = answer.grad["x"] - direct
    assert float(answer.stats.response_norm) == pytest.approx(float(response.norm()))


@pytest.mark.parametrize("solver", EXACT.values(), ids=EXACT)
def test_closed_form_of_ridge_regression(solver: Solver) -> None:
    problem, train, test = Ridge(), regression(seed=9), regression(seed=7)
    response = problem.best_response(train)
    loss = (test[0] @ response["w"] - test[1]).square().mean()
    (truth,) = torch.autograd.grad(loss, problem.upper["log_l2"])
    put(problem, "lower", {"w": response["w"].detach()})
    grad = solver.hypergradient(problem, test, [train]).grad["log_l2"]
    # 1e-7: the slowest direction of the least squares contracts by less than the quadratic's
    tolerance = 1e-7 if isinstance(solver, Unrolled) or "Neumann" in repr(solver) else 1e-9
    torch.testing.assert_close(grad, truth, rtol=tolerance, atol=tolerance)


def test_best_responses_are_solutions() -> None:
    for name in ("quadratic", "ridge"):
        row = ROWS[name]
        problem = row.make()
        closed = problem.best_response(row.lower_batch)
        assert closed is not None
        leaves = {n: y.detach().requires_grad_() for n, y in closed.items()}
        oracles = Oracles(problem, None, [row.lower_batch])
        _, grads = oracles.lower_gradient(oracles.upper, leaves)
        assert all(g is not None and g.abs().max() < 1e-12 for g in grads.values())


@pytest.mark.parametrize("row_name", ["logistic with logs", "nested dicts"])
def test_solvers_agree_at_the_solution(row_name: str) -> None:
    row = ROWS[row_name]
    problem = row.make()
    put(problem, "lower", solve_lower(Oracles(problem, row.upper_batch, [row.lower_batch])))
    reference = None
    for name in ("cg", "cholesky", "gmres", "a function"):
        grad = EXACT[name].hypergradient(problem, row.upper_batch, [row.lower_batch]).grad
        reference = reference or grad
        torch.testing.assert_close(grad, reference, rtol=1e-9, atol=1e-10)
    unrolled = Unrolled(600, torchopt.sgd(0.1), mode="recompute").hypergradient(
        problem, row.upper_batch, [row.lower_batch]
    )
    # plain gradient descent has not quite converged in the flattest direction
    torch.testing.assert_close(unrolled.grad, reference, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("terms", [1, 4, 10])
def test_truncated_unrolling_at_the_solution_is_neumann(terms: int) -> None:
    problem = Quadratic().solve()
    unrolled = Unrolled(12, torchopt.sgd(ETA), truncate=terms).hypergradient(problem)
    neumann = Implicit(Neumann(num_steps=terms, step_size=ETA)).hypergradient(problem)
    torch.testing.assert_close(unrolled.grad, neumann.grad, rtol=1e-12, atol=1e-12)


def rate(errors: dict[int, float], times: int = 0) -> float:
    """Slope of log(error / K^times) in K: the contraction per step, by least squares."""
    k = torch.tensor(list(errors)).double()
    y = torch.tensor([math.log(e) - times * math.log(s) for s, e in errors.items()]).double()
    k, y = k - k.mean(), y - y.mean()
    return math.exp(float(k @ y / (k @ k)))


@pytest.mark.parametrize("eta", [0.1, 0.3, 0.47])
@pytest.mark.parametrize("kind", ["implicit", "unrolled"])
def test_error_contracts_at_the_predicted_rate(kind: str, eta: float) -> None:
    """Gradient descent contracts by rho = max |1 - eta lambda|.

    Implicit differentiation at y_K errs like |y_K - y*|, as rho^K; unrolling like K rho^K, for the
    derivative of the iterates lags behind them.
    """
    problem = Quadratic()
    rho = max(abs(1 - eta * 0.5), abs(1 - eta * 4.0))
    truth, errors = problem.hypergradient(), {}
    far = int(12 / -math.log(rho))
    for steps in range(far // 2, far, max(1, far // 12)):
        if kind == "unrolled":
            answer = Unrolled(steps, torchopt.sgd(eta)).hypergradient(problem)
        else:
            walked = Quadratic()
            descent = torch.optim.SGD(walked.lower.parameters(), eta)
            for _ in range(steps):
                walked.lower["y"].grad = torch.autograd.grad(
                    walked.lower_loss(None), walked.lower["y"]
                )[0]
                descent.step()
            answer = Implicit(Cholesky()).hypergradient(walked)
        errors[steps] = float((answer.grad["x"] - truth).norm())
    # 2 %: the second slowest direction has not quite died out
    assert rate(errors, times=kind == "unrolled") == pytest.approx(rho, rel=0.02)


def test_implicit_error_is_of_the_order_of_the_lower_residual() -> None:
    truth, ratios = Quadratic().hypergradient(), []
    for distance in (1e-1, 1e-3, 1e-5):
        problem = Quadratic().solve()
        with torch.no_grad():
            problem.lower["y"] += distance * normal(4, seed=3)
        answer = Implicit(Cholesky()).hypergradient(problem)
        residual = answer.stats.lower_residual
        assert residual is not None
        ratios.append(float((answer.grad["x"] - truth).norm() / residual))
    assert max(ratios) == pytest.approx(min(ratios), rel=1e-6)


def test_alternating_is_exact_on_a_minimax_problem() -> None:
    """F = -G: at the lower solution dF/dy = 0 and there is nothing to drop."""
    H = spd(3)
    problem = Problem.from_functions(
        lambda x, y, _: -(y["y"] @ H @ y["y"] / 2 - y["y"] @ x["x"]),
        lambda x, y, _: y["y"] @ H @ y["y"] / 2 - y["y"] @ x["x"],
        {"x": normal(3)},
        {"y": normal(3)},
    )
    x = problem.variables("upper")["x"].detach()
    put(problem, "lower", {"y": torch.linalg.solve(H, x)})
    grads = [s.hypergradient(problem).grad for s in (Alternating(), Implicit(Cholesky()))]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grads[0]["x"], torch.linalg.solve(H, x), rtol=1e-12, atol=1e-12)


def test_warm_starts_travel_in_the_record() -> None:
    problem = Quadratic().solve()
    solver = Implicit(ConjugateGradient(max_steps=2, rtol=None, warm_start=True))
    state, errors = None, []
    for _ in range(6):
        answer = solver.hypergradient(problem, state=state)
        state = answer.state
        errors.append(float((answer.grad["x"] - problem.hypergradient()).norm()))
    assert errors[-1] < 1e-2 * errors[0]
    assert Implicit().hypergradient(problem).state is None


def test_an_upper_loss_that_ignores_a_level() -> None:
    flat = {"x": normal(2)}, {"y": normal(2)}

    def lower(x: Any, y: Any, _: Any) -> Tensor:
        return (y["y"] - x["x"]).square().sum()

    no_y = Problem.from_functions(lambda x, y, _: x["x"].sum(), lower, *flat)
    no_x = Problem.from_functions(lambda x, y, _: y["y"].sum(), lower, *flat)
    for solver in (Implicit(), Implicit(Cholesky()), Implicit(GMRES()), EXACT["a function"]):
        assert torch.equal(solver.hypergradient(no_y).grad["x"], torch.ones(2).double())
        torch.testing.assert_close(solver.hypergradient(no_x).grad["x"], torch.ones(2).double())

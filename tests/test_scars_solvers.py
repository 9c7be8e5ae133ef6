"""Wrong answers that solvers once gave without a word; each test says what it guards."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torchopt
from torch import Tensor, nn

from bilevel import (
    GMRES,
    Cholesky,
    ConjugateGradient,
    HypergradientError,
    Identity,
    Implicit,
    LinearSolver,
    Neumann,
    Problem,
    Result,
    Unrolled,
)
from bilevel.solvers.unrolled import MODES
from tests.problems import Ridge, normal, regression, spd

# ------------------------------------------------------------------ residuals of linear solves

N = 8


def spectrum(eigenvalues: Any, seed: int = 0) -> Tensor:
    """A symmetric matrix with these eigenvalues."""
    q, _ = torch.linalg.qr(normal(len(eigenvalues), len(eigenvalues), seed=seed))
    matrix = q @ torch.diag(torch.as_tensor(eigenvalues, dtype=torch.float64)) @ q.mT
    return (matrix + matrix.mT) / 2


def rotation(seed: int = 2) -> Tensor:
    return torch.linalg.qr(normal(N, N, seed=seed))[0]


FLAT = spectrum([0.0, 0.0, *np.linspace(0.5, 4, N - 2)])
WIDE = normal(N - 1, N, seed=5)  # of rank N - 1
GRAM = WIDE.mT @ WIDE
UNITS, ROWS = torch.logspace(-6, 6, N).double(), torch.logspace(0, 12, N).double()
ANY = normal(N, seed=1)

OK, FEW, NEG = Result.SUCCESS, Result.NOT_CONVERGED, Result.NEGATIVE_CURVATURE
SING, GROWS, NAN = Result.SINGULAR, Result.DIVERGED, Result.NOT_FINITE

LINEAR: dict[str, LinearSolver] = {
    "cg": ConjugateGradient(),
    "cg, looking seldom": ConjugateGradient(check_every=7),
    "cholesky": Cholesky(),
    "gmres": GMRES(),
    "neumann": Neumann(2000, 0.3, rtol=1e-5),
}
# matrix, right-hand side, and what each of cg, cholesky, gmres and neumann says in float64, float32
SYSTEMS: dict[str, tuple[Tensor, Tensor, tuple[Result, ...], tuple[Result, ...]]] = {
    "definite": (spd(N), ANY, (OK, OK, OK, OK), (OK, OK, OK, OK)),
    "singular, consistent": (FLAT, FLAT @ ANY, (OK, OK, OK, OK), (OK, OK, OK, OK)),
    "singular": (FLAT, ANY, (SING, SING, SING, FEW), (SING, SING, SING, FEW)),
    "least squares, consistent": (
        GRAM / 4,
        GRAM @ ANY,
        (OK, OK, OK, OK),
        (OK, OK, OK, OK),
    ),
    "least squares, singular": (GRAM / 4, ANY, (SING, SING, SING, FEW), (SING, SING, SING, FEW)),
    "indefinite": (
        spectrum([*np.linspace(0.5, 4, N - 1), -1]),
        ANY,
        (NEG, NEG, OK, GROWS),
        (NEG, NEG, OK, GROWS),
    ),
    "saddle, curvature exactly 0": (
        torch.tensor([[0.0, 1.0], [1.0, 0.0]]).double(),
        torch.tensor([1.0, 0.0]).double(),
        (NEG, NEG, OK, GROWS),
        (NEG, NEG, OK, GROWS),
    ),
    "not symmetric": (rotation() @ spd(N), ANY, (NEG, OK, OK, GROWS), (NEG, OK, OK, GROWS)),
    "not symmetric, singular": (
        rotation() @ FLAT,
        ANY,
        (NEG, SING, SING, GROWS),
        (NEG, SING, SING, GROWS),
    ),
    "condition 1e12": (
        spectrum(np.logspace(-12, 0, N)),
        ANY,
        (FEW, FEW, FEW, FEW),
        (SING, SING, SING, FEW),
    ),
    # every row has its own unit: only a direct solver does not care
    "diagonal of 1e12": (
        torch.diag(UNITS),
        torch.ones(N).double(),
        (OK, OK, OK, GROWS),
        (SING, OK, SING, GROWS),
    ),
    "rows scaled by 1e12": (
        ROWS[:, None] * spd(N),
        ROWS * ANY,
        (FEW, OK, OK, GROWS),
        (SING, OK, OK, GROWS),
    ),
    "b = 0": (spd(N), torch.zeros(N).double(), (OK, OK, OK, OK), (OK, OK, OK, OK)),
    "A = 0": (torch.zeros(N, N).double(), ANY, (SING, SING, SING, FEW), (SING, SING, SING, FEW)),
    "one number": (torch.ones(1, 1).double(), ANY[:1], (OK, OK, OK, OK), (OK, OK, OK, OK)),
    "minus one": (
        -torch.ones(1, 1).double(),
        ANY[:1],
        (NEG, NEG, OK, GROWS),
        (NEG, NEG, OK, GROWS),
    ),
    "NaN": (spd(N) * math.nan, ANY, (NAN, NAN, NAN, NAN), (NAN, NAN, NAN, NAN)),
    "infinite": (spd(N) * math.inf, ANY, (NAN, NAN, NAN, NAN), (NAN, NAN, NAN, NAN)),
}


def exact_residual(A: Tensor, w: Tensor, b: Tensor) -> float:
    """|b - A w| / |b| in extended precision: by no product that a solver has seen."""
    A_, w_, b_ = (t.numpy().astype(np.longdouble) for t in (A, w, b))
    missing, size = np.sqrt(np.sum((b_ - A_ @ w_) ** 2)), np.sqrt(np.sum(b_**2))
    return float(missing / size) if size else float(missing)


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("system", SYSTEMS)
def test_every_outcome_of_a_linear_solve_is_true(
    system: str, name: str, dtype: torch.dtype
) -> None:
    """A success meets its tolerance, singular is not "negative", and no failure is a huge vector."""
    A, b = (t.to(dtype) for t in SYSTEMS[system][:2])
    column = {"cholesky": 1, "gmres": 2, "neumann": 3}.get(name, 0)
    found = LINEAR[name].solve(lambda v: A @ v, b)
    assert found.result is SYSTEMS[system][2 if dtype == torch.float64 else 3][column]
    assert found.negative_curvature == (found.result is NEG)
    assert found.residual is not None
    if not bool(A.isfinite().all() & found.value.isfinite().all()):
        assert found.result in (NAN, GROWS)
        return
    true = exact_residual(A, found.value, b)
    # what rounding allows: the product A w itself is good to a few eps |A| |w|
    scale = float(A.abs().double().sum(1).max() * found.value.double().norm() / b.double().norm())
    slack = 4 * torch.finfo(dtype).eps * scale if scale == scale else 0.0
    assert abs(float(found.residual) - true) <= slack + 1e-6 * true
    if found.result is OK:
        goal = {"gmres": 1e-5, "neumann": 1e-5}.get(name, torch.finfo(dtype).eps ** 0.5)
        assert true <= goal * (1 + 1e-6) + slack
    if found.result is SING and system != "condition 1e12":
        # of the size of the pseudo-inverse's answer, not 1e16
        least = (torch.linalg.pinv(A.double()) @ b.double()).norm()
        assert found.value.double().norm() <= 10 * least + 1e-30


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_cholesky_never_takes_a_singular_system_for_a_success(dtype: torch.dtype) -> None:
    """Rounding decides whether the last pivot is negative: 45 in 100 of these were a success."""
    for seed in range(100):
        wide, b = normal(11, 12, seed=seed).to(dtype), normal(12, seed=seed + 1000).to(dtype)
        gram = wide.mT @ wide
        found = Cholesky().solve(lambda v, gram=gram: gram @ v, b)
        assert found.result is SING
        # the least-squares solution of least norm, to what 1 / (smallest eigenvalue) leaves
        truth = torch.linalg.pinv(gram.double(), rtol=1e-5) @ b.double()
        torch.testing.assert_close(
            found.value.double(),
            truth,
            rtol=0,
            atol=(1e-2 if dtype == torch.float32 else 1e-8) * float(truth.norm()),
        )
        consistent = Cholesky().solve(lambda v, gram=gram: gram @ v, gram @ b)
        assert consistent.result is OK


def by_recursion(A: Tensor, b: Tensor, goal: float) -> tuple[Tensor, float]:
    """Textbook conjugate gradients: iterate and relative residual, both as the recursion has them."""
    w, r = torch.zeros_like(b), b / b.norm()
    p, rr = r, r @ r
    while rr.sqrt() > goal:
        Ap = A @ p
        alpha = rr / (p @ Ap)
        w, r = w + b.norm() * alpha * p, r - alpha * Ap
        rr, before = r @ r, rr
        p = r + rr / before * p
    return w, float(rr.sqrt())


def test_cg_reports_the_true_residual_and_restarts_from_it() -> None:
    """In float32 the recursion arrives where the iterate does not."""
    goal = torch.finfo(torch.float32).eps ** 0.5
    b = normal(200, seed=1).float()
    for condition, drift, result in ((1e4, 1.2, OK), (1e6, 30, FEW)):
        A = spectrum(np.logspace(-math.log10(condition), 0, 200), seed=2).float()
        w, said = by_recursion(A, b, goal)
        assert said <= goal < drift * goal < exact_residual(A, w, b)
        found = ConjugateGradient(max_steps=5000).solve(lambda v, A=A: A @ v, b)
        true = exact_residual(A, found.value, b)
        # the product that the residual is made of is good to about eps |A| |w| / |b|, 10 % here
        assert float(found.residual or 0) == pytest.approx(true, rel=0.2)
        assert found.result is result
        assert found.num_products < 5001  # restarts end where they no longer help


@pytest.mark.parametrize("rtol", [None, "auto"])
def test_a_solve_takes_one_product_more_than_steps(rtol: Any) -> None:
    """The true residual costs one product, and a start that is right already none."""
    A, b = spd(N), normal(N)
    calls: list[Tensor] = []

    def operator(v: Tensor) -> Tensor:
        calls.append(v)
        return A @ v

    for solver, count in (
        (ConjugateGradient(max_steps=3, rtol=rtol), 4),
        (GMRES(max_steps=3, rtol=None), 4),
        (Neumann(num_steps=3), 3),  # its terms are the residuals
        (Identity(), 0),
    ):
        calls.clear()
        assert solver.solve(operator, b).num_products == len(calls) == count
    calls.clear()
    assert ConjugateGradient(rtol=rtol).solve(operator, 0 * b).num_products == len(calls) == 0


def test_neumann_does_not_add_up_rounding() -> None:
    """Its residual was a recursion's, too; computed from the iterate it costs the same."""
    A, b = spd(N).float(), normal(N).float()
    found = Neumann(5000, 0.4, rtol=1e-6).solve(lambda v: A @ v, b)
    assert found.result is OK
    assert exact_residual(A, found.value, b) < 1e-6


def test_identity_does_not_call_nan_a_success() -> None:
    assert Identity().solve(lambda v: v, normal(3) * math.nan).result is NAN


def answers(function: Callable[[Any, Tensor], Any]) -> Any:
    problem = Ridge()
    return Implicit(function).hypergradient(problem, regression(), [regression(seed=9)])


def test_a_function_that_solves_nothing_is_no_success() -> None:
    """An answer no better than zero; one truncated on purpose is a success with its residual."""
    for useless in (lambda A, b: torch.zeros_like(b), lambda A, b: 1e3 * b, lambda A, b: -b):
        with pytest.raises(HypergradientError, match="without reaching its tolerance"):
            answers(useless)
    with pytest.raises(HypergradientError, match="NaN"):
        answers(lambda A, b: b * math.nan)
    partly = answers(lambda A, b: 0.1 * b)
    assert 0.01 < partly.stats.linear_residual < 1
    for wrong in (lambda A, b: b[:1], lambda A, b: None, lambda A, b: b[:, None]):
        with pytest.raises(TypeError, match=r"must return a vector of shape \(3,\)"):
            answers(wrong)


def test_a_lower_loss_linear_in_its_variables_is_one_sentence() -> None:
    """`Cholesky` died of an empty list; the Hessian is zero, and that is what it says."""
    problem = Problem.from_functions(
        lambda x, y, _: y["y"].sum(),
        lambda x, y, _: (y["y"] * 2).sum() + x["x"],
        {"x": torch.tensor(1.0)},
        {"y": torch.zeros(2)},
    )
    for solver in (Cholesky(), ConjugateGradient(), GMRES()):
        with pytest.raises(HypergradientError, match="Hessian is singular"):
            Implicit(solver).hypergradient(problem)
    assert torch.equal(Cholesky().solve(lambda v: v, torch.ones(2)).value, torch.ones(2))


# ------------------------------------------------------------------ several lower batches


class Net(Problem):
    """A small network with dropout-free training and a learned penalty."""

    def __init__(self) -> None:
        super().__init__()
        self.upper = nn.ParameterDict({"l": torch.tensor([-1.0, 0.5]).double()})
        self.lower = nn.Linear(3, 1).double()
        with torch.no_grad():
            self.lower.weight.copy_(normal(1, 3, seed=3))
            self.lower.bias.zero_()

    def upper_loss(self, batch: Any) -> Tensor:
        return (self.lower(batch[0])[:, 0] - batch[1]).square().mean()

    def lower_loss(self, batch: Any) -> Tensor:
        fit = (self.lower(batch[0])[:, 0] - batch[1]).cosh().mean()
        penalty = self.lower.weight.square() @ self.upper["l"].exp().repeat(2)[:3]
        return fit + penalty.sum() + self.lower.bias.square().sum()


@pytest.mark.parametrize("linear", [Cholesky(), ConjugateGradient(rtol=1e-13)], ids=repr)
def test_implicit_averages_several_lower_batches(linear: LinearSolver) -> None:
    """It took the first and dropped the rest; the batches together are one batch of all rows."""
    inputs, targets = regression(rows=12, seed=9)
    batches = [(inputs[i : i + 4], targets[i : i + 4]) for i in (0, 4, 8)]
    upper, solver = regression(seed=7), Implicit(linear)
    together = solver.hypergradient(Net(), upper, [(inputs, targets)])
    apart = solver.hypergradient(Net(), upper, batches)
    torch.testing.assert_close(apart.grad, together.grad, rtol=1e-11, atol=0)
    torch.testing.assert_close(
        apart.stats.lower_residual, together.stats.lower_residual, rtol=1e-12, atol=0
    )
    first = solver.hypergradient(Net(), upper, batches[:1])
    assert (first.grad["l"] - together.grad["l"]).norm() > 1e-3 * together.grad["l"].norm()


# ------------------------------------------------------------------ unrolled steps


class PartlyMoved(Problem):
    """The optimizer moves one of two lower variables, and all gradients are clipped together."""

    def __init__(self) -> None:
        super().__init__()
        self.upper = nn.ParameterDict({"x": torch.tensor(0.5).double()})
        self.lower = nn.ParameterDict(
            {
                "moved": torch.tensor([1.0, -1.0]).double(),
                "kept": torch.tensor([2.0, 1.0]).double(),
            }
        )

    def upper_loss(self, batch: Any) -> Tensor:
        return (self.lower["moved"] - 0.2).square().sum()

    def lower_loss(self, batch: Any) -> Tensor:
        return (self.lower["moved"] * self.lower["kept"] - self.upper["x"]).square().sum()


def real_loop(shift: float) -> float:
    problem = PartlyMoved()
    with torch.no_grad():
        problem.upper["x"] += shift
    optimizer = torch.optim.SGD([problem.lower["moved"]], 0.5)
    variables = list(problem.lower.parameters())
    for _ in range(6):
        grads = torch.autograd.grad(problem.lower_loss(None), variables)
        for variable, grad in zip(variables, grads, strict=True):
            variable.grad = grad
        nn.utils.clip_grad_norm_(variables, 0.5)
        optimizer.step()
    return float(problem.upper_loss(None).detach())


@pytest.mark.parametrize("mode", MODES)
def test_clipping_with_variables_that_no_optimizer_moves(mode: Any) -> None:
    """In reverse mode their gradient ran through earlier steps: -.120 where -.159 is right."""
    problem = PartlyMoved()
    optimizer = torch.optim.SGD([problem.lower["moved"]], 0.5)
    found = Unrolled(6, mode=mode, max_grad_norm=0.5).hypergradient(
        problem, lower_optimizer=optimizer
    )
    assert float(found.value) == pytest.approx(real_loop(0), rel=1e-12)
    truth = (real_loop(1e-5) - real_loop(-1e-5)) / 2e-5
    assert float(found.grad["x"]) == pytest.approx(truth, rel=1e-8)


BASE = torch.tensor([[2.0, 0.3, 0.1], [0.2, 3.0, 0.4], [0.5, 0.1, 2.5]]).double()
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "slogdet": lambda a: torch.linalg.slogdet(a)[1],
    "det": lambda a: torch.linalg.det(a) / 30,
    "solve": lambda a: torch.linalg.solve(a, a.new_ones(3)).sum(),
    "inv": lambda a: torch.linalg.inv(a).sum(),
    "cholesky": lambda a: torch.linalg.cholesky(a @ a.mT).sum() / 10,
    "prod": lambda a: a.prod() * 10,
    "cumprod": lambda a: a.cumprod(0).sum() / 10,
    "scatter prod": lambda a: (
        a.new_ones(3).scatter_reduce(0, torch.tensor([0, 1, 0]), a.diagonal(), "prod").sum() / 10
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_forward_mode_through_functions_with_saved_factors(name: str) -> None:
    """torch's backward of these used the saved factors without tangents: 0 where .149 is right."""
    problem = Problem.from_functions(
        lambda x, y, _: y["y"].sin().sum(),
        lambda x, y, _: FUNCTIONS[name](BASE * (1 + x["x"]) + y["y"]) + y["y"].square().sum(),
        {"x": torch.tensor(0.3).double()},
        {"y": torch.zeros(3, 3).double()},
    )
    if name == "scatter prod":  # wrong in torch even so: found by comparing with reverse mode
        with pytest.raises(ValueError, match='use `mode="recompute"`'):
            Unrolled(3, torchopt.sgd(0.1), mode="forward").hypergradient(problem)
        return
    forward, recompute = (
        Unrolled(3, torchopt.sgd(0.1), mode=mode).hypergradient(problem).grad["x"]
        for mode in ("forward", "recompute")
    )
    torch.testing.assert_close(forward, recompute, rtol=1e-10, atol=1e-12)


def test_forward_mode_of_a_transposed_variable() -> None:
    def problem() -> Problem:
        return Problem.from_functions(
            lambda x, y, _: (y["a"] - 1).pow(3).sum(),
            lambda x, y, _: (y["a"] - x["x"].sin()).square().sum(),
            {"x": torch.linspace(0, 1, 6).double().view(2, 3).T},
            {"a": torch.zeros(3, 2).double()},
        )

    grads = [
        Unrolled(2, torchopt.sgd(0.1), mode=mode).hypergradient(problem()).grad["x"]
        for mode in ("reverse", "forward")
    ]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-12, atol=0)


def learned(rate: Any) -> Problem:
    return Problem.from_functions(
        lambda x, y, _: y["y"].square().sum(),
        lambda x, y, _: (y["y"] - 1).square().sum(),
        {"lr": rate},
        {"y": torch.zeros(2)},
    )


@pytest.mark.parametrize("make", [torchopt.sgd, torchopt.adam, torchopt.adamw])
def test_moments_that_require_grad_are_no_learned_settings(make: Any) -> None:
    """torchopt's own option for differentiable runs makes leaves of the moments."""
    settings = {"momentum": 0.9} if make is torchopt.sgd else {}
    problem = learned(torch.tensor(0.1))
    answers = [
        Unrolled(3, make(0.1, **settings, moment_requires_grad=flag)).hypergradient(problem).value
        for flag in (False, True)
    ]
    assert torch.equal(*answers)


def test_learned_rates_are_differentiated_or_refused_by_name() -> None:
    """Their hypergradient was exactly 0, and the check agreed."""
    problem = learned(torch.tensor(0.1))
    rate = problem.variables("upper")["lr"]
    for option in ("lr", "weight_decay"):
        settings = {"lr": 0.1, option: rate}
        optimizer = torch.optim.SGD(problem.lower.parameters(), **settings)
        assert Unrolled(2).hypergradient(problem, lower_optimizer=optimizer).grad["lr"] != 0
        for other in (
            rate * 1,
            rate.detach(),
        ):  # what is computed from it, or only shares its memory
            optimizer = torch.optim.SGD(problem.lower.parameters(), **{**settings, option: other})
            with pytest.raises(ValueError, match=f"`{option}` of the lower optimizer"):
                Unrolled(2).hypergradient(problem, lower_optimizer=optimizer)
    with pytest.raises(ValueError, match="`step_size` of the transformation"):
        Unrolled(2, torchopt.sgd(rate))
    with pytest.raises(ValueError, match="requires grad"):
        Unrolled(2, torchopt.sgd(lambda step: rate * 0.9**step))
    plain = torch.optim.SGD(problem.lower.parameters(), lr=torch.tensor(0.1))
    assert Unrolled(2).hypergradient(problem, lower_optimizer=plain).value > 0

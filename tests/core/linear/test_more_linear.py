"""Laws of the linear solvers for systems that are indefinite, not symmetric, contracting or large."""

import math
import re
from typing import Any

import optree
import pytest
import scipy.sparse.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bilevel import (
    MINRES,
    T1T2,
    BiCGStab,
    ConjugateGradient,
    FixedPoint,
    Identity,
    Implicit,
    LinearSolver,
    NormalCG,
    Nystrom,
    Result,
    SciPy,
)
from bilevel.linear import LinearSolution
from bilevel.linear.base import damped
from tests.problems import Quadratic, normal, spd

few = settings(max_examples=10, deadline=None)
SIZES, SEEDS = st.integers(1, 12), st.integers(0, 10_000)


class Matrix:
    """Products with a matrix, and with its transpose."""

    def __init__(self, A: Tensor, at_once: bool = False) -> None:
        self.A, self.at_once = A, at_once

    def __call__(self, vector: Tensor) -> Tensor:
        return self.A @ vector

    @property
    def transposed(self) -> "Matrix":
        return Matrix(self.A.mT, self.at_once)


def solve(solver: LinearSolver, A: Tensor, b: Tensor, **keywords: Any) -> LinearSolution:
    return solver.solve(Matrix(A), b, **keywords)


def system(kind: str, n: int, seed: int) -> Tensor:
    """A matrix with singular values between 1/2 and 2, but for the ill-conditioned one."""
    q, _ = torch.linalg.qr(normal(n, n, seed=seed))
    p, _ = torch.linalg.qr(normal(n, n, seed=seed + 1))
    sizes = torch.linspace(0.5, 2, n, dtype=torch.double)
    signs = torch.ones(n, dtype=torch.double)
    if kind == "nonsymmetric":
        return torch.eye(n).double() + 0.4 * q
    if kind == "any":
        return (q * sizes) @ p.mT
    if kind == "indefinite":
        signs[::2] = -1
    if kind == "ill":
        sizes = torch.logspace(-5, 0, n, dtype=torch.double)
    return (q * (sizes * signs)) @ q.mT


SOLVES: dict[str, list[LinearSolver]] = {
    "definite": [
        MINRES(rtol=1e-13),
        BiCGStab(rtol=1e-13),
        NormalCG(rtol=1e-13),
        FixedPoint(rtol=1e-13, step_size=0.5),
        SciPy(scipy.sparse.linalg.cg, rtol=1e-13),
        ConjugateGradient(rtol=1e-13, preconditioner=Nystrom(rank=3)),
    ],
    "indefinite": [MINRES(rtol=1e-13), NormalCG(rtol=1e-13)],
    "nonsymmetric": [
        BiCGStab(rtol=1e-13),
        NormalCG(rtol=1e-13),
        FixedPoint(rtol=1e-13, step_size=0.8),
        SciPy(scipy.sparse.linalg.gmres, rtol=1e-13),
    ],
    "any": [NormalCG(rtol=1e-13), SciPy(scipy.sparse.linalg.lsmr, rtol=1e-13)],
    "ill": [
        MINRES(2000, rtol=1e-12),
        NormalCG(20_000, rtol=1e-12),
        ConjugateGradient(2000, rtol=1e-12, preconditioner=Nystrom(rank=12)),
    ],
}
CASES = [(kind, solver) for kind, solvers in SOLVES.items() for solver in solvers]
KRYLOV: list[LinearSolver] = [MINRES(), BiCGStab(), NormalCG()]
ALL: list[LinearSolver] = [
    *KRYLOV,
    MINRES(3, rtol=1e-10, warm_start=True),
    BiCGStab(2, rtol=1e-10, warm_start=True),
    NormalCG(2, rtol=1e-10, warm_start=True),
    NormalCG(rtol=None, check_every=5),
    FixedPoint(step_size=0.1),
    FixedPoint(step_size=0.1, warm_start=True, check_every=3),
    Nystrom(rank=2, damping=2.0),
    ConjugateGradient(preconditioner=Nystrom(rank=2)),
    SciPy(scipy.sparse.linalg.cg),
    SciPy(scipy.sparse.linalg.cg, warm_start=True),
]


def name(value: Any) -> str:
    shown = re.sub(r" at 0x[0-9a-f]+", "", str(value))  # workers must agree on it
    return shown.replace("preconditioner", "with")[:60]


@pytest.mark.parametrize(("kind", "solver"), CASES, ids=name)
def test_solves_what_it_is_for(kind: str, solver: LinearSolver) -> None:
    for n, seed in ((1, 3), (7, 1), (12, 2)):
        A, b = system(kind, n, seed), normal(n, seed=seed + 9)
        truth = torch.linalg.solve(A, b)
        found = solve(solver, A, b)
        error = float((found.value - truth).norm() / truth.norm())
        assert error < (1e-10 if kind != "ill" else 1e-7), (n, error)
        assert kind == "ill" or found.result is Result.SUCCESS
        assert found.residual is not None  # the true one, up to rounding
        missing = (b - A @ found.value).norm() / b.norm()
        torch.testing.assert_close(found.residual, missing, rtol=0, atol=1e-11)
        if kind == "definite":
            assert not found.negative_curvature
            single = solve(type(solver)(**{**vars(solver), "rtol": 1e-5}), A.float(), b.float())
            assert single.result is Result.SUCCESS
            torch.testing.assert_close(single.value.double(), truth, rtol=1e-3, atol=1e-4)


@few
@given(SIZES, SEEDS)
def test_minres_has_the_least_residual_and_says_that_the_matrix_is_indefinite(
    n: int, seed: int
) -> None:
    A, b = system("indefinite", n, seed), normal(n, seed=seed + 1)
    last = float(b.norm())
    for k in range(1, n + 1):
        found = solve(MINRES(k, rtol=None), A, b)
        powers = [b]
        for _ in range(k - 1):
            powers.append(A @ powers[-1] / powers[-1].norm())
        basis, _ = torch.linalg.qr(torch.stack(powers, dim=1))
        best = torch.linalg.lstsq(A @ basis, b[:, None], driver="gelsd").solution
        least = float((b - A @ basis @ best[:, 0]).norm())
        assert abs(float((b - A @ found.value).norm()) - least) < 1e-6 * float(b.norm())
        assert least <= last + 1e-9
        last = least
    assert found.negative_curvature
    assert not solve(MINRES(), spd(n, seed=seed), b).negative_curvature


@pytest.mark.parametrize("solver", [MINRES(), NormalCG()], ids=name)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_singular_with_and_without_a_solution(solver: LinearSolver, dtype: torch.dtype) -> None:
    q, _ = torch.linalg.qr(normal(9, 9))
    values = torch.tensor([1, -1, 2, -2, 1.5, 0.5, 1, 0, 0], dtype=torch.double)
    A = ((q * values) @ q.mT).to(dtype)
    b = normal(9, seed=4).to(dtype)
    within = 1e-6 if dtype == torch.float64 else 1e-2
    found = solve(solver, A, A @ b)
    assert found.result is Result.SUCCESS
    found = solve(solver, A, b)
    assert found.result is Result.SINGULAR
    pinv = torch.linalg.pinv(A.double(), hermitian=True, rtol=1e-5) @ b.double()
    least = (b - A @ pinv.to(dtype)).norm() / b.norm()
    torch.testing.assert_close(found.residual, least, rtol=within, atol=0)
    assert float(found.value.norm()) < 10 * float(pinv.norm())


def test_bicgstab_says_that_it_broke_down() -> None:
    """On a rotation its first inner product is zero: whatever the number of steps."""
    A = torch.tensor([[0.0, 1.0], [-1.0, 0.0]]).double()
    found = solve(BiCGStab(), A, torch.tensor([1.0, 0.0]).double())
    assert found.result is Result.BREAKDOWN
    assert not found.value.any()
    assert "use `GMRES`" in found.result.value
    assert solve(NormalCG(), A, torch.tensor([1.0, 0.0]).double()).result is Result.SUCCESS


def test_normal_cg_refuses_an_operator_without_transpose() -> None:
    A, b = spd(3), normal(3)
    for damping in (0.0, 0.1):
        with pytest.raises(TypeError, match="`NormalCG` needs products with the transposed matrix"):
            NormalCG(damping=damping).solve(lambda v: A @ v, b)
    problem = Quadratic().solve()  # a loss has one
    found = Implicit(NormalCG(rtol=1e-12)).hypergradient(problem).grad["x"]
    torch.testing.assert_close(found, problem.hypergradient(), rtol=1e-10, atol=1e-10)


def test_damped_operators_keep_their_transpose() -> None:
    A, v = normal(3, 3), normal(3)
    back = damped(Matrix(A), 0.5).transposed  # type: ignore[attr-defined]
    torch.testing.assert_close(back(v), A.mT @ v + 0.5 * v)
    assert getattr(damped(lambda v: v, 0.5), "transposed", None) is None


def test_fixed_point_is_the_maps_own_iteration_and_tells_its_rate() -> None:
    q, _ = torch.linalg.qr(normal(5, 5))
    b = normal(5, seed=2)
    J = 0.9 * q
    w = torch.zeros_like(b)
    for k in range(1, 6):
        w = b + J @ w
        found = FixedPoint(max_steps=k, rtol=1e-12).solve(lambda v: v - J @ v, b)
        torch.testing.assert_close(found.value, w + 0, rtol=1e-12, atol=1e-12) if k > 2 else None
    assert found.result is Result.NOT_CONVERGED
    assert "contracts by 0.9 a step" in found.note
    steps = math.log(1e-12) / math.log(0.9)
    assert f"about {steps:.2g} steps" in found.note
    bad = FixedPoint(max_steps=50).solve(lambda v: v - 1.25 * (q @ v), b)
    assert bad.result is Result.DIVERGED
    assert "each step makes the residual 1.25 times as long" in bad.note
    assert float(bad.residual or 0) <= 1


def test_a_note_ends_the_message_of_a_hypergradient() -> None:
    with pytest.raises(RuntimeError, match=r"The map is no contraction here: .* 2\.\d+ times"):
        Implicit(FixedPoint()).hypergradient(Quadratic().solve())


@pytest.mark.parametrize("sketch", ["gaussian", "columns"])
def test_nystrom_is_exact_at_full_rank_and_better_with_more_rank(sketch: Any) -> None:
    A, b = spd(12), normal(12, seed=3)
    for damping in (1e-3, 1.0):
        truth = torch.linalg.solve(A + damping * torch.eye(12).double(), b)
        full = solve(Nystrom(12, damping, sketch), A, b)
        torch.testing.assert_close(full.value, truth, rtol=1e-10, atol=1e-10)
        assert float(full.residual or 0) < 1e-10
        assert torch.equal(solve(Nystrom(50, damping, sketch), A, b).value, full.value)
    q, _ = torch.linalg.qr(normal(40, 40))
    values = 10.0 ** -torch.arange(40, dtype=torch.double).div(4)
    A, b = (q * values) @ q.mT, normal(40, seed=3)
    truth = torch.linalg.solve(A + 1e-4 * torch.eye(40).double(), b)
    errors = []
    for rank in (4, 12, 20, 28):
        errors.append(float((solve(Nystrom(rank, 1e-4, sketch), A, b).value - truth).norm()))
    assert errors == sorted(errors, reverse=True)
    # beyond the k-th eigenvalue everything is taken for 0: a relative error of about l_k / damping
    assert errors[-1] < 10 * float(values[28]) / 1e-4 * float(truth.norm())


def test_nystrom_is_the_projection_on_its_columns() -> None:
    """The formula of Hataya and Yamada, by Woodbury's identity."""
    A, b, k, rho = spd(8), normal(8, seed=1), 3, 0.1
    random = torch.Generator().manual_seed(5)
    columns = torch.randperm(8, generator=random)[:k]
    C, W = A[:, columns], A[columns][:, columns]
    inner = torch.linalg.solve(W + C.mT @ C / rho, C.mT @ b)
    found = solve(Nystrom(k, rho, "columns", seed=5), A, b)
    torch.testing.assert_close(found.value, b / rho - C @ inner / rho**2, rtol=1e-10, atol=1e-10)
    assert found.num_products == k + 1


def test_nystrom_says_where_it_is_worse_than_zero_and_where_it_is_negative() -> None:
    found = solve(Nystrom(2, 1e-6), spd(12), normal(12))
    assert found.result is Result.NOT_CONVERGED
    assert "raise `rank` or `damping`" in found.note
    A = system("indefinite", 6, 1)
    found = solve(Nystrom(6, 0.1), A, normal(6))
    assert found.result is Result.NEGATIVE_CURVATURE
    truth = torch.linalg.solve(A + 0.1 * torch.eye(6).double(), normal(6))
    torch.testing.assert_close(found.value, truth, rtol=1e-9, atol=1e-9)
    assert solve(Nystrom(6, 3.0), A, normal(6)).result is Result.SUCCESS


@pytest.mark.parametrize("sketch", ["gaussian", "columns"])
def test_a_sketch_holds_no_square_of_a_long_vector(sketch: Any) -> None:
    sizes: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            out = func(*args, **(kwargs or {}))
            sizes.extend(leaf.numel() for leaf in optree.tree_leaves(out) if torch.is_tensor(leaf))
            return out

    n = 400
    with Watch():
        Nystrom(3, 1.0, sketch=sketch).solve(lambda v: 2 * v, torch.ones(n))
    assert max(sizes) <= 4 * n


def test_a_sketch_of_nothing() -> None:
    for solver in (ConjugateGradient(preconditioner=Nystrom(2)), MINRES(), NormalCG()):
        assert solve(solver, torch.zeros(3, 3), torch.ones(3)).result is Result.SINGULAR
    assert solve(Nystrom(2, 0.5), torch.zeros(3, 3), torch.ones(3)).value.tolist() == [2.0] * 3


def test_a_sketch_saves_conjugate_gradients_the_large_eigenvalues() -> None:
    q, _ = torch.linalg.qr(normal(60, 60))
    values = torch.cat([torch.logspace(2, 5, 10), torch.linspace(1, 2, 50)]).double()
    A, b = (q * values) @ q.mT, normal(60, seed=3)
    plain = solve(ConjugateGradient(rtol=1e-8), A, b)
    better = solve(ConjugateGradient(rtol=1e-8, preconditioner=Nystrom(rank=12)), A, b)
    assert plain.result is better.result is Result.SUCCESS
    torch.testing.assert_close(better.value, torch.linalg.solve(A, b), rtol=1e-6, atol=1e-6)
    assert better.num_products - 12 < plain.num_products / 2
    assert (
        solve(
            ConjugateGradient(rtol=1e-8, damping=0.1, preconditioner=Nystrom(rank=60)), A, b
        ).num_products
        < 60 + 5
    )


def test_scipy_solvers_take_options_and_starts_and_are_checked() -> None:
    A, b = spd(8), normal(8)
    short = solve(SciPy(scipy.sparse.linalg.cg, options={"maxiter": 2}), A, b)
    assert short.result is Result.NOT_CONVERGED
    assert short.num_products > 2
    truth = torch.linalg.solve(A, b)
    again = solve(SciPy(scipy.sparse.linalg.cg, warm_start=True), A, b, guess=truth)
    assert again.num_products < 4
    own = SciPy(lambda operator, b: b, rtol=None)
    assert own.solve(lambda v: 3 * v, b).result is Result.NOT_CONVERGED  # worse than zero
    assert own.solve(lambda v: 1.5 * v, b).result is Result.SUCCESS
    with pytest.raises(TypeError, match=r"must return a vector of shape \(8,\)"):
        solve(SciPy(lambda operator, b: b[:2]), A, b)
    with pytest.raises(TypeError, match=r"one of `scipy\.sparse\.linalg`"):
        SciPy("minres")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="an argument `x0`"):
        SciPy(lambda operator, b: b, warm_start=True)
    assert hash(SciPy(scipy.sparse.linalg.cg, options={"maxiter": 2})) is not None


def test_t1_t2_is_the_identity_in_place_of_the_inverse() -> None:
    assert T1T2 is Identity


@pytest.mark.parametrize("solver", ALL, ids=name)
def test_edges(solver: LinearSolver) -> None:
    """NaN is no success, zero is solved by zero, two solves are equal, and units do not matter."""
    A, b = spd(6), normal(6)
    nan = torch.tensor(float("nan"))
    for broken in (Matrix(A * nan), Matrix(A)):
        right = b if bool(broken.A.isnan().any()) else b * nan
        assert solver.solve(broken, right).result is Result.NOT_FINITE
    for guess in (None, normal(6)):
        found = solve(solver, A, torch.zeros(6).double(), guess=guess)
        assert found.result is Result.SUCCESS
        assert found.residual == 0
        assert not found.value.any()
    first, second = solve(solver, A, b), solve(solver, A.clone(), b.clone())
    assert torch.equal(first.value, second.value)
    assert torch.equal(solve(solver, A, 2.0**-120 * b).value, 2.0**-120 * first.value)
    small = solve(solver, A.float(), b.float() * 1e-25)
    torch.testing.assert_close(small.value.double() * 1e25, first.value, rtol=1e-2, atol=1e-3)
    if solver.warm_start:
        truth = torch.linalg.solve(A, b)
        torch.testing.assert_close(solve(solver, A, b, guess=truth).value, truth)
        useless = solve(solver, A, b, guess=1e6 * normal(6, seed=3))
        torch.testing.assert_close(useless.value, first.value)


@pytest.mark.parametrize("solver", KRYLOV, ids=name)
def test_looking_less_often_and_keeping_numbers_elsewhere_changes_nothing(
    solver: LinearSolver,
) -> None:
    A, b = system("definite", 7, 1), normal(7)
    often = solve(solver, A, b)
    seldom = solve(type(solver)(**{**vars(solver), "check_every": 7}), A, b)
    at_hand = solver.solve(Matrix(A, at_once=True), b)
    assert torch.equal(often.value, seldom.value)
    assert torch.equal(often.value, at_hand.value)
    assert often.result is seldom.result is at_hand.result is Result.SUCCESS


@pytest.mark.parametrize(
    ("make", "argument"),
    [
        (lambda: MINRES(max_steps=0), "max_steps"),
        (lambda: BiCGStab(damping=-1.0), "damping"),
        (lambda: NormalCG(rtol="small"), "rtol"),
        (lambda: FixedPoint(step_size=0.0), "step_size"),
        (lambda: Nystrom(rank=0), "rank"),
        (lambda: Nystrom(damping=0.0), "damping"),
        (lambda: Nystrom(sketch="rows"), "sketch"),  # type: ignore[arg-type]
        (lambda: SciPy(print, rtol=-1.0), "rtol"),
    ],
)
def test_settings_out_of_range(make: Any, argument: str) -> None:
    with pytest.raises(ValueError, match=f"`{argument}`"):
        make()

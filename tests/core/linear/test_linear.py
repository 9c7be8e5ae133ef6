"""Laws of the linear solvers, on random systems and at their edges."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bilevel import GMRES, Cholesky, ConjugateGradient, Identity, LinearSolver, Neumann, Result
from bilevel.linear import LinearSolution
from tests.problems import normal, spd

few = settings(max_examples=25, deadline=None)
SIZES, SEEDS = st.integers(1, 8), st.integers(0, 10_000)
WARM: list[LinearSolver] = [
    ConjugateGradient(max_steps=3, rtol=1e-10, warm_start=True),
    GMRES(max_steps=3, rtol=1e-10, warm_start=True),
    Neumann(num_steps=3, step_size=0.2, warm_start=True),
]
ALL: list[LinearSolver] = [
    *WARM,
    Cholesky(),
    ConjugateGradient(rtol=None),
    ConjugateGradient(check_every=7),
    GMRES(rtol=None, max_steps=9),
    GMRES(restart=2),
]


def solve(solver: LinearSolver, A: Tensor, b: Tensor, **keywords: Any) -> LinearSolution:
    return solver.solve(lambda v: A @ v, b, **keywords)


def a_norm(A: Tensor, e: Tensor) -> float:
    return float((e @ A @ e).clamp_min(0).sqrt())


@few
@given(SIZES, SEEDS)
def test_exact_solvers_solve_definite_systems(n: int, seed: int) -> None:
    A, b = spd(n, seed=seed), normal(n, seed=seed + 1)
    truth = torch.linalg.solve(A, b)
    exact: list[LinearSolver] = [
        ConjugateGradient(rtol=1e-12),
        ConjugateGradient(rtol=1e-12, check_every=5),
        Cholesky(),
        GMRES(rtol=1e-12),
        GMRES(rtol=1e-12, restart=3, max_steps=400),
        Neumann(num_steps=300, step_size=0.4, rtol=1e-12),
    ]
    for solver in exact:
        found = solve(solver, A, b)
        assert found.result is Result.SUCCESS, solver
        assert not found.negative_curvature
        torch.testing.assert_close(found.value, truth, rtol=1e-9, atol=1e-9)
        assert found.residual is not None
        torch.testing.assert_close(  # the residual reported is the true one, up to rounding
            found.residual, (b - A @ found.value).norm() / b.norm(), rtol=0, atol=1e-11
        )


@few
@given(SIZES, SEEDS)
def test_gmres_solves_any_invertible_system(n: int, seed: int) -> None:
    """Nonsymmetric and indefinite: a rotation of a definite matrix."""
    q, _ = torch.linalg.qr(normal(n, n, seed=seed + 2))
    A, b = q @ spd(n, seed=seed), normal(n, seed=seed + 1)
    truth = torch.linalg.solve(A, b)
    for solver in (GMRES(rtol=1e-11), Cholesky()):  # Cholesky turns to LU
        found = solve(solver, A, b)
        if isinstance(solver, Cholesky) and found.result is Result.NEGATIVE_CURVATURE:
            continue  # n = 1 and the like: symmetric after all
        assert found.result is Result.SUCCESS
        torch.testing.assert_close(found.value, truth, rtol=1e-8, atol=1e-8)


@few
@given(st.integers(2, 8), SEEDS)
def test_cg_is_optimal_in_the_energy_norm(n: int, seed: int) -> None:
    """After k steps the A-norm of the error is the least over the Krylov space, so it falls."""
    A, b = spd(n, seed=seed), normal(n, seed=seed + 1)
    truth = torch.linalg.solve(A, b)
    last = a_norm(A, truth)
    for k in range(1, n + 1):
        w = solve(ConjugateGradient(max_steps=k, rtol=None), A, b).value
        krylov = torch.stack([torch.linalg.matrix_power(A, i) @ b for i in range(k)], dim=1)
        basis, _ = torch.linalg.qr(krylov)
        best = basis @ torch.linalg.solve(basis.mT @ A @ basis, basis.mT @ b)
        # 1e-7: the powers of A that span the Krylov space are nearly dependent
        assert abs(a_norm(A, w - truth) - a_norm(A, best - truth)) < 1e-7
        assert a_norm(A, w - truth) <= last + 1e-12
        last = a_norm(A, w - truth)
    assert last < 1e-9


@few
@given(st.integers(2, 8), SEEDS)
def test_negative_curvature_stops_with_the_current_iterate(n: int, seed: int) -> None:
    """With A = diag(+, ..., -), CG follows the definite part until it meets the direction."""
    A = torch.diag(torch.cat([spd(n - 1, seed=seed).diagonal(), -torch.ones(1).double()]))
    b = normal(n, seed=seed + 1)
    found = solve(ConjugateGradient(), A, b)
    assert found.result is Result.NEGATIVE_CURVATURE
    assert found.negative_curvature
    steps = found.num_products - 2  # the step not taken, and the residual at the end
    before = solve(ConjugateGradient(max_steps=steps, rtol=None), A, b) if steps else None
    assert torch.equal(found.value, before.value if before else torch.zeros_like(b))
    dense = solve(Cholesky(), A, b)
    assert dense.result is Result.NEGATIVE_CURVATURE
    torch.testing.assert_close(dense.value, torch.linalg.solve(A, b), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("curvature", "result"), [(-1.0, Result.NEGATIVE_CURVATURE), (0.0, Result.SINGULAR)]
)
def test_flat_or_concave_at_once(curvature: float, result: Result) -> None:
    found = ConjugateGradient().solve(lambda v: curvature * v, normal(3))
    assert found.result is result
    assert not found.value.any()


@few
@given(SIZES, SEEDS, st.floats(0.01, 10))
def test_damping(n: int, seed: int, damping: float) -> None:
    A, b = spd(n, seed=seed), normal(n, seed=seed + 1)
    truth = torch.linalg.solve(A + damping * torch.eye(n).double(), b)
    damped: list[LinearSolver] = [
        ConjugateGradient(rtol=1e-12, damping=damping),
        GMRES(rtol=1e-12, damping=damping),
        Cholesky(damping=damping),
    ]
    for solver in damped:
        torch.testing.assert_close(solve(solver, A, b).value, truth, rtol=1e-9, atol=1e-9)


@few
@given(SIZES, SEEDS, st.floats(0, 2))
def test_a_warm_start_is_never_worse(n: int, seed: int, noise: float) -> None:
    A, b = spd(n, seed=seed), normal(n, seed=seed + 1)
    guess = torch.linalg.solve(A, b) + noise * normal(n, seed=seed + 2)
    for solver in WARM:
        found = solve(solver, A, b, guess=guess)
        cold = float(b.norm())
        warm = float((b - A @ guess).norm())
        start = min(cold, warm)
        if isinstance(solver, ConjugateGradient):  # CG lowers the A-norm of the error instead
            truth = torch.linalg.solve(A, b)
            begin = guess if warm < cold else torch.zeros_like(b)
            assert a_norm(A, found.value - truth) <= a_norm(A, begin - truth) + 1e-12
        else:
            assert float((b - A @ found.value).norm()) <= start + 1e-12


@pytest.mark.parametrize("solver", WARM, ids=repr)
def test_a_useless_guess_is_dropped(solver: LinearSolver) -> None:
    A, b = spd(4), normal(4)
    cold = solve(solver, A, b).value
    for bad in (1e6 * b, torch.full_like(b, float("nan")), torch.zeros(7).double()):
        assert torch.equal(solve(solver, A, b, guess=bad).value, cold)


@pytest.mark.parametrize("solver", WARM, ids=repr)
def test_the_exact_guess_stays(solver: LinearSolver) -> None:
    A, b = spd(4), normal(4)
    truth = torch.linalg.solve(A, b)
    torch.testing.assert_close(solve(solver, A, b, guess=truth).value, truth, rtol=0, atol=1e-14)


def test_the_inverse_as_preconditioner_takes_one_step() -> None:
    A, b = spd(6, high=1e4), normal(6)
    inverse = torch.linalg.inv(A)
    found = solve(ConjugateGradient(preconditioner=lambda r: inverse @ r), A, b)
    assert found.result is Result.SUCCESS
    assert found.num_products == 2  # the step, and the residual at the end
    plain = solve(ConjugateGradient(rtol=1e-12, preconditioner=lambda r: r / A.diagonal()), A, b)
    torch.testing.assert_close(plain.value, inverse @ b, rtol=1e-8, atol=1e-9)


@few
@given(SIZES, SEEDS, st.integers(1, 12))
def test_neumann_is_its_polynomial(n: int, seed: int, terms: int) -> None:
    A, b, eta = spd(n, seed=seed), normal(n, seed=seed + 1), 0.3
    step = torch.eye(n).double() - eta * A
    truth = eta * sum((torch.linalg.matrix_power(step, k) @ b for k in range(terms)), 0 * b)
    found = solve(Neumann(num_steps=terms, step_size=eta), A, b)
    torch.testing.assert_close(found.value, truth, rtol=1e-11, atol=1e-11)
    assert found.num_products == terms


def test_neumann_says_when_it_diverges() -> None:
    found = solve(Neumann(num_steps=30, step_size=1.0), spd(4, high=4.0), normal(4))
    assert found.result is Result.DIVERGED
    assert "step_size" in found.result.value


def test_identity_scales() -> None:
    b = normal(3)
    found = Identity(0.5).solve(lambda v: 1 / 0, b)  # no product at all
    assert torch.equal(found.value, b / 2)
    assert found.result is Result.SUCCESS


@pytest.mark.parametrize("solver", ALL, ids=repr)
def test_nan_is_never_a_success(solver: LinearSolver) -> None:
    b = normal(4)
    nan = torch.tensor(float("nan"))
    assert solver.solve(lambda v: v * nan, b).result is Result.NOT_FINITE
    assert solver.solve(lambda v: v, b * nan).result is Result.NOT_FINITE
    calls = iter([1.0, *[float("nan")] * 1000])
    late = solver.solve(lambda v: 2 * v * next(calls) + v.flip(0), b)
    assert late.result is Result.NOT_FINITE


@pytest.mark.parametrize("solver", ALL, ids=repr)
def test_zero_right_hand_side(solver: LinearSolver) -> None:
    A, b = spd(4), torch.zeros(4).double()
    for guess in (None, normal(4)):
        found = solve(solver, A, b, guess=guess)
        assert not found.value.any()
        assert found.result is Result.SUCCESS
        assert found.residual == 0


@pytest.mark.parametrize("solver", [ConjugateGradient(max_steps=2), GMRES(max_steps=2)], ids=repr)
def test_running_out_of_steps_is_a_sentence(solver: LinearSolver) -> None:
    found = solve(solver, spd(8), normal(8))
    assert found.result is Result.NOT_CONVERGED
    assert "without reaching its tolerance" in found.result.value


@pytest.mark.parametrize("rtol", [None, 1e-30])
@pytest.mark.parametrize("check_every", [1, 13])
def test_steps_past_the_solution_do_no_harm(rtol: float | None, check_every: int) -> None:
    """The recurrence must not run on until it underflows and calls that negative curvature."""
    A, b = spd(3), normal(3)
    solver = ConjugateGradient(max_steps=400, rtol=rtol, check_every=check_every)
    found = solve(solver, A, b)
    assert found.result is (Result.SUCCESS if rtol is None else Result.NOT_CONVERGED)
    torch.testing.assert_close(found.value, torch.linalg.solve(A, b), rtol=1e-12, atol=1e-12)


@few
@given(SIZES, SEEDS, st.integers(2, 20))
def test_looking_less_often_gives_the_same_solution(n: int, seed: int, every: int) -> None:
    A, b = spd(n, seed=seed), normal(n, seed=seed + 1)
    often = solve(ConjugateGradient(rtol=1e-8), A, b)
    seldom = solve(ConjugateGradient(rtol=1e-8, check_every=every), A, b)
    assert torch.equal(often.value, seldom.value)
    assert often.result is seldom.result


@pytest.mark.parametrize("scale", [1e-22, 1.0, 1e15])
def test_scale_of_the_right_hand_side_does_not_matter(scale: float) -> None:
    """In float32 the square of 1e-22 underflows: CG would never move and call it solved."""
    A, b = spd(4).float(), normal(4).float()
    found = solve(ConjugateGradient(rtol=1e-5), A, scale * b)
    assert found.result is Result.SUCCESS
    torch.testing.assert_close(found.value / scale, torch.linalg.solve(A, b), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("solver", [GMRES(), Cholesky(), ConjugateGradient()], ids=repr)
def test_a_singular_system_is_no_success(solver: LinearSolver) -> None:
    A = torch.diag(torch.tensor([1.0, 2.0, 0.0]).double())
    found = solve(solver, A, torch.ones(3).double())
    assert found.result is not Result.SUCCESS


@pytest.mark.parametrize("solver", ALL, ids=repr)
def test_two_solves_are_equal_to_the_bit(solver: LinearSolver) -> None:
    A, b = spd(8), normal(8)
    first = solve(solver, A, b).value
    moved = [t.clone() for t in (A, b)]  # to other addresses
    assert torch.equal(first, solve(solver, *moved).value)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: ConjugateGradient(max_steps=0), "max_steps"),
        (lambda: ConjugateGradient(damping=-1), "damping"),
        (lambda: ConjugateGradient(rtol="small"), "rtol"),
        (lambda: ConjugateGradient(check_every=0), "check_every"),
        (lambda: GMRES(restart=0), "restart"),
        (lambda: GMRES(rtol=-1.0), "rtol"),
        (lambda: Neumann(num_steps=0), "num_steps"),
        (lambda: Neumann(step_size=float("nan")), "step_size"),
        (lambda: Identity(0.0), "scale"),
        (lambda: Cholesky(max_size=0), "max_size"),
    ],
)
def test_settings_out_of_range(make: Any, name: str) -> None:
    with pytest.raises(ValueError, match=f"`{name}` must be"):
        make()


def test_cholesky_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="`max_size` = 3"):
        Cholesky(max_size=3).solve(lambda v: v, normal(4))


@pytest.mark.parametrize("size", [1e-25, 1e-12, 1e12, 1e25])
@pytest.mark.parametrize(
    "solver",
    [
        ConjugateGradient(),
        GMRES(),
        Cholesky(),
        Neumann(num_steps=200, step_size=0.3, rtol=1e-5),
        ConjugateGradient(warm_start=True),
        GMRES(warm_start=True),
    ],
    ids=repr,
)
def test_the_size_of_the_right_hand_side_does_not_matter(solver: LinearSolver, size: float) -> None:
    """In float32 squares of numbers below 1e-22 are 0: a residual of them called everything solved."""
    A, b = spd(12).float(), normal(12).float()
    guess = 0.1 * b
    own = solver.solve(lambda v: A @ v, b, guess=guess)
    other = solver.solve(lambda v: A @ v, b * size, guess=guess * size)
    assert other.result is own.result is Result.SUCCESS
    torch.testing.assert_close(other.value / size, own.value, rtol=1e-3, atol=1e-5)  # of "auto"
    wanted = torch.linalg.solve(A.double(), b.double() * size)
    assert float((other.value - wanted).norm() / wanted.norm()) < 1e-3
    assert float(other.residual) > 1e-9  # what float32 leaves, not an underflow


class AtOnce:
    """A matrix whose products are numbers at once, as the eager Hessian's are."""

    at_once = True

    def __init__(self, A: Tensor) -> None:
        self.A = A

    def __call__(self, vector: Tensor) -> Tensor:
        return self.A @ vector


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["spd", "indefinite", "flat", "ill", "zero", "nan", "huge"])
def test_numbers_at_hand_give_the_same_bits_as_numbers_on_a_device(
    kind: str, dtype: torch.dtype
) -> None:
    """Conjugate gradients with inner products as NumPy's numbers, against tensors of one entry."""
    B = normal(7, 7, seed=1).to(dtype)
    A = {
        "spd": B @ B.T + torch.eye(7, dtype=dtype),
        "indefinite": B + B.T,
        "flat": B[:, :3] @ B[:, :3].T,
        "ill": torch.diag(torch.logspace(-9, 0, 7, dtype=dtype)),
        "zero": 0 * B,
        "nan": B * math.nan,
        "huge": (B @ B.T) * 1e30,
    }[kind]
    solvers = [
        ConjugateGradient(60, rtol=None),
        ConjugateGradient(60, damping=0.1, check_every=3),
        ConjugateGradient(5, rtol=1e-12, preconditioner=lambda r: r / 2),
    ]
    for solver in solvers:
        for b in (normal(7, seed=2).to(dtype), torch.zeros(7, dtype=dtype)):
            hand, device = solver.solve(AtOnce(A), b), solve(solver, A, b)
            for one, other in ((hand.value, device.value), (hand.residual, device.residual)):
                torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
            assert (hand.result, *hand[3:]) == (device.result, *device[3:])

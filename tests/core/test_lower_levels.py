"""Lower levels given by an equation, a fixed-point map or constraints, against what is known of them."""

import copy
import gc
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchopt
from torch import Tensor, nn
from torch.optim import SGD

from bilevel import (
    BDA,
    DARTS,
    F2SA,
    GMRES,
    GPBGD,
    KFAC,
    L1,
    MINRES,
    PZOBO,
    SAMA,
    SOBA,
    Affine,
    Alternating,
    BiCGStab,
    Box,
    Cholesky,
    Compiled,
    ConditionProblem,
    ConjugateGradient,
    Constraint,
    FixedPoint,
    HypergradientError,
    Implicit,
    Neumann,
    NormalCG,
    Nystrom,
    Problem,
    Result,
    Simplex,
    Unrolled,
    best_response,
    certify,
    check_hypergradient,
    compare,
    explain,
    train,
)
from bilevel.oracles import Oracles
from tests.problems import normal, spd

N, M = 5, 3
H, B, OFFSET, TARGET = spd(N), normal(N, M, seed=1), normal(N, seed=2), normal(N, seed=3)
SKEW = normal(N, N, seed=4) / 4
X0 = normal(M, seed=5) / 2


def upper_loss(x: Any, y: Any, batch: Any) -> Tensor:
    return (y["y"] - TARGET).square().sum() / 2 + x["x"].square().sum() / 20


def quadratic(x: Any, y: Any, batch: Any) -> Tensor:
    return y["y"] @ H @ y["y"] / 2 - y["y"] @ (B @ x["x"] + OFFSET)


# ---------------------------------------------------------------------- an equation


def equation(matrix: Tensor) -> Problem:
    """A y = B x + c at its solution."""

    def condition(x: Any, y: Any, batch: Any) -> dict[str, Tensor]:
        return {"y": matrix @ y["y"] - B @ x["x"] - OFFSET}

    solution = torch.linalg.solve(matrix, B @ X0 + OFFSET)
    return Problem.from_condition(upper_loss, condition, {"x": X0.clone()}, {"y": solution})


NOT_SYMMETRIC = H + SKEW - SKEW.mT


def truth(matrix: Tensor) -> Tensor:
    y = torch.linalg.solve(matrix, B @ X0 + OFFSET)
    return X0 / 10 + B.mT @ torch.linalg.solve(matrix.mT, y - TARGET)


@pytest.mark.parametrize(
    "system",
    [
        GMRES(rtol=1e-13),
        BiCGStab(rtol=1e-13),
        NormalCG(rtol=1e-13),
        Cholesky(),
        FixedPoint(rtol=1e-13, step_size=0.2),
        Neumann(400, 0.2),
    ],
    ids=lambda s: type(s).__name__,
)
def test_an_equation_without_symmetry_has_the_closed_form(system: Any) -> None:
    answer = Implicit(system).hypergradient(equation(NOT_SYMMETRIC))
    torch.testing.assert_close(answer.grad["x"], truth(NOT_SYMMETRIC), rtol=1e-10, atol=1e-10)
    assert answer.stats.lower_residual is not None
    assert answer.stats.lower_residual < 1e-12


@pytest.mark.parametrize("system", [ConjugateGradient(), MINRES(), Nystrom(rank=3)])
def test_systems_that_need_symmetry_are_refused_by_name(system: Any) -> None:
    name = type(system).__name__
    with pytest.raises(ValueError, match=rf"`{name}` solves symmetric systems.*use `GMRES\(\)`"):
        Implicit(system).hypergradient(equation(NOT_SYMMETRIC))


def test_a_gradient_given_as_an_equation_is_the_loss() -> None:
    symmetric = Implicit(ConjugateGradient(rtol=1e-13)).hypergradient(equation(H))
    torch.testing.assert_close(symmetric.grad["x"], truth(H), rtol=1e-10, atol=1e-10)


def test_products_with_the_jacobian_and_its_transpose() -> None:
    problem = equation(NOT_SYMMETRIC)
    oracles = Oracles(problem, None, [None])
    linear = oracles.linearize_lower(oracles.upper, oracles.lower)
    v = normal(N, seed=6)
    torch.testing.assert_close(linear.hessian(v), NOT_SYMMETRIC.mT @ v)
    torch.testing.assert_close(linear.hessian.transposed(v), NOT_SYMMETRIC @ v)
    assert linear.hessian.transposed.transposed is linear.hessian


@pytest.mark.parametrize("mode", ["reverse", "recompute", "forward", "checkpoint"])
def test_steps_along_an_equation_are_differentiated(mode: Any) -> None:
    problem = equation(NOT_SYMMETRIC)
    with torch.no_grad():
        problem.variables("lower")["y"].zero_()
    solver = Unrolled(4, torchopt.sgd(0.2), mode=mode)
    check = check_hypergradient(problem, solver, num_directions=2, tolerance=1e-7)
    assert check.passed, check.verdict


def test_the_logged_loss_is_half_the_square_of_the_equation() -> None:
    problem = equation(NOT_SYMMETRIC)
    with torch.no_grad():
        problem.variables("lower")["y"].zero_()
    optimizers = [SGD(problem.variables(level).values(), 0.1) for level in LEVELS]
    step = next(
        train(
            problem,
            upper_optimizer=optimizers[0],
            lower_optimizer=optimizers[1],
            num_steps=1,
            solver=Implicit(GMRES()),
        )
    )
    torch.testing.assert_close(step.lower_loss, (B @ X0 + OFFSET).square().sum() / 2)
    torch.testing.assert_close(step.lower_residual, (B @ X0 + OFFSET).norm())
    torch.testing.assert_close(
        problem.variables("lower")["y"].detach(), 0.1 * (B @ X0 + OFFSET), check_stride=False
    )


LEVELS: list[Any] = ["upper", "lower"]


# ---------------------------------------------------------------------- a fixed point


class Equilibrium(nn.Module):
    """The map of a deep-equilibrium layer, z = tanh(W z + U x + b)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.3 * normal(4, 4, seed=1))
        self.bias = nn.Parameter(normal(4, seed=2))

    def forward(self, z: Tensor, inputs: Tensor) -> Tensor:
        return (z @ self.weight.mT + inputs + self.bias).tanh()


class Deep(ConditionProblem):
    """A layer that ends where it stays; its weights are the upper level."""

    def __init__(self, rows: int = 3) -> None:
        super().__init__()
        self.upper = Equilibrium()
        self.lower = nn.ParameterDict({"z": torch.zeros(rows, 4, dtype=torch.float64)})

    def upper_loss(self, batch: Any) -> Tensor:
        return (self.lower["z"] - 0.5).square().sum()

    def lower_condition(self, batch: Any) -> dict[str, Tensor]:
        z = self.lower["z"]
        return {"z": z - self.upper(z, batch)}


def test_a_deep_equilibrium_layer() -> None:
    inputs = normal(1, 4, seed=8)
    solver = Implicit(FixedPoint(rtol=1e-12))
    check = check_hypergradient(Deep(1), solver, None, [inputs], num_directions=2, tolerance=1e-7)
    assert check.passed, check.verdict


def by_map() -> Problem:
    net = Equilibrium()
    inputs = normal(3, 4, seed=8)

    def lower_map(x: Any, y: Any, batch: Any) -> dict[str, Any]:
        return {"in": {"z": torch.func.functional_call(net, x, (y["in"]["z"], inputs))}}

    return Problem.from_map(
        lambda x, y, batch: (y["in"]["z"] - 0.5).square().sum(),
        lower_map,
        dict(net.named_parameters()),
        {"in": {"z": torch.zeros(3, 4, dtype=torch.float64)}},
    )


def test_plain_steps_of_rate_one_iterate_the_map() -> None:
    problem = by_map()
    lower = problem.variables("lower")["in.z"]
    settings: dict[str, Any] = {
        "upper_optimizer": SGD(problem.upper.parameters(), 1e-9),
        "lower_optimizer": SGD(problem.lower.parameters(), 1.0),
    }
    *_, last = train(problem, num_steps=1, lower_steps=60, solver=Implicit(GMRES()), **settings)
    assert last.lower_residual is not None
    assert last.lower_residual < 1e-10
    slow = Unrolled(60, torchopt.sgd(1.0)).hypergradient(problem)
    solved = Implicit(GMRES(rtol=1e-12)).hypergradient(problem)
    assert lower.abs().sum() > 1
    torch.testing.assert_close(slow.grad, solved.grad, rtol=1e-7, atol=1e-9)


# ---------------------------------------------------------------------- constraints

AFFINE = torch.cat([torch.ones(1, N), torch.eye(N)[:1]]).double()
CONSTRAINTS: dict[str, Callable[[Tensor], Constraint]] = {
    "box": lambda x: Box(-0.3, 0.4),
    "box that moves": lambda x: Box(-0.3 * x[1].exp(), 0.4 + 0.1 * x[0]),
    "l1": lambda x: L1(0.6),
    "l1 that is tuned": lambda x: L1(x[0].exp() / 2),
    "simplex": lambda x: Simplex(),
    "simplex that grows": lambda x: Simplex(2 * x[0].exp()),
    "equations": lambda x: Affine(AFFINE, x[:2]),
    "equations that turn": lambda x: Affine(AFFINE * x[2].exp(), x[:2]),
}
STEP = 0.2


def start(constraint: Constraint) -> Tensor:
    return constraint.prox(torch.full((N,), 0.1, dtype=torch.float64), STEP).detach()


def constrained(name: str, *, solved: bool = False, step: float = STEP) -> Problem:
    make = CONSTRAINTS[name]
    y = start(make(X0))
    for _ in range(400 if solved else 0):
        y = make(X0).prox(y - STEP * (H @ y - B @ X0 - OFFSET), STEP).detach()
    return Problem.from_functions(
        upper_loss,
        quadratic,
        {"x": X0.clone()},
        {"y": y},
        constraints=lambda x: {"y": make(x["x"])},
        proximal_step=step,
    )


@pytest.mark.parametrize("name", CONSTRAINTS)
def test_the_answer_of_a_constrained_lower_level_is_differentiated(name: str) -> None:
    """Against finite differences of the solution, which an active-set method finds anew."""
    solver = Implicit(ConjugateGradient(rtol=1e-13))
    check = check_hypergradient(constrained(name), solver, num_directions=2, tolerance=1e-8)
    assert check.passed, check.verdict


@pytest.mark.parametrize("name", CONSTRAINTS)
def test_symmetric_or_not_and_whatever_the_step(name: str) -> None:
    """The proximal step is no part of the answer, nor is the way its system is solved."""
    one = Implicit(ConjugateGradient(rtol=1e-13)).hypergradient(constrained(name, solved=True))
    other = Implicit(Cholesky()).hypergradient(constrained(name, solved=True, step=0.01))
    torch.testing.assert_close(one.grad, other.grad, rtol=1e-9, atol=1e-10)
    assert one.stats.lower_residual is not None
    assert one.stats.lower_residual < 1e-12


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        *((name, "reverse") for name in CONSTRAINTS),
        ("box that moves", "forward"),
        ("l1", "forward"),
    ],
)
def test_proximal_steps_are_differentiated(name: str, mode: Any) -> None:
    solver = Unrolled(3, torchopt.sgd(0.15), mode=mode)
    check = check_hypergradient(constrained(name), solver, num_directions=1, tolerance=1e-7)
    assert check.passed, check.verdict


@pytest.mark.parametrize("name", ["box that moves", "simplex that grows"])
def test_steps_that_leave_the_set_are_put_back_by_all(name: str) -> None:
    """By `train` and by `Unrolled`, also those of Adam."""
    problem = constrained(name)
    optimizer = torch.optim.Adam(problem.lower.parameters(), 0.3)
    check = check_hypergradient(
        problem, Unrolled(4), lower_optimizer=optimizer, num_directions=2, tolerance=1e-7
    )
    assert check.passed, check.verdict
    upper = SGD(problem.upper.parameters(), 0.01)
    for _ in train(
        problem, upper_optimizer=upper, lower_optimizer=optimizer, num_steps=3, lower_steps=3
    ):
        pass
    oracles = Oracles(problem, None, [None])
    moved = CONSTRAINTS[name](problem.variables("upper")["x"].detach())
    inside = moved.prox(oracles.lower["y"].detach(), STEP)
    assert (oracles.lower["y"] - inside).abs().max() < 0.1  # the upper step came last


def test_the_lasso_has_its_closed_form() -> None:
    """On the support dy/dw = -H^-1 sign(y), off it 0; and the zeros are zeros."""
    problem = constrained("l1 that is tuned", solved=True)
    y = problem.variables("lower")["y"].detach()
    support = y != 0
    assert 0 < support.sum() < N
    inverse = torch.linalg.inv(H[support][:, support])
    residual = (y - TARGET)[support]
    by_weight = -inverse @ y[support].sign() * X0[0].exp() / 2
    expected = X0 / 10 + B[support].mT @ inverse @ residual
    expected[0] += residual @ by_weight
    answer = Implicit(ConjugateGradient(rtol=1e-14)).hypergradient(problem)
    torch.testing.assert_close(answer.grad["x"], expected, rtol=1e-10, atol=1e-10)


def test_the_box_has_its_closed_form() -> None:
    problem = constrained("box", solved=True)
    y = problem.variables("lower")["y"].detach()
    free = (y > -0.3) & (y < 0.4)
    assert 0 < free.sum() < N
    inverse = torch.linalg.inv(H[free][:, free])
    expected = X0 / 10 + B[free].mT @ inverse @ (y - TARGET)[free]
    answer = Implicit(ConjugateGradient(rtol=1e-14)).hypergradient(problem)
    torch.testing.assert_close(answer.grad["x"], expected, rtol=1e-10, atol=1e-10)


def test_equations_have_the_closed_form_of_their_karush_kuhn_tucker_system() -> None:
    problem = constrained("equations", solved=True)
    zero = torch.zeros(2, 2, dtype=torch.float64)
    system = torch.cat([torch.cat([H, AFFINE.mT], 1), torch.cat([AFFINE, zero], 1)])
    right = torch.cat([B, torch.eye(2, M, dtype=torch.float64)])  # of B x + c, and of b = x[:2]
    jacobian = torch.linalg.solve(system, right)[:N]
    y = problem.variables("lower")["y"].detach()
    expected = X0 / 10 + jacobian.mT @ (y - TARGET)
    answer = Implicit(Cholesky()).hypergradient(problem)
    torch.testing.assert_close(answer.grad["x"], expected, rtol=1e-10, atol=1e-10)


def test_a_projection_is_a_lower_level() -> None:
    """Of a vector onto the simplex: the derivative is I - 1 1' / k on the support."""
    problem = Problem.from_functions(
        lambda x, y, _: y["y"] @ TARGET,
        lambda x, y, _: (y["y"] - x["x"]).square().sum() / 2,
        {"x": 0.5 * OFFSET},
        {"y": Simplex().prox(0.5 * OFFSET, 1.0)},
        constraints=lambda x: {"y": Simplex()},
    )
    support = problem.variables("lower")["y"].detach() > 0
    assert 1 < support.sum() < N
    expected = torch.where(support, TARGET - TARGET[support].mean(), torch.zeros(()).double())
    answer = Implicit().hypergradient(problem)
    torch.testing.assert_close(answer.grad["x"], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CONSTRAINTS)
def test_a_prox_is_what_it_says(name: str) -> None:
    """Its derivative is `tangent`, an orthogonal projector; sets are met, and met again."""
    constraint = CONSTRAINTS[name](X0)
    for seed in range(4):
        u = normal(N, seed=10 + seed)
        jacobian = torch.autograd.functional.jacobian(lambda u: constraint.prox(u, 0.5), u)
        tangent = constraint.tangent(u, 0.5)
        matrix = torch.stack([tangent(e) for e in torch.eye(N, dtype=torch.float64)], 1)
        torch.testing.assert_close(jacobian, matrix, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(matrix, matrix.mT, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(matrix @ matrix, matrix, rtol=1e-12, atol=1e-12)
        z = constraint.prox(u, 0.5)
        if constraint.bounds:
            assert constraint.violation(z) < 1e-12
            torch.testing.assert_close(constraint.prox(z, 0.5), z, rtol=1e-12, atol=1e-12)
        for other in range(3):  # nothing else that is allowed lies nearer
            v = constraint.prox(normal(N, seed=20 + other), 0.5)
            assert objective(constraint, v, u) >= objective(constraint, z, u) - 1e-12


def objective(constraint: Constraint, z: Tensor, u: Tensor) -> float:
    penalty = 0.5 * constraint.weight * z.abs().sum() if isinstance(constraint, L1) else 0.0
    return float((z - u).square().sum() / 2 + penalty)


def test_plain_steps_of_the_proximal_step_end_on_zeros() -> None:
    problem = constrained("l1 that is tuned")
    for _ in train(
        problem,
        upper_optimizer=SGD(problem.upper.parameters(), 0.05),
        lower_optimizer=SGD(problem.lower.parameters(), STEP),
        solver=Implicit(),
        lower_steps=20,
        num_steps=10,
    ):
        pass
    assert (problem.variables("lower")["y"] == 0).any()


# ---------------------------------------------------------------------- refusals and remarks


def test_a_constraint_that_is_violated_at_the_start_is_refused_with_the_number() -> None:
    problem = constrained("box")
    with torch.no_grad():
        problem.variables("lower")["y"][1] = 1.5
    for _ in range(2):
        with pytest.raises(ValueError, match=r"`y` violates its constraint `Box` by 1\.1 at the"):
            Implicit().hypergradient(problem)


def test_a_kink_is_said() -> None:
    problem = Problem.from_functions(
        lambda x, y, _: y["y"].sum(),
        lambda x, y, _: (y["y"] - x["x"]).square().sum() / 2,
        {"x": torch.tensor([0.5, 2.0])},
        {"y": torch.tensor([0.0, 1.5])},
        constraints=lambda x: {"y": L1(0.5)},
    )
    with pytest.warns(RuntimeWarning, match="at a kink: an entry of `y` is just held by `L1`"):
        answer = Implicit().hypergradient(problem)
    assert answer.grad["x"].tolist() == pytest.approx([0.0, 1.0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Implicit().hypergradient(constrained("l1", solved=True))


@pytest.mark.parametrize("make", [lambda: equation(H), lambda: constrained("box", solved=True)])
def test_solvers_that_need_the_lower_loss_refuse(make: Callable[[], Problem]) -> None:
    problem = make()
    solvers = F2SA(step_size=0.1), GPBGD(), BDA(2), SOBA(step_size=0.1), DARTS(), SAMA(), PZOBO(2)
    for solver in solvers:
        with pytest.raises(ValueError, match=rf"`{type(solver).__name__}` .*; use `Implicit\("):
            solver.hypergradient(problem, lower_optimizer=SGD(problem.lower.parameters(), 0.1))
    with pytest.raises(ValueError, match=r"`KFAC` .*; use `GMRES"):
        Implicit(KFAC()).hypergradient(problem)
    with pytest.raises(ValueError, match=r"mixed.*checkpoint"):
        Unrolled(2, torchopt.sgd(0.1), mode="mixed").hypergradient(problem)


def problem_of(condition: Callable[[Any, Any, Any], Any], **constraints: Any) -> Problem:
    lower = {"y": torch.ones(2), "z": torch.ones(3)}
    return Problem.from_condition(
        lambda x, y, _: y["y"].sum(), condition, {"x": torch.ones(2)}, lower
    )


@pytest.mark.parametrize(
    ("condition", "said"),
    [
        (lambda x, y, _: {"y": y["y"] - x["x"]}, r"lacks `z`"),
        (lambda x, y, _: {"y": y["y"], "z": y["z"], "w": y["z"]}, r"has `w`, which is no"),
        (lambda x, y, _: {"y": y["y"], "z": y["z"][:2]}, r"as many equations as unknowns"),
        (lambda x, y, _: {"y": y["y"], "z": 3}, r"tensor of floating point for `z`, got 3"),
        (lambda x, y, _: y["y"], r"`lower_condition` must return a dict like `lower`"),
        (lambda x, y, _: {"y": x["x"], "z": torch.ones(3)}, r"singular to working precision"),
    ],
)
def test_what_is_no_equation_is_refused(condition: Any, said: str) -> None:
    """A system that is not square among them, which others leave to their linear solver."""
    with pytest.raises((TypeError, ValueError, HypergradientError), match=said):
        Implicit(GMRES()).hypergradient(problem_of(condition))


@pytest.mark.parametrize(
    ("constraints", "said"),
    [
        (lambda x: {"w": Box(0.0)}, r"names `w`; the lower variables are `y`"),
        (lambda x: {"y": 0.5}, r"must give a constraint such as .* got 0\.5"),
        (lambda x: Box(0.0), r"must return a dict from names"),
    ],
)
def test_what_is_no_constraint_is_refused(constraints: Any, said: str) -> None:
    problem = Problem.from_functions(
        upper_loss, quadratic, {"x": X0}, {"y": OFFSET.clone()}, constraints=constraints
    )
    with pytest.raises((TypeError, ValueError), match=said):
        Implicit().hypergradient(problem)


def test_bad_numbers_of_constraints_are_refused() -> None:
    for wrong, said in [
        (lambda: Box(1.0, 0.0), "must lie below"),
        (lambda: Box("0"), "`low` must be a number"),  # type: ignore[arg-type]
        (lambda: L1(-1.0), "must not be negative"),
        (lambda: Simplex(0.0), "must be positive"),
        (lambda: Affine([[1.0]]), "must be a tensor of shape"),  # type: ignore[arg-type]
    ]:
        with pytest.raises((TypeError, ValueError), match=said):
            wrong()


# ---------------------------------------------------------------------- what went wrong elsewhere


def test_a_singular_jacobian_is_a_failure_and_no_zero() -> None:
    """jaxopt issue 466: a linear solve that never moved gave a gradient of 0 without a word."""
    singular = torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0, 0.0])).double()
    problem = Problem.from_condition(
        upper_loss,
        lambda x, y, _: {"y": singular @ y["y"] - B @ x["x"]},
        {"x": torch.zeros(M).double()},
        {"y": torch.zeros(N).double()},
    )
    with pytest.raises(HypergradientError, match="singular"):
        Implicit(GMRES()).hypergradient(problem)
    assert Implicit(Cholesky()).hypergradient(problem, throw=False).result is Result.SINGULAR


def test_the_jacobian_of_a_projected_answer_entry_by_entry() -> None:
    """jaxopt issues 338 and 419: transposing the derivative of a projection raised an error."""
    rows = []
    for entry in torch.eye(N, dtype=torch.float64):
        problem = constrained("simplex", solved=True)
        probe = Problem.from_functions(
            lambda x, y, _, e=entry: y["y"] @ e,
            quadratic,
            {"x": X0.clone()},
            {"y": problem.variables("lower")["y"].detach()},
            constraints=lambda x: {"y": Simplex()},
        )
        rows.append(Implicit().hypergradient(probe).grad["x"])
    jacobian = torch.stack(rows)
    torch.testing.assert_close(jacobian.sum(0), torch.zeros(M).double(), rtol=0, atol=1e-10)
    assert jacobian.abs().sum() > 0.01


def test_a_large_equation_without_symmetry_is_solved_and_leaves_no_cycle() -> None:
    """Plain steps move away from its answer: only Newton's arrive."""
    half = 510

    def game(x: Any, y: Any, batch: Any) -> Any:
        u, v = y["y"].split(half)
        return {"y": torch.cat([0.1 * u + 3 * v, 0.2 * v - 2 * u]) - x["x"]}

    problem = Problem.from_condition(
        lambda x, y, batch: y["y"].sum(),
        game,
        {"x": normal(2 * half)},
        {"y": torch.zeros(2 * half).double()},
    )
    y = best_response(problem)["y"].detach()
    torch.testing.assert_close(game({"x": 0}, {"y": y}, None)["y"], problem.upper.x.detach())
    oracles = Oracles(problem, None, [None])
    gc.collect()
    gc.disable()
    try:
        with oracles.differentiated_twice("test"):
            linear = oracles.linearize_lower(oracles.upper, oracles.lower)
        v = normal(2 * half, seed=1)
        torch.testing.assert_close(
            linear.hessian.transposed(v), game({"x": 0}, {"y": v}, None)["y"]
        )
        jacobian, gone = linear.hessian.transposed, weakref.ref(linear.hessian)
        back = linear.hessian(v)
        del linear
        assert gone() is None
        torch.testing.assert_close(jacobian.transposed(v), back)
    finally:
        gc.enable()


def test_an_unsolved_equation_is_told() -> None:
    """Certificates, explanations and comparisons know these lower levels."""
    solver = Implicit(GMRES(rtol=1e-12))
    problem = equation(NOT_SYMMETRIC)
    assert certify(problem, solver).verdict.startswith("certified")
    with torch.no_grad():
        problem.variables("lower")["y"].add_(1.0)
    assert "far from solved" in certify(problem, solver).verdict
    assert "not symmetric" in str(explain(problem, solver))
    table = str(compare(problem, [solver, Alternating()]))
    assert "Implicit" in table


def test_a_constrained_lower_level_is_certified_and_explained() -> None:
    problem = constrained("l1 that is tuned", solved=True)
    assert certify(problem, Implicit()).verdict.startswith("certified")
    assert "nothing wrong" in str(explain(problem, Implicit()))


def test_compiled_is_eager(graphs: list[Any]) -> None:
    problem, solver = constrained("box that moves", solved=True), Implicit()
    eager, made = solver.hypergradient(problem), Compiled(solver).hypergradient(problem)
    torch.testing.assert_close(made.grad, eager.grad, rtol=1e-12, atol=1e-12)
    other, steps = equation(NOT_SYMMETRIC), Unrolled(1, torchopt.sgd(0.1))
    eager, made = steps.hypergradient(other), Compiled(steps).hypergradient(other)
    torch.testing.assert_close(made.grad, eager.grad, rtol=1e-12, atol=1e-12)
    assert graphs
    with pytest.raises(TypeError, match="`NormalCG` needs products with the transposed"):
        Compiled(Implicit(NormalCG())).hypergradient(other)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The graphs that were given to the compiler, which runs them as they are."""
    import torch._inductor

    made: list[Any] = []

    def compile(graph: Any, inputs: Any, options: Any) -> Any:
        made.append(graph)
        return graph

    monkeypatch.setattr(torch._inductor, "compile", compile)
    return made


def test_copies_and_texts() -> None:
    problem = copy.deepcopy(constrained("box"))
    assert "Problem.from_functions" in repr(problem)
    assert "Problem.from_map" in repr(by_map())
    assert "Problem.from_condition" in repr(equation(H))

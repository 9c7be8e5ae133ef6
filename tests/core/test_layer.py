"""The lower solution as a differentiable layer: derivatives of every order, any solver, any program."""

import copy
import math
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import torch
from torch import Tensor, nn

from bilevel import (
    GMRES,
    KFAC,
    Box,
    Cholesky,
    ConjugateGradient,
    Constraint,
    HypergradientError,
    Implicit,
    LinearSolver,
    LowerLevel,
    Neumann,
    Problem,
    best_response,
    hyperobjective,
    train,
)
from tests.problems import Quadratic, normal, spd


def upper_loss(x: Any, y: Any, batch: Any) -> Tensor:
    return y["y"].square().sum() + y["z"].sum() * x["x"].sum()


def lower_loss(x: Any, y: Any, batch: Any) -> Tensor:
    pull = (y["y"] - normal(3, 2, seed=5) @ x["x"].sin()).cosh().sum()
    penalty = x["s"].exp() * y["y"].square().sum() / 2 + 0.1 * y["y"].sum() ** 4
    tie = (y["z"] - y["y"][0] * x["x"][1]).square().sum()
    return pull + penalty + tie + (0 if batch is None else (batch * y["y"]).sum())


def curved() -> Problem:
    """Third derivatives everywhere: a Hessian that is held fixed gives wrong second derivatives."""
    return Problem.from_functions(
        upper_loss,
        lower_loss,
        {"x": normal(2), "s": torch.zeros((), dtype=torch.float64)},
        {"y": normal(3, seed=1), "z": torch.zeros(2, 1, dtype=torch.float64)},
    )


def leaf(*shape: int, seed: int = 3) -> Tensor:
    return normal(*shape, seed=seed).requires_grad_()


class Sines(Problem):
    """y* = sin(x), by a lower loss that is quadratic in y."""

    def __init__(self, n: int = 3, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.upper = nn.ParameterDict({"x": normal(n).to(dtype)})
        self.lower = nn.ParameterDict({"y": torch.zeros(n, dtype=dtype)})

    def upper_loss(self, batch: Any) -> Tensor:
        return self.lower["y"].sum()

    def lower_loss(self, batch: Any) -> Tensor:
        return (self.lower["y"] - self.upper["x"].sin()).square().sum()


# ---------------------------------------------------------------------- derivatives


def test_derivatives_of_every_order_in_upper_tensors_and_the_batch() -> None:
    problem, batch = curved(), leaf(3, seed=4)
    how = {"linear_solver": Cholesky(), "solve": lambda level: level.solution(near=True)}

    def layer(x: Tensor, s: Tensor, batch: Tensor) -> tuple[Tensor, ...]:
        upper = {"x": x, "s": s}
        return tuple(best_response(problem, batch, upper=upper, **how).values())

    def slope(x: Tensor) -> Tensor:
        value = hyperobjective(problem, upper={"x": x}, **how)
        return torch.autograd.grad(value, x, create_graph=True)[0]

    inputs = leaf(2), leaf(1, seed=5)[0], batch
    with torch.no_grad():  # start where finite differences stay near
        near = best_response(problem, batch, upper={"x": inputs[0], "s": inputs[1]})
        for name, y in problem.variables("lower").items():
            y.copy_(near[name])
    assert torch.autograd.gradcheck(layer, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(layer, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(slope, (leaf(2),), fast_mode=True)  # third derivatives


@pytest.mark.parametrize(
    "solver",
    [ConjugateGradient(rtol=1e-13), Cholesky(), GMRES(rtol=1e-13), Neumann(500, step_size=0.2)],
    ids=lambda solver: type(solver).__name__,
)
def test_the_gradient_is_the_hypergradient_in_closed_form_with_any_linear_solver(
    solver: Any,
) -> None:
    problem = Quadratic()
    hyperobjective(problem, linear_solver=solver).backward()
    torch.testing.assert_close(
        problem.upper["x"].grad, problem.hypergradient(), rtol=1e-10, atol=1e-10
    )
    assert problem.lower["y"].grad is None


class Weighted(Problem):
    """A linear layer, on weighted rows."""

    def __init__(self) -> None:
        super().__init__()
        self.upper = nn.ParameterDict({"x": normal(20)})
        self.lower = nn.Linear(3, 2, dtype=torch.float64)

    def upper_loss(self, batch: Any) -> Tensor:
        return self.lower(normal(5, 3, seed=1)).square().mean()

    def lower_loss(self, batch: Any) -> Tensor:
        errors = (self.lower(normal(20, 3, seed=2)) - normal(20, 2, seed=3)).square().sum(1)
        return (self.upper["x"].exp() * errors).mean()


@pytest.mark.parametrize("solver", [KFAC(0.1), ConjugateGradient(preconditioner=KFAC(0.1))])
def test_a_linear_solver_that_reads_a_network_finds_it(solver: LinearSolver) -> None:
    problem = Weighted()
    found = torch.autograd.grad(hyperobjective(problem, linear_solver=solver), problem.upper["x"])
    with torch.no_grad():
        for name, y in best_response(problem).items():
            problem.lower.get_parameter(name).copy_(y)
    expected = Implicit(solver).hypergradient(problem).grad["x"]
    torch.testing.assert_close(found[0], expected, rtol=1e-6, atol=1e-9)


def test_a_network_in_front_and_one_behind_learn_through_the_layer() -> None:
    problem, front = Sines(), nn.Linear(2, 3, dtype=torch.float64)
    inputs = normal(2, seed=8)
    answer = best_response(problem, upper={"x": front(inputs)})["y"]
    answer.square().sum().backward()
    here = front(inputs).detach()
    expected = torch.outer(2 * here.sin() * here.cos(), inputs)
    torch.testing.assert_close(front.weight.grad, expected, rtol=1e-7, atol=1e-9)
    assert problem.upper["x"].grad is None  # another tensor stood in its place


def test_what_the_lower_loss_closes_over_has_its_gradient_too() -> None:
    """Where jaxopt refuses (issue 31) and others silently return zero."""
    shift = leaf(3)
    made = shift * 2  # not a leaf: its graph is used by the program as well
    problem = Problem.from_functions(
        lambda x, y, _: y["y"].sum(),
        lambda x, y, _: (y["y"] - x["x"] * made).square().sum(),
        {"x": normal(3)},
        {"y": torch.zeros(3, dtype=torch.float64)},
    )
    loss = best_response(problem)["y"].sum() + made.sum()
    (found,) = torch.autograd.grad(loss, shift)
    torch.testing.assert_close(found, 2 * problem.upper.x.detach() + 2)


def test_lower_variables_and_frozen_ones_and_the_module_are_left_as_they_were() -> None:
    problem = curved()
    before = copy.deepcopy(problem.state_dict())
    problem.upper.s.requires_grad_(False)
    sum(y.sum() for y in best_response(problem).values()).backward()
    assert problem.upper.s.grad is None
    assert problem.upper.x.grad is not None
    after = problem.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


# ---------------------------------------------------------------------- how it is solved


def by_scipy(level: LowerLevel) -> Any:
    found = scipy.optimize.minimize(
        level.value_and_gradient, level.start_vector, jac=True, method="BFGS", tol=1e-10
    )
    return found.x


SOLVERS: dict[str, Callable[[LowerLevel], Any]] = {
    "by itself": LowerLevel.solution,
    "SciPy": by_scipy,
    "torch's L-BFGS": lambda level: level.minimize(
        lambda y: torch.optim.LBFGS(y, line_search_fn="strong_wolfe", tolerance_grad=1e-12), 5
    ),
    "SGD": lambda level: level.minimize(lambda y: torch.optim.SGD(y, 0.3), 60),
    "closed form": lambda level: {"y": level.upper["x"].sin()},
    "an array": lambda level: {"y": np.sin(level.upper["x"].numpy())},
    "the variable itself": lambda level: level.upper["x"].sin(),
}


@pytest.mark.parametrize("name", SOLVERS)
def test_anything_that_returns_y_solves_the_lower_level(name: str) -> None:
    x = leaf(3)
    y = best_response(Sines(), upper={"x": x}, solve=SOLVERS[name])["y"]
    torch.testing.assert_close(y, x.sin(), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], x.cos(), rtol=1e-7, atol=1e-8)


def test_the_closed_form_of_a_problem_is_asked_at_the_tensors_given() -> None:
    problem, x = Quadratic(), leaf(3)
    y = best_response(problem, upper={"x": x})["y"]
    torch.testing.assert_close(y, torch.linalg.solve(problem.H, problem.B @ x + problem.c))


def test_an_unsolved_lower_level_is_said_with_its_number_and_nan_is_refused() -> None:
    """A downstream user of a rival measured errors of 16 to 157 % that nobody had said."""
    problem = Sines()
    with pytest.warns(
        RuntimeWarning, match=r"not solved: [\d.e+-]+ of its gradient is left"
    ) as said:
        best_response(problem, solve=lambda level: {"y": level.start["y"] + 0.3})
    assert said[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        best_response(problem, solve=lambda level: level.start, tolerance=None)
        best_response(problem, upper={"x": torch.zeros(3, dtype=torch.float64)})  # y* = 0
    with pytest.raises(ValueError, match="NaN or infinite numbers for `y`: it diverged"):
        best_response(problem, solve=lambda level: level.start["y"] / 0)


def test_no_derivative_in_where_the_solver_starts() -> None:
    """optimistix issue 54: zero by the theorem; a variable of both levels is refused by name."""
    x = leaf(3)
    start = leaf(3, seed=6)
    y = best_response(Sines(), upper={"x": x}, solve=lambda level: level.minimize(
        lambda y: torch.optim.SGD(y, 0.5), 2, start={"y": start}
    ))["y"]  # fmt: skip
    assert torch.autograd.grad(y.sum(), start, allow_unused=True)[0] is None
    problem = Sines()
    problem.lower["y"] = problem.upper["x"]
    with pytest.raises(ValueError, match=r"`x` belongs to both levels of `Sines`.*`Unrolled`"):
        best_response(problem)


def test_a_linear_solver_that_fails_in_the_backward_pass_raises() -> None:
    """jaxopt issue 466: a solver that never moved gave a gradient of zero."""
    x = leaf(3)
    weights = torch.arange(1.0, 4.0, dtype=torch.float64)
    problem = Problem.from_functions(
        lambda x, y, _: y["y"].sum(),
        lambda x, y, _: (weights * (y["y"] - x["x"]).square()).sum(),
        {"x": normal(3)},
        {"y": normal(3)},
    )
    y = best_response(problem, upper={"x": x}, linear_solver=ConjugateGradient(max_steps=1))["y"]
    with pytest.raises(HypergradientError, match="backward pass of `best_response`"):
        y.square().sum().backward()


# ---------------------------------------------------------------------- in any torch program


def test_a_scalar_has_a_derivative_that_is_not_zero() -> None:
    """torchopt issue 222: the number of steps was the length of a shape without dimensions."""
    problem = Problem.from_functions(
        lambda x, y, _: y["y"],
        lambda x, y, _: (y["y"] ** 2 - x["x"]).square(),
        {"x": torch.tensor(4.0)},
        {"y": torch.tensor(1.0)},
    )
    best_response(problem)["y"].backward()
    torch.testing.assert_close(problem.upper.x.grad, torch.tensor(0.25))


def test_under_no_grad_the_numbers_are_the_same_without_a_graph() -> None:
    problem = Sines()
    with torch.no_grad():
        bare = best_response(problem)["y"]
    full = best_response(problem)["y"]
    assert torch.equal(bare, full)
    assert full.requires_grad
    assert not bare.requires_grad
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode"):
        best_response(problem)


def test_variables_of_two_dtypes_get_gradients_of_their_own() -> None:
    problem = Problem.from_functions(
        lambda x, y, _: y["a"].sum(),
        lambda x, y, _: (
            (y["a"] - x["x"]).square().sum() + (y["b"] - x["x"].double()).square().sum()
        ),
        {"x": torch.ones(2)},
        {"a": torch.zeros(2), "b": torch.zeros(2, dtype=torch.float64)},
    )
    found = best_response(problem)
    assert [y.dtype for y in found.values()] == [torch.float32, torch.float64]
    (found["a"].sum() + found["b"].sum()).backward()
    torch.testing.assert_close(problem.upper.x.grad, 2 * torch.ones(2))


def test_a_compiled_program_gets_the_same_gradient() -> None:
    """torch leaves its graph at the layer: what is inside could not be compiled anyway."""
    problem, x = Sines(), leaf(3)

    def program(x: Tensor) -> Tensor:
        return best_response(problem, upper={"x": x * 2})["y"].square().sum()

    compiled = torch.compile(program, backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's tracer, about tensors of ours that it looks at
        found = torch.autograd.grad(compiled(x), x)[0]
    assert torch.equal(found, torch.autograd.grad(program(x), x)[0])


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.problem = Sines()
        self.front = nn.Linear(3, 3, dtype=torch.float64)

    def forward(self, inputs: Tensor) -> Tensor:
        return best_response(self.problem, upper={"x": self.front(inputs)})["y"]


def test_a_module_around_the_layer_is_copied_and_pickled() -> None:
    layer, inputs = Layer(), normal(3)
    answer = layer(inputs)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(inputs), answer)
        other(inputs).sum().backward()
        assert other.front.weight.grad is not None


def test_what_does_not_fit_is_refused_by_name() -> None:
    problem = Sines()
    with pytest.raises(ValueError, match="no upper variable `z`"):
        best_response(problem, upper={"z": leaf(3)})
    with pytest.raises(ValueError, match=r"shape \(2,\), but the upper variable has \(3,\)"):
        best_response(problem, upper={"x": leaf(2)})
    with pytest.raises(ValueError, match=r"dtype torch.float32.*`.to`"):
        best_response(problem, upper={"x": leaf(3).float()})
    with pytest.raises(TypeError, match="must be a tensor"):
        best_response(problem, upper={"x": 1.0})  # type: ignore[dict-item]
    with pytest.raises(TypeError, match=r"`LowerLevel.solution` is one"):
        best_response(problem, solve="lbfgs")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="must return a dict of tensors"):
        best_response(problem, solve=lambda level: None)
    with pytest.raises(ValueError, match=r"shape \(2,\); the lower variables are `y` \(3,\)"):
        best_response(problem, solve=lambda level: torch.zeros(2))
    with pytest.raises(ValueError, match="`w`, which is no lower variable"):
        best_response(problem, solve=lambda level: {"w": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"shape \(1,\) for `y`, which has shape \(3,\)"):
        best_response(problem, solve=lambda level: {"y": torch.zeros(1)})
    with pytest.raises(RuntimeError, match=r"not inside `torch.func` transforms"):
        torch.func.jacrev(lambda x: best_response(problem, upper={"x": x})["y"])(normal(3))


# ---------------------------------------------------------------------- more than two levels


class Third(Problem):
    """z*(x, y) = K^-1 (A x + B y), in closed form."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        super().__init__()
        self.upper = nn.ParameterDict({"x": x, "y": y})
        self.lower = nn.ParameterDict({"z": normal(4)})
        self.K, self.A, self.B = spd(4), normal(4, 2, seed=1), normal(4, 3, seed=2) / 5

    def upper_loss(self, batch: Any) -> Tensor:
        return self.lower["z"].sum()

    def lower_loss(self, batch: Any) -> Tensor:
        z = self.lower["z"]
        return z @ self.K @ z / 2 - z @ (self.A @ self.upper["x"] + self.B @ self.upper["y"])

    def best_response(self, batch: Any) -> dict[str, Tensor]:
        right = self.A @ self.upper["x"] + self.B @ self.upper["y"]
        return {"z": torch.linalg.solve(self.K, right)}


class ThreeLevels(Problem):
    """G = y'Hy/2 - y'Cx + |z*|^2/2 + y'Dz*/2, F = |y - 1|^2 + |z* + 1|^2 + |x|^2/4.

    `tied` puts the variables themselves into the third level, instead of giving their values.
    """

    def __init__(self, tied: bool) -> None:
        super().__init__()
        x, y = nn.Parameter(normal(2, seed=6)), nn.Parameter(normal(3, seed=7))
        self.upper, self.lower = nn.ParameterDict({"x": x}), nn.ParameterDict({"y": y})
        self.tied = tied
        self.third = Third(x, y) if tied else Third(torch.zeros_like(x), torch.zeros_like(y))
        self.H, self.C, self.D = spd(3, seed=3), normal(3, 2, seed=4), normal(3, 4, seed=5) / 5

    def z(self) -> Tensor:
        values = {"x": self.upper["x"], "y": self.lower["y"]}
        return best_response(self.third, upper=None if self.tied else values)["z"]

    def upper_loss(self, batch: Any) -> Tensor:
        y, x = self.lower["y"], self.upper["x"]
        return (y - 1).square().sum() + (self.z() + 1).square().sum() + x.square().sum() / 4

    def lower_loss(self, batch: Any) -> Tensor:
        y, z = self.lower["y"], self.z()
        return y @ self.H @ y / 2 - y @ (self.C @ self.upper["x"]) + z @ z / 2 + y @ self.D @ z / 2

    def truth(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """F at the solutions of both lower levels, and y*, in closed form."""
        P, Q = (torch.linalg.solve(self.third.K, m) for m in (self.third.A, self.third.B))
        M = self.H + Q.mT @ Q + (self.D @ Q + Q.mT @ self.D.mT) / 2
        y = torch.linalg.solve(M, (self.C - Q.mT @ P - self.D @ P / 2) @ x)
        z = P @ x + Q @ y
        return (y - 1).square().sum() + (z + 1).square().sum() + x.square().sum() / 4, y


@pytest.mark.parametrize("tied", [False, True])
def test_three_levels_have_the_hypergradient_of_their_closed_form(tied: bool) -> None:
    problem = ThreeLevels(tied)
    x = problem.upper["x"].detach().clone().requires_grad_()
    value, y = problem.truth(x)
    (expected,) = torch.autograd.grad(value, x)
    (through,) = torch.autograd.grad(hyperobjective(problem), problem.upper["x"])
    with torch.no_grad():
        problem.lower["y"].copy_(y)
    found = Implicit().hypergradient(problem)
    for gradient in (found.grad["x"], through):
        torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-8)
    torch.testing.assert_close(found.value, value.detach())


def test_three_levels_train_towards_the_minimum_of_their_closed_form() -> None:
    problem = ThreeLevels(tied=False)
    zero = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(problem.truth(zero)[0], zero)
    curvature = torch.autograd.functional.hessian(lambda x: problem.truth(x)[0], zero)
    least = problem.truth(-torch.linalg.solve(curvature, slope))[0]
    above = []
    run = {
        "upper_optimizer": torch.optim.SGD(problem.upper.parameters(), 0.04),
        "lower_optimizer": torch.optim.SGD(problem.lower.parameters(), 0.4),
    }
    for _ in train(problem, num_steps=6, lower_steps=2, solver=Implicit(), **run):  # type: ignore[arg-type]
        above.append(float(problem.truth(problem.upper["x"].detach())[0] - least))
    assert above[-1] < above[0] / 4


# ---------------------------------------------------------------------- own solvers in training


class Noisy(Sines):
    """A lower loss that sees noise, solved by SciPy from where the last turn ended."""

    def draw(self, data: Any, generator: torch.Generator) -> Tensor:
        return 0.1 * torch.randn(3, generator=generator, dtype=torch.float64)

    def upper_loss(self, batch: Any) -> Tensor:
        return (self.lower["y"] - 0.5).square().sum()

    def lower_loss(self, batch: Any) -> Tensor:
        return (self.lower["y"] - self.upper["x"].sin() - batch).cosh().sum()


def trained(num_steps: int, resume: Any = None, **settings: Any) -> tuple[Noisy, Any]:
    problem = Noisy()
    adam = torch.optim.Adam(problem.upper.parameters(), 0.1)
    run = {"upper_optimizer": adam, "num_steps": num_steps, "resume": resume}
    settings = {"solver": Implicit(), "lower_solver": by_scipy} | settings
    *_, last = train(problem, **run, **settings)  # type: ignore[arg-type]
    return problem, last


def test_train_solves_the_lower_level_by_a_solver_of_ones_own_and_resumes(tmp_path: Any) -> None:
    problem, step = trained(6)
    assert float(step.lower_residual) < 1e-6
    assert float(step.hypergradient.stats.lower_residual) < 1e-6  # at the batch it was solved at
    _, halfway = trained(3)
    halfway.state.save(tmp_path / "run.pt")
    again, _ = trained(6, resume=tmp_path / "run.pt")
    assert torch.equal(again.upper["x"], problem.upper["x"])
    assert torch.equal(again.lower["y"], problem.lower["y"])
    _, first = trained(2, order="upper_first", lower_solver=LowerLevel.solution)
    assert float(first.lower_residual) < 1e-6


def test_a_lower_solver_stands_in_the_place_of_lower_steps() -> None:
    with pytest.raises(ValueError, match=r"by `lower_solver`, and by `lower_steps=2`"):
        trained(1, lower_steps=2)
    with pytest.raises(TypeError, match="`lower_solver` must be a function of a `LowerLevel`"):
        trained(1, lower_solver="newton")
    with pytest.raises(ValueError, match="NaN or infinite numbers for `y`"):
        trained(1, lower_solver=lambda level: level.start["y"] / 0)


# ---------------------------------------------------------------------- a condition, constraints


MATRIX = spd(3) + normal(3, 3, seed=4) / 3  # not symmetric


def condition(x: Any, y: Any, batch: Any) -> dict[str, Tensor]:
    bend = 0.1 * y["y"] ** 3 * (1 + x["x"].sum() ** 2) + 0.2 * y["y"].roll(1) ** 2
    return {"y": MATRIX @ y["y"] + bend - x["x"].sin()}


def test_derivatives_of_every_order_of_a_zero_whose_jacobian_is_not_symmetric() -> None:
    given = {"x": normal(3)}, {"y": torch.zeros(3, dtype=torch.float64)}
    problem = Problem.from_condition(upper_loss, condition, *given)

    def layer(x: Tensor) -> Tensor:
        return best_response(problem, upper={"x": x}, linear_solver=Cholesky(), solve=near)["y"]

    def near(level: LowerLevel) -> Any:
        return level.solution(near=True)

    assert torch.autograd.gradcheck(layer, (leaf(3),))
    assert torch.autograd.gradgradcheck(layer, (leaf(3),), fast_mode=True)
    best_response(problem)["y"].sum().backward()  # GMRES by default
    with pytest.raises(
        ValueError, match=r"`ConjugateGradient` solves symmetric systems.*`GMRES\(\)`"
    ):
        best_response(problem, linear_solver=ConjugateGradient())


def test_a_constrained_solution_moves_along_its_face() -> None:
    class Boxed(Sines):
        def lower_constraints(self) -> dict[str, Constraint]:
            return {"y": Box(-0.5, 0.5)}

    x = torch.tensor([0.2, 0.3, 1.2], dtype=torch.float64, requires_grad=True)
    y = best_response(Boxed(), upper={"x": x})["y"]
    expected = torch.tensor([math.sin(0.2), math.sin(0.3), 0.5], dtype=torch.float64)
    torch.testing.assert_close(y.detach(), expected)
    (slope,) = torch.autograd.grad(y.sum(), x)
    expected = torch.tensor([math.cos(0.2), math.cos(0.3), 0.0], dtype=torch.float64)
    torch.testing.assert_close(slope, expected)

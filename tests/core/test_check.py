"""`check_hypergradient`: never a false alarm on a right answer, never a mistake that it misses."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torchopt
from sklearn.datasets import load_digits
from torch import Tensor, nn

from bilevel import (
    Alternating,
    Cholesky,
    Identity,
    Implicit,
    Neumann,
    Problem,
    Solver,
    Unrolled,
    check_hypergradient,
)
from bilevel.check import solve_lower
from bilevel.check.differences import Ladder, climb_down, directions, shares
from bilevel.oracles import Oracles
from bilevel.solvers import Response, ResponseProduct, unrolling
from tests.problems import Quadratic, Ridge, generator, normal, regression

DOUBLE: dict[str, Any] = {"dtype": torch.float64}


def number(value: float) -> Tensor:
    return torch.tensor(value, **DOUBLE)


# ------------------------------------------------------------------ differences of one function


def derivative(function: Callable[[float], float], tolerance: float = 1e-5) -> Any:
    ladder = Ladder(function, function(0.0), 0.0, 1.0)
    return climb_down([ladder], tolerance, 0.0)[0]


def test_differences_of_a_smooth_function_are_of_fourth_order() -> None:
    found = derivative(lambda t: float(number(1 + t).sin()))
    truth = float(number(1.0).cos())
    assert (
        abs(found.value - truth) < 1e-11
    )  # h^4 f5 / 7680 = 5e-13 at the first step, rounding 1e-13
    assert found.noise < 1e-6


@pytest.mark.parametrize("distance", [3e-3, 1e-4, 1e-6])
def test_differences_come_closer_than_the_nearest_kink(distance: float) -> None:
    found = derivative(lambda t: t + 5 * max(t - distance, 0.0))
    assert abs(found.value - 1) < 1e-8  # rounding over the step
    assert found.step < distance


def test_a_kink_at_the_point_is_uncertainty_not_truth() -> None:
    """The mean of both slopes, .5, is found at every step: central differences cannot see it."""
    found = derivative(lambda t: 3.0 + max(t, 0.0))
    assert found.noise > 0.4


def test_noise_of_the_function_is_noise_of_the_derivative() -> None:
    def rough(t: float) -> float:
        return t + 1e-4 * (hash(t) % 1000 / 1000)

    found = derivative(rough)
    assert abs(found.value - 1) < 3 * found.noise


def test_steps_stay_where_the_function_is_finite() -> None:
    found = derivative(lambda t: float(number(1e-6 + t).sqrt()))
    assert found.value == pytest.approx(500, rel=1e-8)


def test_every_variable_gets_a_direction() -> None:
    assert shares([3, 1, 2], 6) == [3, 1, 2]
    assert shares([1000, 1, 40], 32) == [16, 1, 15]
    assert shares([5, 5, 5], 1) == [1, 1, 1]


def test_directions_move_each_entry_by_its_own_size() -> None:
    point = torch.tensor([1e-6, 1.0, 1e3] * 10, **DOUBLE)
    along, lengths = directions(point, 4, generator())
    torch.testing.assert_close(along.norm(dim=1), torch.ones(4, **DOUBLE))
    moves = along.abs() * torch.tensor(lengths)[:, None]
    assert bool((moves <= 5 * point).all())


# ------------------------------------------------------------------ right answers that must pass


def test_an_answer_of_zero_at_an_optimum_agrees() -> None:
    for truth in (1.0, 0.1, 1 / 3):  # at two of them rounding leaves a gradient of 1e-17
        problem = Problem.from_functions(
            lambda x, y, _, t=truth: (y["y"] - t).square().sum(),
            lambda x, y, _: (y["y"] - x["x"]).square().sum(),
            {"x": torch.full((2,), truth, **DOUBLE)},
            {"y": torch.zeros(2, **DOUBLE)},
        )
        check = check_hypergradient(problem, Implicit())
        assert check.passed, check
        assert check.cosine == 1


def test_a_variable_that_nothing_uses_agrees_with_zero() -> None:
    problem = Quadratic()
    problem.upper["unused"] = nn.Parameter(normal(2))
    assert check_hypergradient(problem, Implicit()).passed


def test_a_tiny_penalty_is_not_stepped_over() -> None:
    """A fixed step made it negative; the derivative is known in closed form."""
    problem = Problem.from_functions(
        lambda x, y, _: (y["y"] - 1).square().sum(),
        lambda x, y, _: (y["y"] - 1).square().sum() + x["l2"].sqrt() * y["y"].square().sum(),
        {"l2": number(1e-5)},
        {"y": torch.zeros(2, **DOUBLE)},
    )
    check = check_hypergradient(problem, Implicit(), tolerance=1e-8)
    assert check.passed, check
    root = 1e-5**0.5
    torch.testing.assert_close(check.truth[0].item(), 2 / (1 + root) ** 3, rtol=1e-8, atol=0)


def test_scales_may_differ_by_many_orders() -> None:
    scales = {"a": 1e-9, "b": 1.0, "c": 1e7}
    upper = {
        name: scale * (1 + torch.rand(2, generator=generator(), **DOUBLE))
        for name, scale in scales.items()
    }
    problem = Problem.from_functions(
        lambda x, y, _: sum((y[n] - 3).square().sum() for n in scales),
        lambda x, y, _: sum((y[n] - (x[n] / s).sin()).square().sum() for n, s in scales.items()),
        upper,
        {name: torch.zeros(2, **DOUBLE) for name in scales},
    )
    check = check_hypergradient(problem, Implicit(Cholesky()), tolerance=1e-8)
    assert check.passed, check
    assert list(check.variables) == list(scales)


class Shared(Problem):
    """One variable belongs to both levels: its hypergradient is the partial derivative of F."""

    def __init__(self) -> None:
        super().__init__()
        shared = nn.Parameter(normal(2, seed=1))
        self.upper = nn.ParameterDict({"x": normal(2), "shared": shared})
        self.lower = nn.ParameterDict({"y": normal(2, seed=2), "shared": shared})

    def upper_loss(self, batch: Any) -> Tensor:
        return (self.lower["shared"] * self.lower["y"]).sum() + self.upper["x"].square().sum()

    def lower_loss(self, batch: Any) -> Tensor:
        pull = (self.lower["y"] - self.upper["x"].sin()).square().sum()
        return pull + (self.lower["shared"] - self.lower["y"]).square().sum()


@pytest.mark.parametrize("solver", [Implicit(Cholesky()), Unrolled(3, torchopt.sgd(0.1))])
def test_variables_of_both_levels(solver: Solver) -> None:
    check = check_hypergradient(Shared(), solver, tolerance=1e-8)
    assert check.passed, check
    assert not check_hypergradient(Shared(), Alternating()).passed


class Penalty(Problem):
    """Ridge with the usual filter; `memory` makes the weight's layout another one."""

    def __init__(self, memory: str = "contiguous") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lower = nn.Conv2d(2, 3, 3).double()
        self.upper = nn.ParameterDict({"l": number(-1.0), "m": normal(2, 3).T})
        if memory == "channels last":
            self.lower.to(memory_format=torch.channels_last)

    def penalty(self) -> Tensor:
        found = [p for p in self.lower.parameters() if p.requires_grad]
        return self.upper["l"].exp() * sum((p.square().sum() for p in found), number(0.0))

    def upper_loss(self, batch: Any) -> Tensor:
        return (self.lower(batch) - 1).square().mean() + self.penalty()

    def lower_loss(self, batch: Any) -> Tensor:
        weigh = self.upper["m"].sigmoid().mean()
        return weigh * (self.lower(batch) - 1).square().mean() + self.penalty()


@pytest.mark.parametrize("memory", ["contiguous", "channels last"])
@pytest.mark.parametrize("solver", [Implicit(Cholesky()), Unrolled(2, torchopt.sgd(0.1))])
def test_filters_over_requires_grad_and_other_memory_formats(memory: str, solver: Solver) -> None:
    batch = normal(4, 2, 5, 5)
    check = check_hypergradient(Penalty(memory), solver, batch, [batch], tolerance=1e-8)
    assert check.passed, check


class Forces(Problem):
    """An upper loss that contains a gradient."""

    def __init__(self, targets: Tensor) -> None:
        super().__init__()
        self.targets = targets
        torch.manual_seed(0)
        self.upper = nn.ParameterDict({"l": number(-1.0)})
        self.lower = nn.Linear(3, 1).double()

    def upper_loss(self, batch: Any) -> Tensor:
        x = batch.clone().requires_grad_()
        (force,) = torch.autograd.grad(self.lower(x).tanh().sum(), x, create_graph=True)
        return force.square().mean()

    def lower_loss(self, batch: Any) -> Tensor:
        l2 = self.upper["l"].exp() * self.lower.weight.square().sum()
        return (self.lower(batch) - self.targets).square().mean() + l2


@pytest.mark.parametrize("target", ["constant", "varied"])
def test_an_upper_loss_that_contains_a_gradient(target: str) -> None:
    """With constant targets the forces vanish at the solution, and F is 1e-33 for all penalties."""
    batch = normal(5, 3)
    problem = Forces(normal(5, 1, seed=3) if target == "varied" else torch.ones(5, 1, **DOUBLE))
    with torch.no_grad():  # the caller's mode does not matter
        check = check_hypergradient(problem, Implicit(), batch, [batch], tolerance=1e-6)
    assert check.passed, check


class Masked(Problem):
    """A transformer with padding: without gradients, torch takes another kernel for it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
        encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.lower = nn.ModuleDict({"encode": encoder, "head": nn.Linear(4, 1)}).double()
        self.upper = nn.ParameterDict({"l": number(-1.0)})
        self.eval()

    def upper_loss(self, batch: Any) -> Tensor:
        inputs, targets, mask = batch
        code = self.lower["encode"](inputs, src_key_padding_mask=mask)
        return (self.lower["head"](code).mean((1, 2)) - targets).square().mean()

    def lower_loss(self, batch: Any) -> Tensor:
        squares = sum((p.square().sum() for p in self.lower.parameters()), number(0.0))
        return self.upper_loss(batch) + self.upper["l"].exp() * squares


def test_a_transformer_that_is_evaluated() -> None:
    mask = torch.arange(6)[None] >= torch.tensor([6, 5, 3, 2, 2])[:, None]
    batch = (normal(5, 6, 4), normal(5, seed=1), mask)
    solver = Unrolled(2, torchopt.sgd(0.05))
    check = check_hypergradient(Masked(), solver, batch, [batch], tolerance=1e-7)
    assert check.passed, check


class Weighted(Problem):
    """A network trained on weighted examples with a penalty."""

    def __init__(self, net: nn.Module, rows: int) -> None:
        super().__init__()
        self.lower = net
        self.upper = nn.ParameterDict({"l": number(-2.0), "w": torch.zeros(rows, **DOUBLE)})

    def upper_loss(self, batch: Any) -> Tensor:
        return (self.lower(batch[0]) - batch[1]).square().mean()

    def lower_loss(self, batch: Any) -> Tensor:
        errors = (self.lower(batch[0]) - batch[1]).square()[:, 0]
        squares = sum((p.square().sum() for p in self.lower.parameters()), number(0.0))
        return (errors * self.upper["w"].sigmoid()).mean() + self.upper["l"].exp() * squares


@pytest.mark.parametrize("activation", [nn.ReLU, nn.LeakyReLU])
@pytest.mark.parametrize("seed", range(2))
def test_relu_networks_are_judged_between_their_kinks(activation: Any, seed: int) -> None:
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Linear(3, 16), activation(), nn.Linear(16, 16), activation(), nn.Linear(16, 1)
    )
    problem = Weighted(net.double(), 10)
    batch = (normal(10, 3, seed=seed), normal(10, 1, seed=seed + 50))
    other = (normal(10, 3, seed=seed + 100), normal(10, 1, seed=seed + 150))
    solver = Unrolled(20, torchopt.sgd(0.1))
    check = check_hypergradient(problem, solver, other, [batch], num_directions=3)
    assert check.passed, check


class Digits(Problem):
    """64-32-10 on digits with one log-penalty."""

    def __init__(self, activation: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lower = nn.Sequential(nn.Linear(64, 32), activation(), nn.Linear(32, 10)).double()
        self.upper = nn.ParameterDict({"l": number(-4.0)})

    def upper_loss(self, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(self.lower(batch[0]), batch[1])

    def lower_loss(self, batch: Any) -> Tensor:
        squares = sum((p.square().sum() for p in self.lower.parameters()), number(0.0))
        return self.upper_loss(batch) + self.upper["l"].exp() * squares


@pytest.mark.parametrize("running", [True, False], ids=["torch", "torchopt"])
@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
def test_adam_from_a_fresh_state_on_digits(activation: Any, running: bool) -> None:
    """Its first step is g / (|g| + 1e-8): smooth at small steps only, where a plateau is found."""
    images, labels = load_digits(return_X_y=True)
    rows = torch.tensor(images[:200] / 16, **DOUBLE), torch.tensor(labels[:200])
    batch, other = tuple(t[:100] for t in rows), tuple(t[100:] for t in rows)
    problem = Digits(activation)
    optimizer = torch.optim.Adam(problem.lower.parameters(), 1e-2)
    solver = Unrolled(5) if running else Unrolled(5, torchopt.adam(1e-2))
    check = check_hypergradient(problem, solver, other, [batch], lower_optimizer=optimizer)
    assert check.passed, check

    def loop(log: float) -> float:
        mine = Digits(activation)
        with torch.no_grad():
            mine.upper["l"].add_(log)
        adam = torch.optim.Adam(mine.lower.parameters(), 1e-2)
        for _ in range(5):
            adam.zero_grad()
            mine.lower_loss(batch).backward()
            adam.step()
        return float(mine.upper_loss(other).detach())

    by_hand = (loop(1e-7) - loop(-1e-7)) / 2e-7
    # rounding over the step, and torchopt's bias correction in single precision
    assert float(check.answer[0]) == pytest.approx(by_hand, rel=1e-4)


def test_a_kink_at_the_point_is_inconclusive() -> None:
    problem = Problem.from_functions(
        lambda x, y, _: (y["y"] - 3).square().sum(),
        lambda x, y, _: (y["y"] - x["x"].relu()).square().sum(),
        {"x": torch.zeros(2, **DOUBLE)},
        {"y": torch.zeros(2, **DOUBLE)},
    )
    check = check_hypergradient(problem, Implicit())
    assert not check.passed
    assert str(check).startswith("inconclusive: ")
    assert "`x`" in str(check)


def test_a_step_may_be_given() -> None:
    problem = Problem.from_functions(
        lambda x, y, _: (y["y"] - 3).square().sum(),
        lambda x, y, _: (y["y"] - x["x"]).square().sum(),
        {"x": torch.ones(2, **DOUBLE)},
        {"y": torch.zeros(2, **DOUBLE)},
    )
    check = check_hypergradient(problem, Implicit(), step=1e-3)
    assert check.passed
    assert check.variables["x"].step == 1e-3
    with pytest.raises(ValueError, match="`step` must be positive"):
        check_hypergradient(problem, Implicit(), step=-1e-3)


def test_one_level_is_checked_too() -> None:
    problem = Problem.from_functions(
        lambda x, y, _: x["x"].sin().sum(),
        lambda x, y, _: x["x"].sum(),
        {"x": normal(2)},
        {},
    )
    assert check_hypergradient(problem, Alternating()).passed


# ------------------------------------------------------------------ mistakes that must be found


def test_a_block_without_response_is_found_beside_one_that_is_larger_by_1e8() -> None:
    def problem(stop: bool) -> Problem:
        def lower(x: Any, y: Any, _: Any) -> Tensor:
            small = x["small"].detach() if stop else x["small"]
            return (y["u"] - x["big"]).square().sum() + (y["v"] - small).square().sum()

        return Problem.from_functions(
            lambda x, y, _: (1e4 * y["u"]).square().sum() + (y["v"] - 1).square().sum(),
            lower,
            {"big": torch.ones(2, **DOUBLE), "small": torch.zeros(2, **DOUBLE)},
            {"u": torch.zeros(2, **DOUBLE), "v": torch.zeros(2, **DOUBLE)},
        )

    check = check_hypergradient(problem(True), Implicit(Cholesky()))
    assert not check.passed
    assert "in `small`; it is the direct term alone" in str(check)
    assert check.variables["big"].outcome == "agrees"
    assert check_hypergradient(problem(False), Implicit(Cholesky())).passed


def test_an_entry_without_response_is_found_beside_larger_ones() -> None:
    scale = torch.tensor([1e4, 1.0, 1.0], **DOUBLE)

    def problem(stop: bool) -> Problem:
        def lower(x: Any, y: Any, _: Any) -> Tensor:
            last = x["x"][2:].detach() if stop else x["x"][2:]
            return (y["y"] - torch.cat([x["x"][:2], last])).square().sum()

        return Problem.from_functions(
            lambda x, y, _: (scale * (y["y"] - 2)).square().sum(),
            lower,
            {"x": torch.ones(3, **DOUBLE)},
            {"y": torch.zeros(3, **DOUBLE)},
        )

    check = check_hypergradient(problem(True), Implicit(Cholesky()))
    assert not check.passed
    assert "in `x`, entry 2" in str(check)
    assert check_hypergradient(problem(False), Implicit(Cholesky())).passed


class Clipped(Problem):
    """The lower optimizer moves one of two variables; both count in the gradient's norm."""

    def __init__(self) -> None:
        super().__init__()
        self.upper = nn.ParameterDict({"x": number(0.5)})
        self.lower = nn.ParameterDict(
            {
                "moved": torch.tensor([1.0, -1.0], **DOUBLE),
                "kept": torch.tensor([2.0, 1.0], **DOUBLE),
            }
        )

    def upper_loss(self, batch: Any) -> Tensor:
        return (self.lower["moved"] - 0.2).square().sum()

    def lower_loss(self, batch: Any) -> Tensor:
        return (self.lower["moved"] * self.lower["kept"] - self.upper["x"]).square().sum()


def test_the_procedure_is_independent_of_the_solver(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong iterate in `Unrolled` is found, by its value and by its derivative."""
    problem = Clipped()
    optimizer = torch.optim.SGD([problem.lower["moved"]], 0.5)
    solver = Unrolled(6, mode="recompute", max_grad_norm=0.5)
    check = check_hypergradient(problem, solver, lower_optimizer=optimizer, tolerance=1e-8)
    assert check.passed, check
    # by the loop a user would write, differences of step 1e-5
    assert float(check.truth) == pytest.approx(-0.1587883007331259, rel=1e-8)

    right = unrolling.clip
    monkeypatch.setattr(unrolling, "clip", lambda grads, most: right(grads, 0.9 * most))
    check = check_hypergradient(problem, solver, lower_optimizer=optimizer)
    assert not check.passed
    assert "takes the upper loss to be" in str(check)
    assert "plain loop" in str(check)


def test_momentum_and_state_are_left_as_they_were() -> None:
    problem = Clipped()
    optimizer = torch.optim.Adam(problem.lower.parameters(), 0.1)
    problem.lower_loss(None).backward()
    optimizer.step()
    kept = {p: p.grad for p in problem.parameters()}
    state = {p: {k: v.clone() for k, v in s.items()} for p, s in optimizer.state.items()}
    check = check_hypergradient(problem, Unrolled(3), lower_optimizer=optimizer, tolerance=1e-8)
    assert check.passed, check
    assert all(p.grad is g for p, g in kept.items())
    for p, before in state.items():
        for key, value in before.items():
            assert torch.equal(optimizer.state[p][key], value)


@dataclass(frozen=True)
class Mistaken(Solver):
    """A right solver whose response is spoiled."""

    right: Solver
    spoil: Callable[[Tensor], Tensor]

    def respond(self, oracles: Any, state: Any, lower_optimizer: Any) -> Response:
        response = self.right.respond(oracles, state, lower_optimizer)

        def vjp(v: Any) -> ResponseProduct:
            assert response.vjp is not None
            product = response.vjp(v)
            return product._replace(product={n: self.spoil(g) for n, g in product.product.items()})

        return response._replace(vjp=vjp)


MISTAKES: dict[str, Callable[[Tensor], Tensor]] = {
    "wrong sign": lambda g: -g,
    "a factor of two": lambda g: 2 * g,
    "one part in ten thousand": lambda g: g * 1.0001,
    "dropped": torch.zeros_like,
    "transposed": lambda g: g.flip(0),
    "not a number": lambda g: g * torch.nan,
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_found(mistake: str) -> None:
    check = check_hypergradient(Quadratic(), Mistaken(Implicit(Cholesky()), MISTAKES[mistake]))
    assert not check.passed
    assert str(check).startswith("disagrees: ")
    assert "`x`" in str(check)


def test_causes_are_not_guessed() -> None:
    def words(solver: Solver, **options: Any) -> str:
        return str(check_hypergradient(Quadratic(), solver, **options))

    approximations = [Alternating(), Implicit(Identity()), Implicit(Neumann(2, 0.1))]
    approximations += [Unrolled(4, torchopt.sgd(0.1), truncate=2)]
    for solver in approximations:
        assert "drops or approximates the response term" in words(solver)
    halved = Mistaken(Implicit(Cholesky()), lambda g: g / 2)
    assert "drops" not in words(halved)
    assert "direct term alone" in words(Mistaken(Implicit(Cholesky()), torch.zeros_like))
    early = Problem.from_functions(
        lambda x, y, _: (y["y"] - 3).square().sum(),
        lambda x, y, _: (y["y"] - x["x"].sin()).cosh().sum(),
        {"x": torch.ones(2, **DOUBLE)},
        {"y": torch.zeros(2, **DOUBLE)},
    )
    assert "`solve_first=False`" in str(check_hypergradient(early, Implicit(), solve_first=False))


# ------------------------------------------------------------------ the lower minimum


def test_a_lower_level_without_minimum_is_one_sentence() -> None:
    problem = Problem.from_functions(
        lambda x, y, _: (y["y"] - 1).square().sum(),
        lambda x, y, _: (y["y"] * 2).sum() + x["x"],
        {"x": number(1.0)},
        {"y": torch.zeros(2, **DOUBLE)},
    )
    with pytest.raises(ValueError, match=r"could not be solved.*linear in a variable"):
        check_hypergradient(problem, Implicit())
    assert all(bool((p == q).all()) for p, q in zip(problem.parameters(), [1.0, 0.0], strict=True))


@pytest.mark.parametrize("n", [20, 1100])
def test_the_lower_minimum_is_found_to_rounding(n: int) -> None:
    """By dense Newton steps, and by conjugate gradients where there are many variables."""
    curvature = torch.linspace(1, 50, n, **DOUBLE)
    target = normal(n)
    problem = Problem.from_functions(
        lambda x, y, _: y["y"].sum(),
        lambda x, y, _: (curvature * ((y["y"] - target).cosh() - 1)).sum() + 0 * x["x"],
        {"x": number(1.0)},
        {"y": torch.zeros(n, **DOUBLE)},
    )
    solution = solve_lower(Oracles(problem, None, [None]))["y"]
    torch.testing.assert_close(solution, target, rtol=0, atol=1e-12)


def test_an_answer_is_not_blamed_for_an_inexact_minimum() -> None:
    """A minimum at infinity: Newton's last step stays long, and enters the uncertainty."""
    problem = Problem.from_functions(
        lambda x, y, _: y["y"].sum(),
        lambda x, y, _: (-y["y"]).exp().sum() * x["x"],
        {"x": number(1.0)},
        {"y": torch.zeros(1, **DOUBLE)},
    )
    check = check_hypergradient(problem, Implicit(Cholesky()))
    assert not str(check).startswith("disagrees"), check


def test_ridge_regression_still_reaches_ten_digits() -> None:
    test, train = regression(seed=7), regression(seed=9)
    check = check_hypergradient(Ridge(), Implicit(Cholesky()), test, [train], tolerance=1e-10)
    assert check.passed, check


def test_several_lower_batches_are_one_lower_loss() -> None:
    """`Implicit` averages the lower batches, and so does the solution it is compared with."""
    test, first, second = regression(seed=7), regression(seed=9), regression(seed=11)
    whole = tuple(torch.cat(parts) for parts in zip(first, second, strict=True))
    several = check_hypergradient(
        Ridge(), Implicit(Cholesky()), test, [first, second], tolerance=1e-9
    )
    assert several.passed, several
    together = check_hypergradient(Ridge(), Implicit(Cholesky()), test, [whole], tolerance=1e-9)
    torch.testing.assert_close(several.truth, together.truth, rtol=1e-8, atol=0)


def test_complex_variables_are_refused_with_advice_that_helps() -> None:
    problem = Problem.from_functions(
        lambda x, y, _: y["z"].abs().square().sum(),
        lambda x, y, _: (y["z"] - x["a"]).abs().square().sum(),
        {"a": number(1.0)},
        {"z": nn.Parameter(torch.zeros(2, dtype=torch.complex128))},
    )
    with pytest.raises(ValueError, match=r"`z` .* is complex; keep it as pairs of reals"):
        check_hypergradient(problem, Implicit())

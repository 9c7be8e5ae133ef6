"""Right hypergradients that `check_hypergradient` must pass."""

from typing import Any

import pytest
import torch
import torchopt
from sklearn.datasets import load_digits
from torch import Tensor, nn

from bilevel import Alternating, Cholesky, Implicit, Problem, Solver, Unrolled, check_hypergradient
from tests.core.check.cases import DOUBLE, number
from tests.problems import Quadratic, generator, normal


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

"""Programs with one mistake each, and programs without: what `explain` must tell apart.

Every program is what a user would write. Those with a mistake run without a warning, or with one that
does not say what is wrong.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torchopt
from torch import Tensor, nn
from torch.nn import functional

from bilevel import (
    Alternating,
    ConjugateGradient,
    Identity,
    Implicit,
    Neumann,
    Problem,
    Solver,
    Unrolled,
)
from bilevel.check import solve_lower
from bilevel.oracles import Oracles
from tests.problems import Quadratic, generator, normal, spd

DOUBLE: dict[str, Any] = {"dtype": torch.float64}


@dataclass
class Program:
    """A problem, a solver and how they are run."""

    problem: Problem
    solver: Solver
    upper_batch: Any = None
    lower_batches: list[Any] = field(default_factory=lambda: [None])
    settings: dict[str, Any] = field(default_factory=dict)


def solved(problem: Problem, batch: Any = None) -> Problem:
    """The problem with its lower variables at the minimum."""
    found = solve_lower(Oracles(problem, batch, [batch]))
    with torch.no_grad():
        for name, y in problem.variables("lower").items():
            y.copy_(found[name])
    return problem


class Rows(NamedTuple):
    inputs: Tensor
    targets: Tensor


def rows(seed: int, count: int = 30, features: int = 5, noise: float = 0.3) -> Rows:
    inputs = normal(count, features, seed=seed)
    weights = torch.linspace(1, -1, features, **DOUBLE)
    return Rows(inputs, inputs @ weights + noise * normal(count, seed=seed + 1))


class Ridge(Problem):
    """A penalty per feature, tuned on other rows."""

    def __init__(self, features: int = 5) -> None:
        super().__init__()
        self.upper = nn.ParameterDict({"log_l2": torch.full((features,), -1.0, **DOUBLE)})
        self.lower = nn.ParameterDict({"w": torch.zeros(features, **DOUBLE)})

    def penalty(self) -> Tensor:
        return self.upper["log_l2"].exp()

    def fit(self, batch: Rows) -> Tensor:
        return (batch.inputs @ self.lower["w"] - batch.targets).square().mean()

    def upper_loss(self, batch: Rows) -> Tensor:
        return self.fit(batch)

    def lower_loss(self, batch: Rows) -> Tensor:
        return self.fit(batch) + (self.penalty() * self.lower["w"].square()).sum()


def ridge(kind: type[Ridge], solver: Solver | None = None, *, is_solved: bool = True) -> Program:
    train, valid = rows(1), rows(5)
    problem = solved(kind(), train) if is_solved else kind()
    return Program(problem, solver or Implicit(), valid, [train])


# ------------------------------------------------------------------ terms


def alternating_where_the_response_is_everything() -> Program:
    return ridge(Ridge, Alternating())


class Priced(Ridge):
    """The upper loss charges for penalties, so that it has a direct term."""

    def upper_loss(self, batch: Rows) -> Tensor:
        return self.fit(batch) + 0.02 * self.upper["log_l2"].square().mean()


def alternating_where_the_response_is_half() -> Program:
    return ridge(Priced, Alternating())


# ------------------------------------------------------------------ gradients that are cut off


class DetachedPenalty(Ridge):
    def penalty(self) -> Tensor:
        return self.upper["log_l2"].detach().exp()


class OnePenalty(Ridge):
    """One penalty for all features, and a scale of the targets."""

    def __init__(self) -> None:
        super().__init__()
        self.upper = nn.ParameterDict(
            {"log_l2": torch.tensor(-1.0, **DOUBLE), "shift": torch.tensor(0.1, **DOUBLE)}
        )

    def fit(self, batch: Rows) -> Tensor:
        return (
            (batch.inputs @ self.lower["w"] + self.upper["shift"] - batch.targets).square().mean()
        )

    def penalty(self) -> Tensor:
        return torch.full((5,), float(self.upper["log_l2"].exp().detach()), **DOUBLE)


class DetachedLower(Ridge):
    """The lower penalty is taken of constants."""

    def lower_loss(self, batch: Rows) -> Tensor:
        return self.fit(batch) + (self.penalty() * self.lower["w"].detach() * self.lower["w"]).sum()


class JudgedWithoutGrad(Ridge):
    """The upper loss mixes in the lower variables without their gradient."""

    def upper_loss(self, batch: Rows) -> Tensor:
        with torch.no_grad():
            predicted = batch.inputs[:, :2] @ self.lower["w"][:2]
        rest = batch.inputs[:, 2:] @ self.lower["w"][2:]
        return (predicted + rest - batch.targets).square().mean()


class Denoiser(Problem):
    """Learns how much noise to train with, but scales the noise where it is drawn."""

    def __init__(self) -> None:
        super().__init__()
        self.upper = nn.ParameterDict(
            {"log_sigma": torch.zeros((), **DOUBLE), "log_l2": torch.zeros((), **DOUBLE)}
        )
        self.lower = nn.ParameterDict({"w": torch.zeros(5, **DOUBLE)})

    def draw(self, data: Rows, generator: torch.Generator) -> Rows:
        noise = torch.randn(data.inputs.shape, generator=generator, **DOUBLE)
        return Rows(data.inputs + self.upper["log_sigma"].detach().exp() * noise, data.targets)

    def fit(self, batch: Rows) -> Tensor:
        return (batch.inputs @ self.lower["w"] - batch.targets).square().mean()

    def upper_loss(self, batch: Rows) -> Tensor:
        return self.fit(batch)

    def lower_loss(self, batch: Rows) -> Tensor:
        return self.fit(batch) + self.upper["log_l2"].exp() * self.lower["w"].square().sum()


def noise_scaled_where_it_is_drawn() -> Program:
    problem = Denoiser()
    train = problem.draw(rows(1), generator(0))
    return Program(solved(problem, train), Implicit(), rows(5), [train])


class Typo(Ridge):
    """One of two upper variables is used nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.upper["log_l1"] = nn.Parameter(torch.zeros(5, **DOUBLE))


class Frozen(Ridge):
    """A scale of the targets was left frozen by an earlier stage."""

    def __init__(self) -> None:
        super().__init__()
        self.upper["scale"] = nn.Parameter(torch.ones((), **DOUBLE), requires_grad=False)

    def fit(self, batch: Rows) -> Tensor:
        predicted = batch.inputs @ self.lower["w"] * self.upper["scale"]
        return (predicted - batch.targets).square().mean()


# ------------------------------------------------------------------ the lower level


def lower_level_not_solved() -> Program:
    return ridge(Ridge, is_solved=False)


def lower_rate_too_large() -> Program:
    program = ridge(Ridge)
    sgd = torch.optim.SGD(program.problem.lower.parameters(), 3.0)
    program.settings = {"lower_optimizer": sgd}
    return program


class Summed(Ridge):
    """The loss is summed, the rate was chosen for its mean."""

    def lower_loss(self, batch: Rows) -> Tensor:
        errors = batch.inputs @ self.lower["w"] - batch.targets
        return errors.square().sum() + (self.penalty() * self.lower["w"].square()).sum()


def sum_where_the_rate_is_for_a_mean() -> Program:
    program = ridge(Summed, Unrolled(10, torchopt.sgd(0.1)))
    return program


def singular_hessian() -> Program:
    """Two features are the same, and nothing prefers one of them."""
    inputs = normal(30, 3, seed=1)
    train = torch.cat([inputs, inputs[:, :1]], dim=1), normal(30, seed=2)

    def lower(x: Any, y: Any, batch: Any) -> Tensor:
        return (batch[0] @ y["w"] - x["scale"] * batch[1]).square().mean()

    def upper(x: Any, y: Any, batch: Any) -> Tensor:
        return (y["w"] - torch.tensor([1.0, 0.5, 0.2, -0.3], **DOUBLE)).square().sum()

    problem = Problem.from_functions(
        upper, lower, {"scale": torch.ones(30, **DOUBLE)}, {"w": torch.zeros(4, **DOUBLE)}
    )
    solution = torch.linalg.lstsq(train[0], train[1][:, None], driver="gelsd").solution[:, 0]
    with torch.no_grad():
        problem.variables("lower")["w"].copy_(solution)
    return Program(problem, Implicit(), train, [train])


def saddle() -> Program:
    """The lower variables stand on a ridge between two valleys."""

    def lower(x: Any, y: Any, _: Any) -> Tensor:
        return ((y["y"].square() - 1).square() + 0.1 * x["x"] * y["y"].square()).sum()

    def upper(x: Any, y: Any, _: Any) -> Tensor:
        return (y["y"] - 0.7).square().sum() + x["x"].square().sum()

    start = torch.tensor([1.0, 0.0, 0.97], **DOUBLE)
    problem = Problem.from_functions(
        upper, lower, {"x": torch.full((3,), 0.1, **DOUBLE)}, {"y": start}
    )
    return Program(problem, Implicit())


# ------------------------------------------------------------------ settings of a solver


def quadratic(solver: Solver, n: int = 20) -> Program:
    return Program(Quadratic(n, 5).solve(), solver)


class Stretched(Quadratic):
    """Eigenvalues from 1e-3 to 1."""

    def __init__(self) -> None:
        super().__init__(20, 5)
        turn, _ = torch.linalg.qr(normal(20, 20, seed=9))
        self.H = turn @ torch.diag(torch.logspace(-3, 0, 20, **DOUBLE)) @ turn.mT


def slow(solver: Solver) -> Program:
    """Plain gradient steps of size 1 contract by 0.9 where it is slowest."""
    problem = Quadratic(10, 3)
    problem.H = spd(10, low=0.1, high=1.0)
    return Program(problem.solve(), solver)


def damping_far_too_large() -> Program:
    return quadratic(Implicit(ConjugateGradient(damping=50.0)))


# ------------------------------------------------------------------ rates of the two levels


class Cleaning(Problem):
    """Two sources with softmax weights, one of them corrupted: half of the rows have random labels."""

    def __init__(self, features: int = 4) -> None:
        super().__init__()
        self.upper = nn.ParameterDict({"source": torch.zeros(2, **DOUBLE)})
        self.lower = nn.ParameterDict({"w": torch.zeros(features, **DOUBLE)})

    def upper_loss(self, batch: Rows) -> Tensor:
        logits = batch.inputs @ self.lower["w"]
        return functional.binary_cross_entropy_with_logits(logits, batch.targets)

    def lower_loss(self, batch: tuple[Rows, Rows]) -> Tensor:
        weights = self.upper["source"].softmax(0)
        fit = torch.stack([self.upper_loss(part) for part in batch])
        return weights @ fit + 0.01 * self.lower["w"].square().sum()


def labelled(seed: int, count: int, *, corrupted: bool = False) -> Rows:
    inputs = normal(count, 4, seed=seed)
    labels = (inputs @ torch.linspace(1, -1, 4, **DOUBLE) > 0).double()
    # the corrupted source says the same whatever the row is, as empty answers do
    return Rows(inputs, torch.ones_like(labels) * (inputs[:, 2] > 0) if corrupted else labels)


def cleaning(upper_rate: float, lower_rate: float = 1e-5) -> Program:
    train = labelled(1, 64), labelled(2, 64, corrupted=True)
    problem = solved(Cleaning(), train)
    settings = {
        "upper_optimizer": torch.optim.AdamW(
            problem.upper.parameters(), upper_rate, weight_decay=0
        ),
        "lower_optimizer": torch.optim.AdamW(
            problem.lower.parameters(), lower_rate, weight_decay=0
        ),
        "lower_steps": 2,
    }
    return Program(problem, Implicit(), labelled(3, 64), [train], settings)


def equal_step_sizes() -> Program:
    return cleaning(1e-5)


def upper_level_too_fast() -> Program:
    program = quadratic(Implicit(), n=6)
    levels = program.problem.upper.parameters(), program.problem.lower.parameters()
    program.settings = {
        "upper_optimizer": torch.optim.SGD(levels[0], 1.0),
        "lower_optimizer": torch.optim.SGD(levels[1], 0.005),
    }
    return program


# ------------------------------------------------------------------ circumstances


class FarFromZero(Ridge):
    """Targets around 400, which bfloat16 knows to two units."""

    def __init__(self) -> None:
        super().__init__()
        self.lower["bias"] = nn.Parameter(torch.zeros((), **DOUBLE))

    def fit(self, batch: Rows) -> Tensor:
        predicted = batch.inputs @ self.lower["w"] + self.lower["bias"]
        return (predicted - (batch.targets + 400)).square().mean()


def in_bfloat16() -> Program:
    program = ridge(FarFromZero)
    batches = [
        Rows(*(t.bfloat16() for t in batch))
        for batch in (program.upper_batch, *program.lower_batches)
    ]
    solver = Implicit(ConjugateGradient(max_steps=20, rtol=None))
    return Program(program.problem.bfloat16(), solver, batches[0], batches[1:])


class Normalised(Problem):
    """A linear model behind batch norm, its penalty tuned."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.upper = nn.ParameterDict({"log_l2": torch.tensor(-2.0)})
        self.lower = nn.Sequential(nn.BatchNorm1d(5, affine=False), nn.Linear(5, 1))
        self.double()

    def fit(self, batch: Rows) -> Tensor:
        return (self.lower(batch.inputs)[:, 0] - batch.targets).square().mean()

    def upper_loss(self, batch: Rows) -> Tensor:
        return self.fit(batch)

    def lower_loss(self, batch: Rows) -> Tensor:
        penalty = sum(p.square().sum() for p in self.lower.parameters())
        return self.fit(batch) + self.upper["log_l2"].exp() * penalty


def normalised(count: int) -> Program:
    train, valid = rows(1, count), rows(5, count)
    problem = solved(Normalised(), train)
    return Program(problem, Implicit(), valid, [train])


def same_rows_above_and_below() -> Program:
    train = rows(1)
    return Program(solved(Ridge(), train), Implicit(), train, [train])


MISTAKES: dict[str, tuple[str, Callable[[], Program]]] = {
    "alternating, the response is everything": (
        "dropped term",
        alternating_where_the_response_is_everything,
    ),
    "alternating, the response is half": ("dropped term", alternating_where_the_response_is_half),
    "detach in the lower loss": ("stopped gradient", lambda: ridge(DetachedPenalty)),
    "float() on the way": ("stopped gradient", lambda: ridge(OnePenalty)),
    "no_grad in the upper loss": ("stopped gradient", lambda: ridge(JudgedWithoutGrad)),
    "noise scaled in draw": ("unused variable", noise_scaled_where_it_is_drawn),
    "a variable that no loss uses": ("unused variable", lambda: ridge(Typo)),
    "a frozen upper parameter": ("frozen parameter", lambda: ridge(Frozen)),
    "lower level not solved": ("lower level", lower_level_not_solved),
    "lower rate too large": ("lower rate", lower_rate_too_large),
    "a sum where the rate is for a mean": ("lower rate", sum_where_the_rate_is_for_a_mean),
    "singular Hessian": ("flat directions", singular_hessian),
    "saddle": ("negative curvature", saddle),
    "Neumann step too large": (
        "linear solve",
        lambda: quadratic(Implicit(Neumann(20, step_size=1.0))),
    ),
    "too few Neumann terms": ("linear solve", lambda: quadratic(Implicit(Neumann(3, 0.05)))),
    "too few steps of conjugate gradients": (
        "linear solve",
        lambda: Program(Stretched().solve(), Implicit(ConjugateGradient(3, rtol=None))),
    ),
    "identity far from the inverse": ("linear solve", lambda: quadratic(Implicit(Identity(5.0)))),
    "damping far too large": ("damping", damping_far_too_large),
    "truncated too short": (
        "truncation",
        lambda: slow(Unrolled(60, torchopt.sgd(1.0), truncate=1)),
    ),
    "too few unrolled steps": ("unrolled steps", lambda: slow(Unrolled(2, torchopt.sgd(0.2)))),
    "equal step sizes": ("step sizes", equal_step_sizes),
    "upper level too fast": ("step sizes", upper_level_too_fast),
    "bfloat16": ("precision", in_bfloat16),
    "batch norm of four rows": ("batch statistics", lambda: normalised(4)),
    "same rows above and below": ("same batch", same_rows_above_and_below),
}


def minimax() -> Program:
    problem = Problem.from_functions(
        lambda x, y, _: x["x"].square().sum() + (x["x"] * y["y"]).sum() - y["y"].square().sum(),
        lambda x, y, _: y["y"].square().sum() - (x["x"] * y["y"]).sum(),
        {"x": torch.ones(3, **DOUBLE)},
        {"y": torch.full((3,), 0.5, **DOUBLE)},
    )
    return Program(problem, Alternating())


class Network(Normalised):
    """A hidden layer and no batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.lower = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1))


def network() -> Program:
    train, valid = rows(1), rows(5)
    torch.manual_seed(0)
    problem = solved(Network().double(), train).float()
    batches = [Rows(*(t.float() for t in batch)) for batch in (valid, train)]
    return Program(problem, Implicit(), batches[0], [batches[1]])


def well_rated() -> Program:
    program = ridge(Ridge)
    levels = program.problem.upper.parameters(), program.problem.lower.parameters()
    program.settings = {
        "upper_optimizer": torch.optim.Adam(levels[0], 0.02),
        "lower_optimizer": torch.optim.SGD(levels[1], 0.1),
        "lower_steps": 4,
        "num_steps": 500,
    }
    return program


HEALTHY: dict[str, Callable[[], Program]] = {
    "quadratic, conjugate gradients": lambda: quadratic(Implicit()),
    "ridge, both optimizers": well_rated,
    "minimax, alternating": minimax,
    "unrolled until it contracts": lambda: slow(Unrolled(60, torchopt.sgd(1.0))),
    "batch norm of 32 rows": lambda: normalised(32),
    "network in float32": network,
    "data cleaning, two time scales": lambda: cleaning(1e-1),
}

"""Problems for `benchmarks.check_seeds`, one for every seed, each with a solver that is right."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import torch
import torchopt
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from bilevel import (
    GMRES,
    Cholesky,
    ConjugateGradient,
    Implicit,
    Neumann,
    Problem,
    Solver,
    Unrolled,
)


@final
@dataclass(frozen=True)
class Trial:
    """One call of the check."""

    problem: Problem
    solver: Solver
    upper_batch: Any = None
    lower_batch: Any = None
    optimizer: torch.optim.Optimizer | None = None


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=rng(seed), dtype=torch.float64)


def regression(seed: int, rows: int = 8) -> tuple[Tensor, Tensor]:
    inputs = normal(rows, 3, seed=seed)
    return inputs, inputs.sum(1, keepdim=True).sin() + 0.1 * normal(rows, 1, seed=seed + 1)


EXACT: tuple[Solver, ...] = (
    Implicit(Cholesky()),
    Implicit(ConjugateGradient(rtol=1e-12)),
    Implicit(GMRES(rtol=1e-12)),
    Implicit(Neumann(num_steps=3000, step_size=0.1, rtol=1e-9)),
)


def quadratic(seed: int, stop: bool = False) -> Problem:
    """Closed form, variables of sizes 1e-4, 1 and 1e4."""
    turn, _ = torch.linalg.qr(normal(4, 4, seed=seed))
    H = turn @ torch.diag(torch.linspace(0.5, 4, 4, dtype=torch.float64)) @ turn.mT
    mix = {name: normal(4, 2, seed=seed + i) for i, name in enumerate("abc", start=1)}
    size = {"a": 1e-4, "b": 1.0, "c": 1e4}

    def lower(x: Any, y: Any, _: Any) -> Tensor:
        seen = {n: x[n].detach() if stop and n == "a" else x[n] for n in mix}
        pull = sum((mix[n] @ (seen[n] / size[n]).sin() for n in mix), torch.zeros(()))
        return y["y"] @ H @ y["y"] / 2 - y["y"] @ pull

    upper = {n: size[n] * normal(2, seed=seed + 10 + i) for i, n in enumerate(mix)}
    start = {"y": normal(4, seed=seed + 20)}
    target = normal(4, seed=seed + 30)
    return Problem.from_functions(
        lambda x, y, _: (y["y"] - target).square().sum(), lower, upper, start
    )


def at_optimum(seed: int) -> Problem:
    """The lower solution is the upper minimum: every hypergradient is 0."""
    target = normal(3, seed=seed)
    return Problem.from_functions(
        lambda x, y, _: (y["y"] - target).square().sum(),
        lambda x, y, _: (y["y"] - x["x"]).cosh().sum(),
        {"x": target.clone()},
        {"y": torch.zeros(3, dtype=torch.float64)},
    )


def tiny_penalty(seed: int) -> Problem:
    """A penalty between 1e-8 and 1e-2 that must not become negative."""
    inputs, targets = regression(seed)
    other = regression(seed + 500)
    size = 10 ** float(torch.empty(()).uniform_(-8, -2, generator=rng(seed)))
    return Problem.from_functions(
        lambda x, y, _: (other[0] @ y["w"] - other[1][:, 0]).square().mean(),
        lambda x, y, _: (
            (inputs @ y["w"] - targets[:, 0]).square().mean()
            + x["l2"].sqrt() * y["w"].square().sum()
        ),
        {"l2": torch.tensor(size, dtype=torch.float64)},
        {"w": torch.zeros(3, dtype=torch.float64)},
    )


@final
class Fit(Problem):
    """A network fitted to weighted examples with a penalty."""

    def __init__(self, net: nn.Module, seed: int, mistake: str = "") -> None:
        super().__init__()
        self.lower = net
        self.upper = nn.ParameterDict({"l": normal(seed=seed) - 2, "w": normal(8, seed=seed + 1)})
        self.mistake = mistake

    def upper_loss(self, batch: Any) -> Tensor:
        return (self.lower(batch[0]) - batch[1]).square().mean()

    def lower_loss(self, batch: Any) -> Tensor:
        log = self.upper["l"]
        scale: Any = float(log.detach().exp()) if self.mistake == "float" else log.exp()
        weights = self.upper["w"].sigmoid()
        weights = weights.detach() if self.mistake == "detach" else weights
        errors = (self.lower(batch[0]) - batch[1]).square()[:, 0]
        squares = sum(
            (p.square().sum() for p in self.lower.parameters() if p.requires_grad),
            torch.zeros((), dtype=torch.float64),
        )
        return (weights * errors).mean() + 0.1 * scale * squares


def initialised(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make().double()


def mlp(activation: Callable[[], nn.Module], width: int = 8) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(
        nn.Linear(3, width),
        activation(),
        nn.Linear(width, width),
        activation(),
        nn.Linear(width, 1),
    )


@final
class Rows(nn.Module):
    """Reads a row as a sequence of numbers."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.embed, self.layer, self.head = nn.Linear(1, 4), layer, nn.Linear(4, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.embed(inputs[..., None])
        more = (hidden, hidden) if isinstance(self.layer, nn.MultiheadAttention) else ()
        return self.head(self.layer(hidden, *more)[0].mean(1))


def noisy() -> nn.Module:
    return nn.Sequential(
        nn.Linear(3, 6), nn.BatchNorm1d(6), nn.ReLU(inplace=True), nn.Dropout(0.3), nn.Linear(6, 1)
    )


def spectral() -> nn.Module:
    norm = parametrizations.spectral_norm
    return nn.Sequential(norm(nn.Linear(3, 4)), nn.Tanh(), norm(nn.Linear(4, 1)))


NETS: dict[str, Callable[[], nn.Module]] = {
    "tanh network": mlp(nn.Tanh),
    "ReLU network": mlp(nn.ReLU),
    "LeakyReLU network": mlp(nn.LeakyReLU),
    "batch norm, ReLU, dropout": noisy,
    "spectral norm": spectral,
    "attention": lambda: Rows(nn.MultiheadAttention(4, 2, batch_first=True)),
    "LSTM": lambda: Rows(nn.LSTM(4, 4, batch_first=True)),
}
STEPS: tuple[tuple[Solver, str], ...] = (
    (Unrolled(10, torchopt.sgd(0.1)), ""),
    (Unrolled(3, torchopt.sgd(0.05, momentum=0.9)), ""),
    (Unrolled(3), "sgd"),
    (Unrolled(3), "adam"),
    (Unrolled(3, mode="recompute"), "adamw"),
    (Unrolled(3, max_grad_norm=0.1, mode="recompute"), "partly"),
)


def optimizer(kind: str, problem: Problem) -> torch.optim.Optimizer | None:
    variables = list(problem.lower.parameters())
    return {
        "": lambda: None,
        "sgd": lambda: torch.optim.SGD(variables, 0.05, momentum=0.9),
        "adam": lambda: torch.optim.Adam(variables, 0.01),
        "adamw": lambda: torch.optim.AdamW(variables, 0.01, weight_decay=0.1),
        "partly": lambda: torch.optim.SGD(variables[1:], 0.05),
    }[kind]()


def net_trial(make: Callable[[], nn.Module]) -> Callable[[int], Trial]:
    def trial(seed: int) -> Trial:
        problem = Fit(initialised(make, seed), seed)
        solver, kind = STEPS[seed % len(STEPS)]
        batches = regression(seed + 1000), regression(seed + 2000)
        return Trial(problem, solver, *batches, optimizer(kind, problem))

    return trial


def solved(make: Callable[[int], Problem]) -> Callable[[int], Trial]:
    return lambda seed: Trial(make(seed), EXACT[seed % 3])


RIGHT: dict[str, Callable[[int], Trial]] = {
    "sizes from 1e-4 to 1e4": solved(quadratic),
    "the upper optimum": solved(at_optimum),
    "a tiny penalty": solved(tiny_penalty),
    **{name: net_trial(make) for name, make in NETS.items()},
}

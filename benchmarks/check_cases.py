"""Right answers and mistakes for `benchmarks.check_seeds`, one problem for every seed."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torchopt
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from bilevel import (
    GMRES,
    Alternating,
    Cholesky,
    ConjugateGradient,
    Implicit,
    LinearSolver,
    Neumann,
    Problem,
    Response,
    ResponseProduct,
    Result,
    Solver,
    Unrolled,
)
from bilevel.linear import LinearSolution
from bilevel.oracles import Oracles

Loss = Callable[[Any, Any, Any], Tensor]


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


def seeded(make: Callable[[], nn.Module], seed: int) -> nn.Module:
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
        problem = Fit(seeded(make, seed), seed)
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


# ------------------------------------------------------------------ mistakes


@dataclass(frozen=True)
class Spoiled(Solver):
    """A right solver whose response is spoiled on the way."""

    right: Solver
    spoil: Callable[[Tensor], Tensor]

    def respond(self, oracles: Oracles, state: Any, lower_optimizer: Any) -> Response:
        response = self.right.respond(oracles, state, lower_optimizer)

        def vjp(v: Any) -> ResponseProduct:
            assert response.vjp is not None
            product = response.vjp(v)
            return product._replace(product={n: self.spoil(g) for n, g in product.product.items()})

        return response._replace(vjp=vjp)


@dataclass(frozen=True)
class Posing(Solver):
    """Says it is implicit, drops the response."""

    def respond(self, oracles: Oracles, state: Any, lower_optimizer: Any) -> Response:
        def vjp(v: Any) -> ResponseProduct:
            return ResponseProduct({n: torch.zeros_like(x) for n, x in oracles.upper.items()})

        return Response(oracles.lower, vjp)


@dataclass(frozen=True)
class Stale(LinearSolver):
    """Answers with what it has."""

    old: Tensor

    def solve(self, operator: Any, rhs: Tensor, *, guess: Tensor | None = None) -> LinearSolution:
        return LinearSolution(self.old, Result.SUCCESS, None, 0)


@dataclass(frozen=True)
class OneStepMore(Unrolled):
    """Unrolls a step more than it says."""

    def respond(self, oracles: Oracles, state: Any, lower_optimizer: Any) -> Response:
        more = Unrolled(self.num_steps + 1, self.optimizer)
        return more.respond(oracles, state, lower_optimizer)


@dataclass(frozen=True)
class OtherClip(Unrolled):
    """Clips by another factor than it says."""

    def respond(self, oracles: Oracles, state: Any, lower_optimizer: Any) -> Response:
        assert self.max_grad_norm is not None
        other = Unrolled(self.num_steps, self.optimizer, max_grad_norm=1.01 * self.max_grad_norm)
        return other.respond(oracles, state, lower_optimizer)


def spoiled(change: Callable[[Tensor], Tensor]) -> Callable[[int], Trial]:
    return lambda seed: Trial(quadratic(seed), Spoiled(Implicit(Cholesky()), change))


def stale(seed: int) -> Trial:
    """A linear solver that returns the solution of another right-hand side and says it is right."""
    return Trial(quadratic(seed), Implicit(Stale(normal(4, seed=seed + 77))))


def small_block(seed: int) -> Trial:
    """A variable without response beside one that counts 1e8 times as much."""

    def lower(x: Any, y: Any, _: Any) -> Tensor:
        small = (y["v"] - x["small"].detach()).cosh().sum()
        return (y["u"] - x["big"]).cosh().sum() + small

    problem = Problem.from_functions(
        lambda x, y, _: (1e4 * y["u"]).square().sum() + (y["v"] - 1).square().sum(),
        lower,
        {"big": normal(2, seed=seed), "small": normal(2, seed=seed + 1)},
        {"u": torch.zeros(2, dtype=torch.float64), "v": torch.zeros(2, dtype=torch.float64)},
    )
    return Trial(problem, Implicit(Cholesky()))


def net_mistake(mistake: str, solver: Solver) -> Callable[[int], Trial]:
    def trial(seed: int) -> Trial:
        problem = Fit(seeded(mlp(nn.ReLU if seed % 2 else nn.Tanh), seed), seed, mistake)
        return Trial(problem, solver, regression(seed + 1000), regression(seed + 2000))

    return trial


MISTAKES: dict[str, Callable[[int], Trial]] = {
    "response dropped": lambda seed: Trial(quadratic(seed), Alternating()),
    "response dropped, posing as implicit": lambda seed: Trial(quadratic(seed), Posing()),
    "response detached in a block of size 1e-4": lambda seed: Trial(
        quadratic(seed, stop=True), Implicit(Cholesky())
    ),
    "response missing beside one 1e8 larger": small_block,
    "wrong sign": spoiled(lambda g: -g),
    "factor 2": spoiled(lambda g: 2 * g),
    "off by a thousandth": spoiled(lambda g: 1.001 * g),
    "one entry missing": spoiled(lambda g: torch.cat([g[:-1], torch.zeros_like(g[-1:])])),
    "solution of another system": stale,
    "weights detached": net_mistake("detach", Unrolled(3, torchopt.sgd(0.1))),
    "penalty through `float`": net_mistake("float", Unrolled(3, torchopt.sgd(0.1))),
    "one step more": net_mistake("", OneStepMore(3, torchopt.sgd(0.1))),
    "wrong clip factor": net_mistake("", OtherClip(3, torchopt.sgd(0.1), max_grad_norm=0.1)),
    "the last step only": net_mistake("", Unrolled(3, torchopt.sgd(0.1), truncate=1)),
}

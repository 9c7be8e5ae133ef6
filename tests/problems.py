"""Problems for the tests: small, in float64, knowing their own solution where there is one."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from bilevel import Problem


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def spd(n: int, *, low: float = 0.5, high: float = 4.0, seed: int = 0) -> Tensor:
    """A symmetric positive definite matrix with eigenvalues from `low` to `high`."""
    q, _ = torch.linalg.qr(normal(n, n, seed=seed))
    return q @ torch.diag(torch.linspace(low, high, n, dtype=torch.float64)) @ q.mT


class Quadratic(Problem):
    """G = y'Hy/2 - y'(Bx + c), F = |y - t|^2/2 + r|x|^2/2: everything in closed form."""

    def __init__(self, n: int = 4, m: int = 3, seed: int = 0) -> None:
        super().__init__()
        self.upper = nn.ParameterDict({"x": normal(m, seed=seed + 1)})
        self.lower = nn.ParameterDict({"y": normal(n, seed=seed + 2)})
        self.H: Tensor
        self.B: Tensor
        self.c: Tensor
        self.t: Tensor
        self.register_buffer("H", spd(n, seed=seed))
        self.register_buffer("B", normal(n, m, seed=seed + 3))
        self.register_buffer("c", normal(n, seed=seed + 4))
        self.register_buffer("t", normal(n, seed=seed + 5))

    def upper_loss(self, batch: Any) -> Tensor:
        x, y = self.upper["x"], self.lower["y"]
        return (y - self.t).square().sum() / 2 + x.square().sum() / 20

    def lower_loss(self, batch: Any) -> Tensor:
        x, y = self.upper["x"], self.lower["y"]
        return y @ self.H @ y / 2 - y @ (self.B @ x + self.c)

    def best_response(self, batch: Any) -> dict[str, Tensor]:
        return {"y": torch.linalg.solve(self.H, self.B @ self.upper["x"] + self.c)}

    def hypergradient(self) -> Tensor:
        """Of x -> F(x, y*(x))."""
        y = self.best_response(None)["y"]
        return (self.upper["x"] / 10 + self.B.mT @ torch.linalg.solve(self.H, y - self.t)).detach()

    def solve(self) -> "Quadratic":
        with torch.no_grad():
            self.lower["y"].copy_(self.best_response(None)["y"])
        return self


class Ridge(Problem):
    """Ridge regression; a log-penalty per feature is tuned on other data."""

    def __init__(self, features: int = 3) -> None:
        super().__init__()
        self.upper = nn.ParameterDict({"log_l2": 0.3 * normal(features, seed=1)})
        self.lower = nn.ParameterDict({"w": normal(features, seed=2)})

    def upper_loss(self, batch: Any) -> Tensor:
        inputs, targets = batch
        return (inputs @ self.lower["w"] - targets).square().mean()

    def lower_loss(self, batch: Any) -> Tensor:
        penalty = (self.upper["log_l2"].exp() * self.lower["w"].square()).sum()
        return self.upper_loss(batch) + 0.1 * penalty

    def best_response(self, batch: Any) -> dict[str, Tensor]:
        inputs, targets = batch
        gram = inputs.mT @ inputs / len(inputs) + 0.1 * torch.diag(self.upper["log_l2"].exp())
        return {"w": torch.linalg.solve(gram, inputs.mT @ targets / len(inputs))}


class Logistic(Problem):
    """Logistic regression with a log-penalty per feature; logs its accuracy."""

    def __init__(self, features: int = 3) -> None:
        super().__init__()
        self.upper = nn.ParameterDict({"log_l2": 0.3 * normal(features, seed=1)})
        self.lower = seeded(lambda: nn.Linear(features, 1))

    def _loss(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        inputs, labels = batch
        logits = self.lower(inputs)[:, 0]
        loss = nn.functional.binary_cross_entropy_with_logits(logits, labels)
        return loss, {"accuracy": ((logits > 0) == (labels > 0)).double().mean()}

    def upper_loss(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        return self._loss(batch)

    def lower_loss(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        loss, logs = self._loss(batch)
        l2 = self.upper["log_l2"].exp()
        return loss + 0.1 * (l2 * self.lower.weight.square()).sum(), logs


class NetProblem(Problem):
    """A network fitted with weight decay and example weights that the upper level tunes.

    The upper level holds a small network that weighs the examples, and one log-penalty.
    """

    def __init__(self, net: nn.Module, features: int = 3) -> None:
        super().__init__()
        self.lower = net
        self.upper = seeded(
            lambda: nn.ModuleDict(
                {
                    "weigh": nn.Sequential(nn.Linear(features, 1), nn.Sigmoid()),
                    "l2": nn.ParameterDict({"log": torch.tensor(-1.0)}),
                }
            )
        )

    def predict(self, inputs: Tensor) -> Tensor:
        return self.lower(inputs)[:, 0]

    def upper_loss(self, batch: Any) -> Tensor:
        inputs, targets = batch
        return (self.predict(inputs) - targets).square().mean()

    def lower_loss(self, batch: Any) -> Tensor:
        inputs, targets = batch
        errors = (self.predict(inputs) - targets).square()
        weights = self.upper["weigh"](inputs)[:, 0]
        penalty = sum(p.square().sum() for p in self.lower.parameters())
        return (weights * errors).mean() + 0.1 * self.upper["l2"]["log"].exp() * penalty


class Sequence(nn.Module):
    """Reads each row of the input as a sequence of numbers."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.embed = nn.Linear(1, 4)
        self.layer = layer
        self.head = nn.Linear(4, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.embed(inputs[..., None])
        if isinstance(self.layer, nn.MultiheadAttention):
            hidden = self.layer(hidden, hidden, hidden, need_weights=False)[0]
        else:
            hidden = self.layer(hidden)[0]
        return self.head(hidden.mean(dim=1))


class Tied(nn.Module):
    """One weight matrix in two layers, and tied once more under a second name."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.alias = self.first
        self.head = nn.Linear(3, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.second(self.first(inputs).tanh() + self.alias(inputs)).tanh())


class PartlyUsed(nn.Module):
    """One layer frozen, one never used."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.unused = nn.Linear(2, 2)
        self.head = nn.Linear(3, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.frozen(inputs).tanh())


class PartlyUsedProblem(NetProblem):
    def lower_loss(self, batch: Any) -> Tensor:
        inputs, targets = batch
        errors = (self.predict(inputs) - targets).square()
        head = self.lower.head.weight.square().sum()
        weights = self.upper["weigh"](inputs)[:, 0]
        return (weights * errors).mean() + 0.1 * self.upper["l2"]["log"].exp() * head


class TwoNets(NetProblem):
    """A lower level of two networks, as an encoder and a generator are."""

    def predict(self, inputs: Tensor) -> Tensor:
        return self.lower["decode"](self.lower["encode"](inputs).tanh())[:, 0]


def seeded(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """A module with reproducible weights in float64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make().double()


def spectral(norm: Callable[[nn.Module], nn.Module]) -> nn.Module:
    return nn.Sequential(norm(nn.Linear(3, 4)), nn.Tanh(), norm(nn.Linear(4, 1)))


def old_spectral_norm(layer: nn.Module) -> nn.Module:
    return torch.nn.utils.spectral_norm(layer)


def nested(mixed: bool = False) -> Problem:
    """From two functions and nested dicts; `mixed` puts the upper level in float32."""

    def upper_loss(x: Any, y: Any, batch: Any) -> Tensor:
        return (y["net"]["w"] - 1).square().sum() + y["b"].square() + x["inner"]["a"].square().sum()

    def lower_loss(x: Any, y: Any, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        pull = (y["net"]["w"] - x["inner"]["a"].sin()).square().sum()
        tilt = (1 + x["s"].exp()) * (y["b"] - y["net"]["w"].sum()).square()
        return pull + tilt + y["b"].cosh(), {"pull": pull}

    dtype = torch.float32 if mixed else torch.float64
    upper = {"inner": {"a": normal(2).to(dtype)}, "s": torch.zeros((), dtype=dtype)}
    lower = {"net": {"w": normal(2, seed=1)}, "b": torch.zeros((), dtype=torch.float64)}
    return Problem.from_functions(upper_loss, lower_loss, upper, lower)


def regression(rows: int = 6, features: int = 3, seed: int = 7) -> tuple[Tensor, Tensor]:
    inputs = normal(rows, features, seed=seed)
    return inputs, inputs.sum(1).sin() + 0.1 * normal(rows, seed=seed + 1)


def classification(rows: int = 20, features: int = 3, seed: int = 7) -> tuple[Tensor, Tensor]:
    inputs = normal(rows, features, seed=seed)
    return inputs, (inputs.sum(1) + 0.5 * normal(rows, seed=seed + 1) > 0).double()


@dataclass(frozen=True)
class Row:
    """A problem of the contract table.

    Attributes:
        make: builds the problem, the same every time.
        upper_batch: batch of the upper loss.
        lower_batch: batch of the lower loss.
        solvable: whether the lower minimum is well defined and can be found from here.
        exact: whether finite differences apply: float64, smooth, no power iteration in the way.
    """

    make: Callable[[], Problem]
    upper_batch: Any = None
    lower_batch: Any = None
    solvable: bool = False
    exact: bool = True
    tags: frozenset[str] = field(default_factory=frozenset)


def _net(
    make: Callable[[], nn.Module],
    *,
    exact: bool = True,
    kind: Callable[[nn.Module], Problem] = NetProblem,
) -> Row:
    return Row(lambda: kind(seeded(make)), regression(seed=7), regression(seed=9), exact=exact)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


def rough() -> nn.Module:
    """Batch norm in training mode, an in-place ReLU and dropout."""
    return nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(inplace=True), nn.Dropout(0.3), nn.Linear(4, 1)
    )


ROWS: dict[str, Row] = {
    "quadratic": Row(Quadratic, solvable=True),
    "ridge": Row(Ridge, regression(seed=7), regression(seed=9), solvable=True),
    "logistic with logs": Row(
        Logistic, classification(seed=7), classification(seed=9), solvable=True
    ),
    "tanh network": _net(mlp),
    "batch norm, in-place relu, dropout": _net(rough),
    "spectral norm (parametrization)": _net(lambda: spectral(parametrizations.spectral_norm)),
    "spectral norm (old style)": _net(lambda: spectral(old_spectral_norm)),
    "tied weights": _net(Tied),
    "frozen and unused": _net(PartlyUsed, kind=PartlyUsedProblem),
    "attention": _net(lambda: Sequence(nn.MultiheadAttention(4, 2, batch_first=True))),
    "lstm": _net(lambda: Sequence(nn.LSTM(4, 4, batch_first=True))),
    "two networks": _net(
        lambda: nn.ModuleDict({"encode": nn.Linear(3, 2), "decode": nn.Linear(2, 1)}), kind=TwoNets
    ),
    "nested dicts": Row(nested, solvable=True),
    # 32-bit rounding of the upper level drowns finite differences
    "mixed dtypes": Row(lambda: nested(mixed=True), exact=False),
}

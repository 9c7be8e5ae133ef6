"""The three problems of `benchmarks.compiled_speed`: a small and a middle MLP, a logistic regression.

Each in the forms that the libraries want: a `Problem` for this one, losses of tensors for loops by hand,
losses of a module, and arrays for JAX. Data are drawn at random, for time is all that is measured.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeAlias, final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.cases.regression import SIZES, decayed
from benchmarks.cases.regression import setting as regression
from bilevel import Problem

Batch: TypeAlias = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]  # of the lower, of the upper
MIDDLE, ROWS = (784, 256, 256, 10), 128
FEATURES, EXAMPLES = 50, 500


@final
@dataclass(frozen=True)
class Losses:
    """Both losses from the outputs of a model.

    Args:
        names: of the upper variables, in the order of the answers.
        upper: of outputs and targets.
        lower: of upper variables, outputs, targets and the lower variables.
    """

    names: tuple[str, ...]
    upper: Callable[[Tensor, Tensor], Tensor]
    lower: Callable[[list[Tensor], Tensor, Tensor, list[Tensor]], Tensor]


def _classes(upper: list[Tensor], outputs: Tensor, targets: Tensor, lower: list[Tensor]) -> Tensor:
    each = F.cross_entropy(outputs, targets, reduction="none")
    decay = torch.stack([w.square().sum() for w in lower]).sum() * upper[1].exp() / 2
    return (upper[0].sigmoid() * each).mean() + decay


def _logistic(upper: list[Tensor], outputs: Tensor, targets: Tensor, lower: list[Tensor]) -> Tensor:
    decay = (upper[0].exp() * lower[0][0].square()).sum() / 2
    return -F.logsigmoid(targets * outputs[:, 0]).mean() + decay


LOSSES = {
    "small": Losses(
        ("logits", "log_decay"),
        lambda outputs, targets: (outputs[:, 0] - targets).square().mean(),
        lambda x, outputs, targets, y: decayed(outputs[:, 0] - targets, x[0], x[1], y),
    ),
    "middle": Losses(("logits", "log_decay"), F.cross_entropy, _classes),
    "logistic": Losses(
        ("log_decay",),
        lambda outputs, targets: -F.logsigmoid(targets * outputs[:, 0]).mean(),
        _logistic,
    ),
}


@final
class ModelProblem(Problem):
    """A problem as a user of this library writes it."""

    def __init__(self, losses: Losses, model: nn.Module, upper: dict[str, Tensor]) -> None:
        super().__init__()
        self.losses = losses
        self.lower = model
        self.upper = nn.ParameterDict(upper)

    def in_order(self) -> list[Tensor]:
        """The upper variables as the answers have them; a `ParameterDict` sorts them by name."""
        return [self.upper[name] for name in self.losses.names]

    def upper_loss(self, batch: Batch) -> Tensor:
        inputs, targets = batch[1]
        return self.losses.upper(self.lower(inputs), targets)

    def lower_loss(self, batch: Batch) -> Tensor:
        inputs, targets = batch[0]
        y = list(self.lower.parameters())
        return self.losses.lower(self.in_order(), self.lower(inputs), targets, y)


@final
@dataclass(frozen=True)
class Setting:
    """One problem with its data, in the forms that the libraries want."""

    name: str
    problem: ModelProblem
    batch: Batch

    @property
    def names(self) -> tuple[str, ...]:
        return self.problem.losses.names

    def leaves(self) -> tuple[list[Tensor], list[Tensor]]:
        """Upper and lower variables as fresh leaves."""
        x, y = self.problem.in_order(), self.problem.lower.parameters()
        return (
            [p.detach().clone().requires_grad_() for p in x],
            [p.detach().clone().requires_grad_() for p in y],
        )

    def to(self, dtype: torch.dtype) -> "Setting":
        """The same numbers in another precision."""
        problem = copy.deepcopy(self.problem).to(dtype)
        (a, b), (c, d) = (
            tuple(t.to(dtype) if t.is_floating_point() else t for t in part) for part in self.batch
        )
        return Setting(self.name, problem, ((a, b), (c, d)))

    def module(self) -> nn.Module:
        """A copy of the lower level's module."""
        return copy.deepcopy(self.problem.lower)

    def outputs(self, lower: list[Tensor], part: int) -> Tensor:
        """What the model answers, from its tensors."""
        h = self.batch[part][0]
        if self.name == "logistic":
            return h @ lower[0].t()
        for i in range(0, len(lower), 2):
            h = h if i == 0 else h.tanh()
            h = torch.addmm(lower[i + 1], h, lower[i].t())
        return h

    def lower_loss(self, upper: list[Tensor], lower: list[Tensor]) -> Tensor:
        return self.problem.losses.lower(upper, self.outputs(lower, 0), self.batch[0][1], lower)

    def upper_loss(self, lower: list[Tensor]) -> Tensor:
        return self.problem.losses.upper(self.outputs(lower, 1), self.batch[1][1])

    def module_lower_loss(self, upper: list[Tensor], net: nn.Module) -> Tensor:
        inputs, targets = self.batch[0]
        return self.problem.losses.lower(upper, net(inputs), targets, list(net.parameters()))

    def module_upper_loss(self, net: nn.Module) -> Tensor:
        inputs, targets = self.batch[1]
        return self.problem.losses.upper(net(inputs), targets)

    def arrays(self) -> dict[str, np.ndarray]:
        """All of it for `benchmarks.in_jax.problems`."""
        (a, b), (c, d) = self.batch
        x, y = self.problem.in_order(), self.problem.lower.parameters()
        tensors = {f"upper.{i}": p for i, p in enumerate(x)}
        tensors |= {f"lower.{i}": p for i, p in enumerate(y)}
        tensors |= {"batch.lower.0": a, "batch.lower.1": b}
        tensors |= {"batch.upper.0": c, "batch.upper.1": d}
        return {name: tensor.detach().numpy() for name, tensor in tensors.items()}


def _small() -> tuple[Any, ...]:
    """The problem of `benchmarks.peers`."""
    found = regression(SIZES["small"], torch.float64)
    return found.problem.lower, dict(found.problem.upper), found.batch


def _middle() -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(0)
    layers: list[nn.Module] = []
    for m, n in pairwise(MIDDLE):
        linear = nn.Linear(m, n)
        linear.weight.data = torch.randn(n, m, generator=generator) / m**0.5
        linear.bias.data = torch.zeros(n)
        layers += [linear, nn.Tanh()]
    model = nn.Sequential(*layers[:-1])
    upper = {
        "logits": torch.randn(ROWS, generator=generator),
        "log_decay": torch.tensor(-5.0),
    }
    inputs = torch.randn(2, ROWS, MIDDLE[0], generator=generator)
    targets = torch.randint(MIDDLE[-1], (2, ROWS), generator=generator)
    return model, upper, tuple(zip(inputs, targets, strict=True))


def _logistic_regression() -> tuple[Any, ...]:
    """At its lower solution, by Newton's method in float64."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2, EXAMPLES, FEATURES, generator=generator, dtype=torch.float64)
    truth = torch.randn(FEATURES, generator=generator, dtype=torch.float64)
    noise = torch.randn(2, EXAMPLES, generator=generator, dtype=torch.float64)
    targets = (inputs @ truth + 3 * noise).sign()
    log_decay = torch.full((FEATURES,), -4.0, dtype=torch.float64)
    w = torch.zeros(FEATURES, dtype=torch.float64)
    for _ in range(20):
        p = torch.sigmoid(-targets[0] * (inputs[0] @ w))
        gradient = -inputs[0].t() @ (targets[0] * p) / EXAMPLES + log_decay.exp() * w
        hessian = inputs[0].t() * (p * (1 - p)) @ inputs[0] / EXAMPLES + log_decay.exp().diag()
        w = w - torch.linalg.solve(hessian, gradient)
    model = nn.Linear(FEATURES, 1, bias=False)
    model.weight.data = w[None]
    batch = tuple(zip(inputs, targets, strict=True))
    return model, {"log_decay": log_decay}, batch


MAKERS = {"small": _small, "middle": _middle, "logistic": _logistic_regression}


def setting(name: str, dtype: torch.dtype) -> Setting:
    """The problem of a name and its data, the same at every call."""
    model, upper, batch = MAKERS[name]()
    return Setting(name, ModelProblem(LOSSES[name], model, upper), batch).to(dtype)

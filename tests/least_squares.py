"""Least squares with a learned penalty, and its training with one argument changed."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from bilevel import Problem, train
from tests.problems import normal

INPUTS, TARGETS = normal(12, 3), normal(12, 1)
DATA = INPUTS, TARGETS


class Net(Problem):
    """Least squares with a learned penalty; `log` is what the upper loss logs."""

    def __init__(self, log: Any = None) -> None:
        super().__init__()
        self.log = log
        self.upper = nn.ParameterDict({"l": torch.tensor(-2.0).double()})
        self.lower = nn.Linear(3, 1).double()
        with torch.no_grad():
            self.lower.weight.fill_(0.1)
            self.lower.bias.fill_(0.2)

    def pair(self, batch: Any) -> tuple[Tensor, Tensor]:
        inputs, targets = batch
        return inputs, targets

    def error(self, batch: Any) -> Tensor:
        inputs, targets = self.pair(batch)
        return (inputs @ self.lower.weight.mT + self.lower.bias - targets).square().mean()

    def upper_loss(self, batch: Any) -> Any:
        loss = self.error(batch) + self.upper["l"] ** 2
        return loss if self.log is None else (loss, self.log)

    def lower_loss(self, batch: Any) -> Any:
        return self.error(batch) + self.upper["l"].exp() * self.lower.weight.square().sum()


def sgd(module: nn.Module, rate: Any = 0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), rate)


def begin(problem: Problem | None = None, data: Any = DATA, **changes: Any) -> Iterator[Any]:
    """`train` with these arguments; not a step is taken. Functions are given the settings."""
    problem = Net() if problem is None else problem
    settings: dict[str, Any] = {
        "num_steps": 3,
        "upper_optimizer": sgd(problem.upper),
        "lower_optimizer": sgd(problem.lower),
    }
    made = {n: v(settings, problem) if isinstance(v, Given) else v for n, v in changes.items()}
    return train(problem, data, **{**settings, **made})


@dataclasses.dataclass
class Given:
    """An argument that is made from the other ones."""

    make: Callable[[dict[str, Any], Problem], Any]

    def __call__(self, settings: dict[str, Any], problem: Problem) -> Any:
        return self.make(settings, problem)


def end(*args: Any, **changes: Any) -> dict[str, Tensor]:
    """The variables after training."""
    problem = changes.pop("problem", None) or Net()
    steps = list(begin(problem, *args, **changes))
    assert len(steps) == changes.get("num_steps", 3)
    return {name: p.detach().clone() for name, p in problem.named_parameters()}


def assert_equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)

"""Runs that are stopped, saved and taken up again."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchopt
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from bilevel import (
    Alternating,
    ConjugateGradient,
    Implicit,
    Problem,
    Solver,
    State,
    Unrolled,
    train,
)
from tests.problems import NetProblem, regression, seeded

DATA, UPPER_DATA = regression(rows=12, seed=7), regression(rows=10, seed=9)


class Noisy(NetProblem):
    """Dropout, batch norm, and noise drawn into the batch."""

    def __init__(self) -> None:
        super().__init__(
            seeded(
                lambda: nn.Sequential(
                    nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.3), nn.Linear(4, 1)
                )
            )
        )

    def draw(self, data: Any, generator: torch.Generator) -> Any:
        inputs, targets = data
        noise = torch.randn(inputs.shape, generator=generator, dtype=inputs.dtype)
        return inputs + 0.1 * noise, targets


SOLVERS: dict[str, Solver] = {
    "alternating": Alternating(),
    "implicit": Implicit(ConjugateGradient(max_steps=3, rtol=None, damping=20.0, warm_start=True)),
    "unrolled": Unrolled(2),
    "torchopt": Unrolled(2, torchopt.sgd(0.1)),  # its repr holds addresses
}


def schedulers(kind: str, optimizer: Any) -> Any:
    lr = torch.optim.lr_scheduler
    return {
        "none": lambda: (),
        "lambda": lambda: lr.LambdaLR(optimizer, lambda k: 0.9**k),
        "multistep": lambda: lr.MultiStepLR(optimizer, [2, 3]),
        "onecycle": lambda: lr.OneCycleLR(optimizer, 0.1, total_steps=20),
        "sequence": lambda: lr.SequentialLR(
            optimizer,
            [lr.ConstantLR(optimizer, 0.5, 2), lr.CosineAnnealingLR(optimizer, 5)],
            [2],
        ),
    }[kind]()


def make(solver: str = "alternating", schedule: str = "none", **changes: Any) -> dict[str, Any]:
    """A fresh run: everything `train` needs, built anew as after a restart."""
    problem = changes.pop("problem", None) or Noisy()
    upper = torch.optim.Adam(problem.upper.parameters(), np.float64(0.05))  # from a numpy grid
    lower = torch.optim.Adam(problem.lower.parameters(), 0.05)
    return {
        "problem": problem,
        "data": DATA,
        "upper_data": UPPER_DATA,
        "batch_size": 5,
        "solver": SOLVERS[solver],
        "upper_optimizer": upper,
        "lower_optimizer": lower,
        "lower_scheduler": schedulers(schedule, lower),
        "upper_scheduler": schedulers(schedule, upper),
        "lower_steps": 2,
        "num_steps": 6,
        **changes,
    }


def finish(settings: dict[str, Any], path: Path | None = None, stop: int = 0) -> Any:
    """Run to the end, or save at `stop` and leave; the problem and everything else."""
    for step in train(**settings):
        if step.number == stop and path is not None:
            step.state.save(path)
            return None
        state = step.state
    return state.state_dict()


def assert_same(a: Any, b: Any) -> None:
    if isinstance(a, Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            assert_same(one, other)
    else:
        assert a == b


def loader(rows: Any, seed: int = 3) -> DataLoader[Any]:
    return DataLoader(
        TensorDataset(*rows), 5, shuffle=True, generator=torch.Generator().manual_seed(seed)
    )


def state_of(problem: Problem) -> State:
    return State(problem, {}, {}, torch.Generator(), {})


def seed(number: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(number)


class Reading(NetProblem):
    """Nothing but the data is random in it."""

    def __init__(self) -> None:
        super().__init__(seeded(lambda: nn.Linear(3, 1)))

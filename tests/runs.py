"""Short runs of small models, and how two of them are compared."""

import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bilevel.methods import EBLVM, BiDVL, History

SHAPE = (1, 8, 8)
SHORT = {"num_steps": 6, "batch_size": 10, "log_every": 1, "checkpoint_every": 2}


def made(**options: Any) -> BiDVL:
    return BiDVL.for_images(SHAPE, latent_dim=2, width=4, **options)


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mean, self.log_variance = nn.Linear(64, 2), nn.Linear(64, 2)

    def forward(self, v: Tensor) -> tuple[Tensor, Tensor]:
        return self.mean(v.flatten(1)), self.log_variance(v.flatten(1))


def parts() -> dict[str, nn.Module]:
    """Networks of few operations, for tests that take many steps."""
    torch.manual_seed(0)
    energy = nn.Sequential(nn.Flatten(), nn.Linear(64, 3), nn.Tanh(), nn.Linear(3, 1))
    generator = nn.Sequential(nn.Linear(2, 64), nn.BatchNorm1d(64), nn.Unflatten(1, SHAPE))
    return {"energy": energy, "posterior": Heads(), "generator": generator}


def small(**options: Any) -> BiDVL:
    return BiDVL(**parts(), latent_dim=2, visible_shape=SHAPE, **options)


def data(rows: int = 30) -> Tensor:
    return torch.rand(rows, *SHAPE, generator=torch.Generator().manual_seed(0)) * 2 - 1


def trained(
    model: EBLVM,
    run: Path | None = None,
    *,
    evaluate: Callable[[EBLVM], dict[str, float]] | None = None,
    resume: bool = False,
    callbacks: Any = (),
    loggers: Any = (),
    **settings: Any,
) -> History:
    return model.fit(
        data(),
        callbacks=callbacks,
        loggers=loggers,
        run=run,
        resume=resume,
        evaluate=evaluate,
        **{**SHORT, **settings},
    )


def by_weights(model: EBLVM) -> dict[str, float]:
    """A number that depends on the weights alone."""
    return {"frechet": sum(p.detach().double().square().sum().item() for p in model.parameters())}


def assert_equal(a: nn.Module, b: nn.Module) -> None:
    mine, theirs = a.state_dict(), b.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def timeless(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in r.items() if name != "seconds"} for r in records]


# ---------------------------------------------------------------------- out of memory


def greedy(model: EBLVM, step: int) -> EBLVM:
    """A model that asks for a petabyte when it draws the noise of a step."""
    calls, draw = iter(range(1000)), model.draw

    def drawn(rows: Tensor, generator: torch.Generator) -> Any:
        if next(calls) == step:
            torch.empty(2**50, dtype=torch.uint8)
        return draw(rows, generator)

    model.draw = drawn  # type: ignore[method-assign]
    return model


# ---------------------------------------------------------------------- the command line


def step(number: int, seconds: float) -> Any:
    return types.SimpleNamespace(
        number=number,
        seconds=seconds,
        upper_loss=torch.tensor(-1.5),
        lower_loss=torch.tensor(2.0),
        logs={},
    )

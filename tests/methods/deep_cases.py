"""Small deep energies and images for them."""

from typing import Any

import torch
from torch import Tensor

from bilevel.methods.score_matching import ScoreMatching
from tests.devices import generator

TIGHT: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12}
SHAPE = (1, 8, 8)
SMALL: dict[str, Any] = {"latent_dim": 3, "width": 2, "langevin": (2, 4, 2)}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=generator(seed))


def images(n: int = 6) -> Tensor:
    return 2 * torch.rand(n, *SHAPE, generator=generator(1), dtype=torch.float64) - 1


def small(method: type[Any], *, gain: float = 1.0, **options: Any) -> Any:
    """A tiny model in float64 with large noise, so that its loss is no large number."""
    if method is ScoreMatching:
        options = {"latent_dim": None, **options}
    noise = {"sigma": 1.0, "sigma_range": (0.5, 2.0)}
    settings = {**SMALL, **noise, **options}
    made = method.for_images(SHAPE, **{n: x for n, x in settings.items() if x is not None}).double()
    with torch.no_grad():
        for p in made.parameters():
            p.mul_(gain)  # the initial energies are nearly flat
    return made

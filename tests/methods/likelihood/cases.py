"""Machines with weights of their own, for estimates of log Z."""

from typing import Any

import torch
from torch import Tensor

from bilevel.methods.models import DBM, RBM, BoltzmannMachine, GaussianDBM, GaussianRBM
from tests.devices import generator

KINDS = ["RBM", "GaussianRBM", "DBM", "GaussianDBM"]


def randomized(model: BoltzmannMachine, scale: float = 0.7, seed: int = 1) -> Any:
    """The model in float64 with normal parameters, scales included."""
    model = model.double()
    g = generator(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(scale * torch.randn(p.shape, generator=g, dtype=torch.float64))
    return model


def machine(kind: str, scale: float = 0.7, seed: int = 1) -> Any:
    makers = {
        "RBM": lambda: RBM(6, 5),
        "GaussianRBM": lambda: GaussianRBM(3, 5),
        "DBM": lambda: DBM(6, (5, 4)),
        "GaussianDBM": lambda: GaussianDBM(3, (5, 4)),
    }
    return randomized(makers[kind](), scale, seed)


def base_of(model: BoltzmannMachine) -> Tensor | None:
    if model.visible_range is None:
        return None
    return torch.randn(model.visible_dim, generator=generator(9), dtype=torch.float64)

"""Small Boltzmann machines whose every expectation is a finite sum, for the tests of their learners."""

from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from bilevel.methods.machines.enumeration import states
from bilevel.methods.models import DBM, RBM, BoltzmannMachine
from bilevel.methods.variational import Draws, VariationalJoint, VariationalPosterior

NV = 4


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def every(units: int) -> Tensor:
    """All states of binary units, one per row."""
    return states(units, 0, 2**units, torch.zeros((), dtype=torch.float64))


def pairs(model: BoltzmannMachine) -> tuple[Tensor, Tensor]:
    """All (v, h) of a binary machine."""
    v, h = every(model.visible_dim), every(sum(model.latent_dims))
    return v.repeat_interleave(len(h), dim=0), h.repeat(len(v), 1)


def machine(kind: Any = RBM, seed: int = 0) -> BoltzmannMachine:
    """A binary machine of moderate weights and biases, float64."""
    model: BoltzmannMachine = kind(NV, 3 if kind is RBM else (3, 2)).double()
    generator = rng(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return model


def moments(model: BoltzmannMachine) -> dict[str, Tensor]:
    """E_p[-dE/d parameter], by enumeration."""
    v, h = pairs(model)
    energy = model(v, h)
    probability = (-energy.detach()).softmax(0)
    grads = torch.autograd.grad(-(probability * energy).sum(), list(model.parameters()))
    return dict(zip((n for n, _ in model.named_parameters()), grads, strict=True))


class ExactPosterior(VariationalPosterior):
    """p(h|v) of a machine, every h with its probability: no draw, no parameter of its own."""

    def __init__(self, model: BoltzmannMachine) -> None:
        super().__init__()
        self.model = [model]  # hidden: its parameters belong to the upper level

    def noise(self, n: int, generator: torch.Generator, like: Tensor) -> Tensor:
        return like.new_zeros(n, 0)

    def draws(self, v: Tensor, noise: Tensor) -> Draws:
        h = every(sum(self.model[0].latent_dims))
        rows, latents = v.repeat_interleave(len(h), dim=0), h.repeat(len(v), 1)
        log_prob = self.log_prob(rows, latents)
        return Draws(rows, latents, log_prob, log_prob.exp() / len(v))

    @torch.no_grad()
    def log_prob(self, v: Tensor, h: Tensor) -> Tensor:
        return self.model[0].free_energy(v) - self.model[0](v, h)

    def distribution(self, v: Tensor) -> Distribution:
        raise NotImplementedError


class ExactJoint(VariationalJoint):
    """p(v, h) of a machine, every pair with its probability."""

    def __init__(self, model: BoltzmannMachine) -> None:
        super().__init__()
        self.model = [model]

    def noise(self, n: int, generator: torch.Generator, like: Tensor) -> Tensor:
        return like.new_zeros(n, 0)

    def draws(self, noise: Tensor) -> Draws:
        v, h = pairs(self.model[0])
        log_prob = self.log_prob(v, h)
        return Draws(v, h, log_prob, log_prob.exp())

    @torch.no_grad()
    def log_prob(self, v: Tensor, h: Tensor) -> Tensor:
        return -self.model[0](v, h) - self.model[0].log_partition()

    def sample(self, n: int, generator: torch.Generator | None) -> Tensor:
        raise NotImplementedError


__all__ = [
    "DBM",
    "RBM",
    "ExactJoint",
    "ExactPosterior",
    "every",
    "machine",
    "moments",
    "pairs",
    "rng",
]

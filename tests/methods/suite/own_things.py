"""Things of one's own, as a person who compares writes them into a module."""

import os
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bilevel import Alternating
from bilevel.methods import EBLVM, GaussianRBM
from bilevel.methods.machines import BoltzmannMachine
from bilevel.methods.models.machine import MachineModel


class Batch(NamedTuple):
    visible: Tensor
    noise: Tensor


class Denoiser(EBLVM):
    """Denoising score matching."""

    def __init__(self, model: BoltzmannMachine, sigma: float = 0.1) -> None:
        super().__init__()
        self.upper, self.lower = nn.ModuleDict({"model": model}), nn.ModuleDict()
        self.latent_model: MachineModel = MachineModel.of(model)
        self.sigma = sigma

    def draw(self, data: Tensor, generator: torch.Generator) -> Batch:
        return Batch(data, torch.randn(data.shape, generator=generator))

    def upper_loss(self, batch: Batch) -> Tensor:
        noisy = (batch.visible + self.sigma * batch.noise).requires_grad_()
        energy = self.latent_model.free_energy(noisy).sum()
        (slope,) = torch.autograd.grad(energy, noisy, create_graph=True)
        return (batch.noise - self.sigma * slope).square().sum(1).mean() / 2


class Dies(EBLVM):
    """Its process ends without a word."""

    def __new__(cls, model: BoltzmannMachine) -> Any:
        made = Denoiser(model)
        if torch.get_num_threads() == 1 and os.environ.get("DIES") == str(os.getppid()):
            os._exit(3)
        return made


class Fails(Exception):
    """An error of somebody's own."""


def failing(model: BoltzmannMachine) -> EBLVM:
    """A method with a mistake that shows during training."""
    learner = Denoiser(model)

    def upper_loss(batch: Batch) -> Tensor:
        raise Fails("the loss has a mistake")

    learner.upper_loss = upper_loss  # type: ignore[method-assign]
    return learner


def four(visible_dim: int, *, generator: torch.Generator) -> GaussianRBM:
    return GaussianRBM(visible_dim, 4, generator=generator)


def wider(visible_dim: int) -> GaussianRBM:
    return GaussianRBM(visible_dim + 1, 4)


def points(n: int = 80, seed: int = 0) -> Tensor:
    return torch.randn(n, 2, generator=torch.Generator().manual_seed(seed))


rows = points()
solver = Alternating()


class NoMethod:
    """A class of another kind."""

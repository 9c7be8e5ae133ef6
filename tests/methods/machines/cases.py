"""Small Boltzmann machines of every kind, and their sums by brute force."""

import itertools
from typing import Any

import torch
from torch import Tensor

from bilevel.methods.machines.enumeration import log_sum_over_states
from bilevel.methods.models import DBM, RBM, BoltzmannMachine, GaussianDBM, GaussianRBM
from tests.devices import generator

MACHINES = {
    "RBM": lambda: RBM(5, 3),
    "RBM with few visibles": lambda: RBM(3, 5),
    "DBM": lambda: DBM(4, (3, 2)),
    "DBM with a wide first layer": lambda: DBM(2, (5, 2)),
    "GaussianRBM": lambda: GaussianRBM(2, 4),
    "GaussianDBM": lambda: GaussianDBM(2, (3, 2)),
}
BINARY = [name for name in MACHINES if "Gaussian" not in name]
GAUSSIAN = [name for name in MACHINES if "Gaussian" in name]
EXACT: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12}


def normal(*shape: int, seed: int = 0, device: str = "cpu") -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=generator(seed)).to(device)


def trained(model: BoltzmannMachine, device: str = "cpu", size: float = 0.8) -> Any:
    """The model in float64, far from its symmetric start."""
    draws = generator(1)
    with torch.no_grad():
        for p in model.double().parameters():
            p.copy_(size * torch.randn(p.shape, dtype=p.dtype, generator=draws))
    return model.to(device)


def machine(name: str, device: str = "cpu") -> Any:
    return trained(MACHINES[name](), device)


def cube(units: int, device: str = "cpu") -> Tensor:
    """All of {0, 1}^units."""
    rows = list(itertools.product([0.0, 1.0], repeat=units))
    return torch.tensor(rows, dtype=torch.float64, device=device)


def pairs(v: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """Every v with every h, v slowest."""
    return v.repeat_interleave(len(h), 0), h.repeat(len(v), 1)


def by_definition(model: Any, v: Tensor, h: Tensor) -> Tensor:
    """E(v, h), term by term as the papers write it."""
    if model.visible_range is None:
        energy = (((v - model.visible_bias) / model.log_scale.exp()) ** 2).sum(1) / 2
    else:
        energy = -torch.einsum("ni,i->n", v, model.visible_bias)
    if len(model.latent_dims) == 1:
        energy = energy - torch.einsum("nj,j->n", h, model.latent_bias)
        return energy - torch.einsum("ni,ij,nj->n", v, model.weight, h)
    h1, h2 = h[:, : model.latent_dims[0]], h[:, model.latent_dims[0] :]
    energy = energy - torch.einsum("nj,j->n", h1, model.latent_bias1)
    energy = energy - torch.einsum("nk,k->n", h2, model.latent_bias2)
    energy = energy - torch.einsum("ni,ij,nj->n", v, model.weight1, h1)
    return energy - torch.einsum("nj,jk,nk->n", h1, model.weight2, h2)


def visibles(model: Any, n: int = 7, seed: int = 3) -> Tensor:
    v = normal(n, model.visible_dim, seed=seed, device=model.visible_bias.device.type)
    return v if model.visible_range is None else (v > 0).double()


def likelihood_in_chunks(model: Any, v: Tensor, at_once: int) -> Tensor:
    """Log p(v) from energies of all latents and from all first layers, so many states at a time."""

    def minus_energy(h: Tensor) -> Tensor:
        return -model(*pairs(v, h)).view(len(v), len(h))

    minus_free_energy = log_sum_over_states(
        minus_energy, sum(model.latent_dims), 1, v, chunk=at_once
    )
    first = model.log_unnormalized_first
    return minus_free_energy - log_sum_over_states(first, model.latent_dims[0], 1, v, chunk=at_once)


def line(dim: int, points: int, half_width: float, device: str = "cpu") -> tuple[Tensor, float]:
    """A grid on [-half_width, half_width]^dim and the volume of a cell."""
    axis = torch.linspace(-half_width, half_width, points, dtype=torch.float64, device=device)
    return torch.cartesian_prod(*[axis] * dim).view(-1, dim), float(axis[1] - axis[0]) ** dim

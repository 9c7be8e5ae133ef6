"""A Gaussian RBM far from its initial weights."""

import torch
from torch import Tensor

from bilevel.methods.models import GaussianRBM


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def machine(seed: int = 0) -> GaussianRBM:
    """A Gaussian RBM far from its initial weights, in float64."""
    model = GaussianRBM(2, 4).double()
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(0.7 * normal(*p.shape, seed=100 * seed + i))
    return model

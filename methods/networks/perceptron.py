"""Heads and perceptrons of the variational autoencoder: what turns a network's output into moments."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import final

import torch
from torch import Tensor, nn

from bilevel.methods.variational.bernoulli import xavier


@final
class Moments(nn.Module):
    """A network's output as mean and log-variance, side by side in it.

    Args:
        network: module v -> (n, 2 d).
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance, each (n, d)."""
        mean, log_variance = self.network(v).chunk(2, dim=1)
        return mean, log_variance


@final
class LearnedVariance(nn.Module):
    """A network for the mean, and a log-variance per output that is a parameter.

    Args:
        network: module h -> mean, shape (n, width).
        width: of the output.
    """

    def __init__(self, network: nn.Module, width: int) -> None:
        super().__init__()
        self.network = network
        self.log_variance = nn.Parameter(torch.zeros(width))

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Mean, shape (n, width), and log-variance, shape (width,)."""
        return self.network(h), self.log_variance


@final
class FixedVariance(nn.Module):
    """A network for the mean, and one variance that stays.

    Args:
        network: module h -> mean.
        variance: of every output.
    """

    def __init__(self, network: nn.Module, variance: float) -> None:
        super().__init__()
        self.network = network
        self.log_variance = math.log(variance)

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """The mean, and the log-variance as a scalar."""
        mean: Tensor = self.network(h)
        return mean, mean.new_full((), self.log_variance)


def perceptron(widths: Sequence[int], heads: int, generator: torch.Generator) -> nn.Sequential:
    """Linear layers with ReLU between them.

    Args:
        widths: from input to output.
        heads: outputs of the last width, side by side.
        generator: draws the weights (Xavier uniform; biases 0).
    """
    layers: list[nn.Module] = []
    for number, (below, above) in enumerate(pairwise(widths), start=2):
        if number < len(widths):
            layers += [xavier(below, above, generator), nn.ReLU()]
        else:
            layers.append(xavier(below, above, generator, heads=heads))
    return nn.Sequential(*layers)

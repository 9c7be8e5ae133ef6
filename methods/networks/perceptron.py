"""Perceptrons with the weights of a generator, and heads that turn a network's output into moments."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import cast, final

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from bilevel.methods.networks.units import Change, input_change, output_change


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

    def rewriting(self) -> Change | None:
        """How it is rewritten where the visibles change units; `None` if that is not known."""
        return input_change(self.network[0]) if isinstance(self.network, nn.Sequential) else None


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

    def rewriting(self) -> Change | None:
        """How it is rewritten where the visibles change units; `None` if that is not known."""
        layers = self.network
        of_mean = (
            output_change(layers[-1], moments=False) if isinstance(layers, nn.Sequential) else None
        )
        if of_mean is None:
            return None

        def change(shift: Tensor, scale: Tensor) -> None:
            of_mean(shift, scale)
            self.log_variance.add_(2 * scale.log())

        return change


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


def xavier(
    below: int, above: int, generator: torch.Generator, *, gain: float = 1.0, heads: int = 1
) -> nn.Linear:
    """A linear layer with Xavier uniform weights and zero biases, drawn on the generator's device.

    Args:
        below: width of the input.
        above: width of one head.
        generator: draws the weights.
        gain: factor on Xavier's range.
        heads: number of outputs of width `above`, side by side, each initialised as a layer of its own.
    """
    layer = cast(nn.Linear, skip_init(nn.Linear, below, heads * above, device=generator.device))
    for head in layer.weight.chunk(heads):
        nn.init.xavier_uniform_(head, gain, generator=generator)
    nn.init.zeros_(layer.bias)
    return layer

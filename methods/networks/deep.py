r"""The deep energies of BiSM and VaGES: a residual network, coupled with the latent or alone.

With f a residual network that ends in a linear layer, $f(v) \in R^d$, the joint energy of a visible and
a latent $h \in R^d$ (additive coupling) and the energy of the baseline without latents are

$$ E(v, h) = \sum_k \mathrm{ELU}(A\, [f(v) + h;\, h] + b)_k^2, \qquad
   E(v) = \sum_k \mathrm{ELU}(A\, g(v) + b)_k^2 \;\ge 0, $$

g being the network without the last layer. For images of side H, C channels of width, and k blocks per
stage (k = 2: "6", MNIST, C = 64; k = 3: "9", CIFAR-10 and CelebA, C = 128):

| part | layers | side | channels |
| --- | --- | --- | --- |
| first | 3x3 | H | C |
| stage s = 1, 2, 3 | 1 halving block, k - 1 plain ones | $H / 2^s$ | $2^s C$ |
| f | linear | | $8 C \lfloor H/8 \rfloor^2 \to d$ |
| head | linear, ELU, sum of squares | | $2d$ (or the features) $\to 4 C \lfloor H/8 \rfloor^2$ |

A block is ELU, 3x3 (channels kept, no bias), ELU, 3x3 (new channels), beside a 1x1 shortcut; the halving
one means over 2x2 pixels behind the second and before the shortcut. Nothing is normalised.

The images of the papers lie in [0, 1]; those of this library lie in [-1, 1], and the networks see
$(v + 1) / 2$. A noise level of the papers is therefore half as large as the same noise here.
"""

from abc import ABC, abstractmethod
from typing import cast, final

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, conv2d, elu, pad

from bilevel.methods.networks.build import build
from bilevel.refusals import whole

Shape = tuple[int, int, int]

VISIBLE_RANGE = (-1.0, 1.0)
"""Range of the images that these networks take."""

_POSTERIOR_WIDTH = 64  # channels of the first layer of q, whatever the width of the energy


class CoupledEnergy(nn.Module, ABC):
    """A joint energy that sees the visible through features alone.

    Many latents of one visible cost a single pass through the network of the features.
    """

    @abstractmethod
    def features(self, v: Tensor) -> Tensor:
        """What the energy knows of visibles, shape (n, d)."""

    @abstractmethod
    def coupled(self, features: Tensor, h: Tensor) -> Tensor:
        """Energies of features and latents, (..., d) and (..., d) -> (...), broadcast."""

    def forward(self, v: Tensor, h: Tensor) -> Tensor:
        """E(v, h), shape (n,)."""
        return self.coupled(self.features(v), h)


@final
class DeepCoupledEnergy(CoupledEnergy):
    r"""$E(v, h) = \sum_k \mathrm{ELU}(A [f(v) + h; h] + b)_k^2$.

    Args:
        shape: (channels, side, side) of the images, in [-1, 1].
        latent_dim: dimension d of the latent.
        width: channels C of the first layer: 64 for MNIST, 128 for CIFAR-10 and CelebA in the papers.
        blocks: residual blocks per stage: 2 for MNIST, 3 for the others.

    Raises:
        TypeError: if a number is not an integer.
        ValueError: if one is not positive, or the images are not square or smaller than 8 pixels.

    Example:
        >>> energy = DeepCoupledEnergy((1, 28, 28), latent_dim=5, width=4)
        >>> energy(torch.zeros(3, 1, 28, 28), torch.zeros(3, 5)).shape
        torch.Size([3])

    References:
        Bi-level Score Matching for Learning Energy-based Latent Variable Models (Bao, Li, Xu, Su,
        Zhu, Zhang, NeurIPS 2020), https://arxiv.org/abs/2010.07856, and the official code.
        Differs from the code in: images lie in [-1, 1], which is undone before the first layer.
    """

    def __init__(self, shape: Shape, latent_dim: int, width: int = 64, blocks: int = 2) -> None:
        super().__init__()
        self.trunk = trunk(shape, width, blocks)
        base = (check_shape(shape) // 8) ** 2
        self.project = nn.Linear(8 * width * base, whole("latent_dim", latent_dim))
        self.head = nn.Linear(2 * latent_dim, 4 * width * base)

    def features(self, v: Tensor) -> Tensor:
        features: Tensor = self.project(self.trunk(unit(v)).flatten(1))
        return features

    def coupled(self, features: Tensor, h: Tensor) -> Tensor:
        features, h = torch.broadcast_tensors(features, h)
        return elu(self.head(torch.cat([features + h, h], dim=-1))).square().sum(-1)


DeepEBLVM = DeepCoupledEnergy  # its earlier name


@final
class DeepEnergy(nn.Module):
    r"""$E(v) = \sum_k \mathrm{ELU}(A g(v) + b)_k^2$: the same network without a latent.

    Args:
        shape: (channels, side, side) of the images, in [-1, 1].
        width: channels of the first layer, as in `DeepCoupledEnergy`.
        blocks: residual blocks per stage, as in `DeepCoupledEnergy`.

    Raises:
        TypeError: if a number is not an integer.
        ValueError: if one is not positive, or the images are not square or smaller than 8 pixels.
    """

    def __init__(self, shape: Shape, width: int = 64, blocks: int = 2) -> None:
        super().__init__()
        self.trunk = trunk(shape, width, blocks)
        base = (check_shape(shape) // 8) ** 2
        self.head = nn.Linear(8 * width * base, 4 * width * base)

    def forward(self, v: Tensor) -> Tensor:
        """E(v), shape (n,)."""
        return elu(self.head(self.trunk(unit(v)).flatten(1))).square().sum(-1)


@final
class ConvMoments(nn.Module):
    """Mean and log-variance of q(h|v): three 3x3 convolutions of stride 2, leaky ReLU, linear heads.

    Args:
        shape: (channels, side, side) of the images, in [-1, 1].
        latent_dim: dimension d of the latent.
        width: channels of the first convolution; they double twice.
    """

    def __init__(self, shape: Shape, latent_dim: int, width: int = _POSTERIOR_WIDTH) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels, side = shape[0], check_shape(shape)
        for wide in (width, 2 * width, 4 * width):
            layers += [nn.Conv2d(channels, wide, 3, stride=2, padding=1), nn.LeakyReLU(0.2)]
            channels, side = wide, (side + 1) // 2
        self.trunk = nn.Sequential(*layers)
        self.mean = nn.Linear(channels * side**2, whole("latent_dim", latent_dim))
        self.log_std = nn.Linear(channels * side**2, latent_dim)

    def forward(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance, each (n, d); the network's own output is the log-deviation."""
        features = self.trunk(unit(v)).flatten(1)
        return self.mean(features), 2 * self.log_std(features)


def image_networks(
    shape: Shape, latent_dim: int, width: int, blocks: int, seed: int
) -> tuple[DeepCoupledEnergy, ConvMoments]:
    """An energy and the moments of a Gaussian q(h|v), untrained.

    Args:
        shape: (channels, side, side) of the images.
        latent_dim: dimension d of the latent.
        width: channels of the first layer of either; above 64, the papers', that of q stays 64.
        blocks: residual blocks per stage of the energy.
        seed: of the initial weights; torch's global generator is left as it was.

    Raises:
        TypeError: as `DeepCoupledEnergy`.
        ValueError: as `DeepCoupledEnergy`.
    """
    energy = build(lambda: DeepCoupledEnergy(shape, latent_dim, width, blocks), seed)
    narrow = min(width, _POSTERIOR_WIDTH)
    return energy, build(lambda: ConvMoments(shape, latent_dim, narrow), seed + 1)


def trunk(shape: Shape, width: int, blocks: int) -> nn.Sequential:
    """The residual network without its last linear layer.

    Args:
        shape: (channels, side, side) of the images.
        width: channels C of the first layer.
        blocks: residual blocks k in each of the three stages.

    Returns:
        A module (n, channels, side, side) -> (n, 8 C, side // 8, side // 8).

    Example:
        >>> [len(trunk((1, 32, 32), 4, k)) - 1 for k in (2, 3)]
        [6, 9]
    """
    check_shape(shape)
    whole("blocks", blocks)
    channels = whole("width", width)
    layers: list[nn.Module] = [nn.Conv2d(shape[0], channels, 3, padding=1)]
    for _ in range(3):
        layers.append(_Block(channels, 2 * channels, halve=True))
        channels *= 2
        layers += [_Block(channels, channels, halve=False) for _ in range(blocks - 1)]
    return nn.Sequential(*layers)


def check_shape(shape: Shape) -> int:
    """The side of square images.

    Raises:
        ValueError: if they are not square, or too small to be halved three times.
    """
    if len(shape) != 3 or shape[1] != shape[2] or min(shape) < 1 or shape[1] < 8:
        raise ValueError(
            "`shape` must be (channels, side, side) of square images of at least 8 pixels, got "
            f"{tuple(shape)}; crop, pad or resize the images"
        )
    return shape[1]


def unit(v: Tensor) -> Tensor:
    """Images in [-1, 1] as images in [0, 1]."""
    return (v + 1) / 2


@final
class _Block(nn.Module):
    """A residual block with ELUs; one that halves takes means over 2x2 pixels."""

    def __init__(self, channels: int, wide: int, halve: bool) -> None:
        super().__init__()
        self.halve = halve
        self.first = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        kind = _ConvMean2d if halve else nn.Conv2d
        self.second = kind(channels, wide, 3, padding=1)
        self.shortcut = nn.Conv2d(channels, wide, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(elu(self.first(elu(x))))
        beside = self.shortcut(avg_pool2d(x, 2) if self.halve else x)
        return cast(Tensor, y + beside)


@final
class _ConvMean2d(nn.Conv2d):
    """A 3x3 convolution and then the mean over 2x2 pixels, in 4/9 of the multiplications.

    Both are linear: together they are a convolution of stride 2 whose 4x4 kernel is the mean of the 3x3
    kernel at the four places.
    """

    def forward(self, x: Tensor) -> Tensor:
        kernel = avg_pool2d(pad(self.weight, (1, 1, 1, 1)), 2, stride=1)
        return conv2d(x, kernel, self.bias, stride=2, padding=1)

"""The convolutional networks of BiDVL by image shape: energy, posterior (encoder) and generator.

One rule makes the published 32, 64 and 128 pixel networks and their smaller relatives: halve the
image while its side is even and larger than 4; channels double with every halving; what is left (4x4,
7x7 for 28 pixels) is covered by one valid convolution. The tables are in Kan et al. (2022), official
code; the paper itself prints none.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.nn.utils.parametrizations import spectral_norm

_LARGEST_BASE = 8


class Scale(NamedTuple):
    """How an image side is halved: `halvings` times, down to `base` pixels."""

    halvings: int
    base: int


def scale_of(shape: tuple[int, int, int]) -> Scale:
    """The halvings of a square image of shape (channels, side, side).

    Raises:
        ValueError: if the shape is not that of a square image, or its side cannot be halved down to
            at most 8 pixels.

    Example:
        >>> scale_of((3, 32, 32)), scale_of((1, 28, 28)), scale_of((1, 8, 8))
        (Scale(halvings=3, base=4), Scale(halvings=2, base=7), Scale(halvings=1, base=4))
    """
    if len(shape) != 3 or shape[1] != shape[2] or min(shape) < 1:
        raise ValueError(
            f"`shape` must be (channels, side, side) of square images, got {tuple(shape)}; crop or "
            "pad the images to a square"
        )
    side, halvings = shape[1], 0
    while side % 2 == 0 and side > 4:
        side, halvings = side // 2, halvings + 1
    if halvings == 0 or side > _LARGEST_BASE:
        raise ValueError(
            f"images of side {shape[1]} cannot be halved down to 4-{_LARGEST_BASE} pixels; pad or "
            "resize them to 8, 16, 28, 32, 64 or 128 pixels"
        )
    return Scale(halvings, side)


def _initialise(layer: nn.Module) -> None:
    """N(0, 0.02) convolution weights, torch's default biases (the official initialisation)."""
    if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
        nn.init.normal_(layer.weight, 0.0, 0.02)


def _normed(layer: nn.Module) -> nn.Module:
    _initialise(layer)  # before wrapping: a later write to `.weight` would be lost
    return spectral_norm(layer)


class _WholeConv2d(nn.Conv2d):
    """A convolution whose kernel covers its whole input: one matrix product, several times faster."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x.flatten(1), self.weight.flatten(1), self.bias)[:, :, None, None]


class _WholeConvTranspose2d(nn.ConvTranspose2d):
    """A transposed convolution of a single pixel: one matrix product."""

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        y = x.flatten(1) @ self.weight.flatten(1)
        return y.view(len(x), self.out_channels, *self.kernel_size)


class Energy(nn.Module):
    """E(v): spectrally normalised convolutions without batch norm, softplus head: (n,) >= 0.

    Kept as published: no activation after the valid convolution. Spectral norm bounds the reshaped
    weight matrix, not the convolution operator.

    Args:
        shape: (channels, side, side) of the images.
        width: channels of the first layer (64 in the paper's networks).
        head: last non-linearity; softplus in the official code (the paper does not mention it),
            `nn.Identity()` for a linear head.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        width: int = 64,
        head: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        trunk = _energy_trunk(shape, width)
        wide = width * 2 ** scale_of(shape).halvings
        layers = [*trunk, _normed(_WholeConv2d(wide, wide, 1)), nn.LeakyReLU(0.1)]
        self.net = nn.Sequential(*layers, _normed(_WholeConv2d(wide, 1, 1)))
        self.head = head if head is not None else nn.Softplus()

    def forward(self, v: Tensor) -> Tensor:
        """Energies of images, shape (n,)."""
        energies: Tensor = self.head(self.net(v).flatten())
        return energies


class JointEnergy(nn.Module):
    """E(v, h) of an undecoupled model: the trunk of `Energy` beside dense layers of the latent: (n,).

    The latent passes through two layers of each width of the image's trunk, neither with an
    activation at its end; what both give is joined by one more layer. All layers are spectrally
    normalised. The official code defines the 32 pixel network and trains nothing with it; its head is
    taken to be that of `Energy`.

    Args:
        shape: (channels, side, side) of the images.
        latent_dim: dimension d of the latent.
        width: channels of the first layer (64 in the official code).
        head: last non-linearity, softplus by default.

    Example:
        >>> energy = JointEnergy((3, 32, 32), latent_dim=100)
        >>> parameter_count(energy)
        8701633
        >>> energy(torch.zeros(2, 3, 32, 32), torch.zeros(2, 100)).shape
        torch.Size([2])
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        latent_dim: int,
        width: int = 64,
        head: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.visible = nn.Sequential(*_energy_trunk(shape, width))
        layers: list[nn.Module] = []
        inputs = latent_dim
        for k in range(scale_of(shape).halvings + 1):
            wide = width * 2**k
            layers += [_normed(nn.Linear(inputs, wide)), nn.LeakyReLU(0.1)]
            layers += [_normed(nn.Linear(wide, wide)), nn.LeakyReLU(0.1)]
            inputs = wide
        self.latent = nn.Sequential(*layers[:-1])
        join = _normed(nn.Linear(2 * inputs, 2 * inputs))
        self.join = nn.Sequential(join, nn.LeakyReLU(0.1), _normed(nn.Linear(2 * inputs, 1)))
        self.head = head if head is not None else nn.Softplus()

    def forward(self, v: Tensor, h: Tensor) -> Tensor:
        """Energies of pairs of images and latents of shape (n, d): shape (n,)."""
        both = torch.cat([self.visible(v).flatten(1), self.latent(h)], dim=1)
        energies: Tensor = self.head(self.join(both).flatten())
        return energies


def _energy_trunk(shape: tuple[int, int, int], width: int) -> list[nn.Module]:
    """Spectrally normalised layers from an image to width * 2**halvings features at one pixel."""
    halvings, base = scale_of(shape)
    layers: list[nn.Module] = []
    channels = shape[0]
    for k in range(halvings):
        wide = width * 2**k
        layers += [_normed(nn.Conv2d(channels, wide, 3, 1, 1)), nn.LeakyReLU(0.1)]
        layers += [_normed(nn.Conv2d(wide, wide, 4, 2, 1)), nn.LeakyReLU(0.1)]
        channels = wide
    wide = width * 2**halvings
    layers += [_normed(nn.Conv2d(channels, wide, 3, 1, 1)), nn.LeakyReLU(0.1)]
    return [*layers, _normed(_WholeConv2d(wide, wide, base))]


class Posterior(nn.Module):
    """q1(h|v): convolutions with batch norm, two heads: mean and log-variance, each (n, d).

    Args:
        shape: (channels, side, side) of the images.
        latent_dim: dimension d of the latent.
        width: channels of the first layer (48 in the paper's networks).
    """

    def __init__(self, shape: tuple[int, int, int], latent_dim: int, width: int = 48) -> None:
        super().__init__()
        halvings, base = scale_of(shape)
        layers: list[nn.Module] = [nn.Conv2d(shape[0], width, 3, 1, 1, bias=False)]
        layers += [nn.BatchNorm2d(width), nn.LeakyReLU(0.2)]
        for k in range(halvings):
            layers += [nn.Conv2d(width * 2**k, width * 2 ** (k + 1), 4, 2, 1, bias=False)]
            layers += [nn.BatchNorm2d(width * 2 ** (k + 1)), nn.LeakyReLU(0.2)]
        self.trunk = nn.Sequential(*layers)
        self.mean = _WholeConv2d(width * 2**halvings, latent_dim, base)
        self.log_variance = _WholeConv2d(width * 2**halvings, latent_dim, base)
        self.apply(_initialise)

    def forward(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the latent given images."""
        features = self.trunk(v)
        return self.mean(features).flatten(1), self.log_variance(features).flatten(1)


class Generator(nn.Module):
    """G(h): transposed convolutions with batch norm and a tanh, images in [-1, 1].

    Args:
        shape: (channels, side, side) of the images.
        latent_dim: dimension d of the latent.
        width: channels of the widest-resolution layer, halved (48 in the paper's networks).
    """

    def __init__(self, shape: tuple[int, int, int], latent_dim: int, width: int = 48) -> None:
        super().__init__()
        halvings, base = scale_of(shape)
        channels = width * 2**halvings
        layers: list[nn.Module] = [
            _WholeConvTranspose2d(latent_dim, channels, base, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
        ]
        for k in range(halvings):
            wide = width * 2 ** (halvings - k)  # the first doubling of the side keeps the channels
            layers += [nn.ConvTranspose2d(channels, wide, 4, 2, 1, bias=False)]
            layers += [nn.BatchNorm2d(wide), nn.ReLU(inplace=True)]
            channels = wide
        layers += [nn.ConvTranspose2d(channels, shape[0], 3, 1, 1), nn.Tanh()]
        self.net = nn.Sequential(*layers)
        self.apply(_initialise)

    def forward(self, h: Tensor) -> Tensor:
        """Images of latents of shape (n, d)."""
        images: Tensor = self.net(h[:, :, None, None])
        return images


def parameter_count(module: nn.Module) -> int:
    """Number of parameters, tied ones counted once.

    Example:
        >>> rgb = (3, 32, 32)
        >>> parameter_count(Posterior(rgb, 100)), parameter_count(Generator(rgb, 100))
        (2780024, 4452963)
    """
    return sum(p.numel() for p in module.parameters())

"""The convolutional networks of BiDVL by image shape: energy, posterior (encoder) and generator.

One rule makes the published 32, 64 and 128 pixel networks and their smaller relatives: halve the
image while its side is even and larger than 4; channels double with every halving; what is left (4x4,
7x7 for 28 pixels) is covered by one valid convolution. The tables are in Kan et al. (2022), official
code; the paper itself prints none.
"""

from collections.abc import Callable
from typing import NamedTuple, final

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from bilevel.methods.data.sides import scale_of
from bilevel.methods.networks.spectral_norm import full_precision, normed, rows, widened
from bilevel.refusals import positive, whole


@final
class Networks(NamedTuple):
    """What a model of images is made of."""

    energy: nn.Module
    posterior: nn.Module
    generator: nn.Module


def _initialise(layer: nn.Module) -> None:
    """N(0, 0.02) weights, torch's default biases (the official initialisation)."""
    if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
        nn.init.normal_(layer.weight, 0.0, 0.02)


def _normed(layer: nn.Module) -> nn.Module:
    _initialise(layer)
    return normed(layer)


@final
class _WholeConv2d(nn.Conv2d):
    """A convolution whose kernel covers its whole input: one matrix product, several times faster."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(rows(x), rows(self.weight), self.bias)[:, :, None, None]


@final
class _WholeConvTranspose2d(nn.ConvTranspose2d):
    """A transposed convolution of a single pixel: one matrix product."""

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        height, width = self.kernel_size
        y = x.flatten(1) @ rows(self.weight)
        return y.view(len(x), height, width, self.out_channels).permute(0, 3, 1, 2)


@final
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
        self.trunk = _energy_trunk(shape, width)
        wide = width * 2 ** scale_of(shape).halvings
        dense = _normed(nn.Linear(wide, wide))
        self.top = nn.Sequential(dense, nn.LeakyReLU(0.1), _normed(nn.Linear(wide, 1)))
        self.head = head if head is not None else nn.Softplus()

    def forward(self, v: Tensor) -> Tensor:
        """Energies of images, shape (n,)."""
        features = self.trunk(v).flatten(1)
        with full_precision(v):
            energies: Tensor = self.head(self.top(widened(features)).flatten())
        return energies


@final
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
        self.visible = _energy_trunk(shape, width)
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
        features = self.visible(v).flatten(1)
        with full_precision(v):
            both = torch.cat([widened(features), self.latent(widened(h))], dim=1)
            energies: Tensor = self.head(self.join(both).flatten())
        return energies


def _energy_trunk(shape: tuple[int, int, int], width: int) -> nn.Sequential:
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
    return nn.Sequential(*layers, _normed(_WholeConv2d(wide, wide, base)))


@final
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
        with full_precision(v):
            features = widened(features)
            return self.mean(features).flatten(1), self.log_variance(features).flatten(1)


@final
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
        self.net = nn.Sequential(*layers, nn.ConvTranspose2d(channels, shape[0], 3, 1, 1))
        self.apply(_initialise)

    def forward(self, h: Tensor) -> Tensor:
        """Images of latents of shape (n, d)."""
        return widened(self.net(h[:, :, None, None])).tanh()


def channels_of(width: float, latent_dim: int = 1, share: float = 1.0) -> int:
    """Channels of a first layer: a share of `width`, at least one.

    Raises:
        TypeError: if `latent_dim` is no whole number, or `width` no number.
        ValueError: if one of them is not positive.
    """
    positive("width", width)
    whole("latent_dim", latent_dim)
    return max(1, round(width * share))


def conv_networks(
    shape: tuple[int, int, int], latent_dim: int = 100, width: float = 1.0
) -> Networks:
    """The three networks of a size, their channels times `width`; 1 gives the published ones."""
    wide, narrow = (channels_of(width, latent_dim, share) for share in (64, 48))
    energy, posterior = Energy(shape, wide), Posterior(shape, latent_dim, narrow)
    return Networks(energy, posterior, Generator(shape, latent_dim, narrow))


def parameter_count(module: nn.Module) -> int:
    """Number of parameters, tied ones counted once.

    Example:
        >>> rgb = (3, 32, 32)
        >>> parameter_count(Posterior(rgb, 100)), parameter_count(Generator(rgb, 100))
        (2780024, 4452963)
    """
    return sum(p.numel() for p in module.parameters())

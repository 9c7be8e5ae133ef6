r"""The residual networks of BiDVL by image shape, in the style of SNGAN: energy, posterior, generator.

A block adds to a shortcut $s$ what two 3x3 convolutions make of its input:

$$ \text{down:}\quad x' = \text{relu}(x), \quad
   y = s(x') + c_2(\text{relu}(c_1(x'))), \text{ averaged over } 2 \times 2 \text{ pixels}; $$

$$ \text{up:}\quad y = s(x) + c_2(\text{relu}(b_2(c_1(\text{relu}(b_1(x)))))), \text{ with } x \text{ and
   the input of } c_1 \text{ doubled by bilinear interpolation}, $$

$b$ a batch norm, $s$ a 1x1 convolution, or nothing where neither channels nor side change. The
blocks are a table per size, `TABLES`; 32 and 128 pixels and the energy of 64 are published, in the
official code of Kan et al. (2022), the others are ours in the same manner.

Kept as published, because numbers were reported with it:

- the leading relu of a down block works in place, so its shortcut sees relu(x), not x; the first block
  of a network has no leading relu;
- features are summed, not averaged, over the pixels;
- the log-variance is -softplus of what the head gives: no posterior is wider than the prior;
- the posterior's heads have no bias at 128 pixels, the energy's always has one;
- Xavier's uniform initial weights, gain sqrt(2) for the 3x3 convolutions of blocks, 1 elsewhere.

Averaging and interpolation commute with a 1x1 convolution: the shortcut's is taken at the smaller side,
where it costs a quarter.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple, final

from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate, softplus

from bilevel.methods.data.sides import scale_of
from bilevel.methods.networks.convolutional import Networks, channels_of
from bilevel.methods.networks.spectral_norm import full_precision, normed, widened


@final
class Blocks(NamedTuple):
    """The blocks of one size, by their channels.

    Attributes:
        halving: blocks of energy and posterior that halve the side.
        keeping: blocks that follow and keep it.
        doubling: the generator's features at the smallest side, then its blocks, each of which
            doubles the side.
        head_bias: whether the posterior's heads have a bias.
    """

    halving: tuple[int, ...]
    keeping: tuple[int, ...]
    doubling: tuple[int, ...]
    head_bias: bool


TABLES = {
    1: Blocks((128,), (128, 128), (256, 256), True),
    2: Blocks((128, 128), (128, 128), (256, 256, 256), True),
    3: Blocks((128, 128), (128, 128), (256, 256, 256, 256), True),
    4: Blocks((64, 128, 256, 512, 1024), (), (1024, 512, 256, 128, 64), False),
    5: Blocks((64, 128, 256, 512, 1024), (1024,), (1024, 1024, 512, 256, 128, 64), False),
}
"""By how often the side can be halved: 8; 16 and 28; 32; 64; 128 pixels."""


def table_of(shape: tuple[int, int, int], width: float = 1.0) -> Blocks:
    """The table of a square image, its channels times `width`.

    Raises:
        ValueError: if there is none, or `width` is not positive.

    Example:
        >>> table_of((3, 32, 32), width=0.5)
        Blocks(halving=(64, 64), keeping=(64, 64), doubling=(128, 128, 128, 128), head_bias=True)
    """
    halvings, _ = scale_of(shape)
    if halvings not in TABLES:
        raise ValueError(
            f"there are no residual networks for images of side {shape[1]}, which halves {halvings} "
            f"times; resize them to 8, 16, 28, 32, 64 or 128 pixels"
        )
    if width <= 0:
        raise ValueError(f"`width` must be positive, got {width}")
    *channels, head_bias = TABLES[halvings]
    halving, keeping, doubling = (
        tuple(max(1, round(width * n)) for n in part) for part in channels
    )
    return Blocks(halving, keeping, doubling, head_bias)


@final
class ResidualEnergy(nn.Module):
    """E(v): residual blocks under spectral norm, summed features, a linear head: (n,).

    Args:
        shape: (channels, side, side) of the images.
        width: factor of all channels; 1 gives the published networks.
        head: last non-linearity; none in the official code, which has a softplus commented out.

    Example:
        >>> energy = ResidualEnergy((3, 32, 32))
        >>> sum(p.numel() for p in energy.parameters())
        1053825
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        width: float = 1.0,
        head: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.trunk = _Trunk(shape, width)
        self.top = _linear(self.trunk.features, 1)
        self.head = head if head is not None else nn.Identity()

    def forward(self, v: Tensor) -> Tensor:
        """Energies of images, shape (n,)."""
        features = self.trunk(v)
        with full_precision(v):
            energies: Tensor = self.head(self.top(features).flatten())
        return energies


@final
class ResidualPosterior(nn.Module):
    """q1(h|v): the trunk of `ResidualEnergy` with two heads: mean and log-variance, each (n, d).

    Spectral norm and no batch norm, unlike `networks.Posterior`.

    Args:
        shape: (channels, side, side) of the images.
        latent_dim: dimension d of the latent (128 in the published networks).
        width: factor of all channels; 1 gives the published networks.

    Example:
        >>> posterior = ResidualPosterior((3, 32, 32))
        >>> sum(p.numel() for p in posterior.parameters())
        1086720
    """

    def __init__(
        self, shape: tuple[int, int, int], latent_dim: int = 128, width: float = 1.0
    ) -> None:
        super().__init__()
        self.trunk = _Trunk(shape, width)
        bias = table_of(shape).head_bias
        self.mean = _linear(self.trunk.features, latent_dim, bias)
        self.log_variance = _linear(self.trunk.features, latent_dim, bias)

    def forward(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the latent given images; the variance is at most 1."""
        features = self.trunk(v)
        with full_precision(v):
            return self.mean(features), -softplus(self.log_variance(features))


@final
class ResidualGenerator(nn.Module):
    """G(h): residual blocks with batch norm, no spectral norm, and a tanh: images in [-1, 1].

    On CUDA the derivative of the interpolation adds in no fixed order, unless
    `torch.use_deterministic_algorithms(True)` asks for one.

    Args:
        shape: (channels, side, side) of the images.
        latent_dim: dimension d of the latent (128 in the published networks).
        width: factor of all channels; 1 gives the published networks.

    Example:
        >>> generator = ResidualGenerator((3, 32, 32))
        >>> sum(p.numel() for p in generator.parameters())
        4276739
    """

    def __init__(
        self, shape: tuple[int, int, int], latent_dim: int = 128, width: float = 1.0
    ) -> None:
        super().__init__()
        doubling = table_of(shape, width).doubling
        self.side = shape[1] // 2 ** (len(doubling) - 1)
        self.first = nn.Linear(latent_dim, self.side**2 * doubling[0])
        nn.init.xavier_uniform_(self.first.weight)
        self.blocks = nn.Sequential(*(_UpBlock(*pair) for pair in pairwise(doubling)))
        self.last = nn.Sequential(
            nn.BatchNorm2d(doubling[-1]), nn.ReLU(), _conv(doubling[-1], shape[0], 3, 1.0)
        )

    def forward(self, h: Tensor) -> Tensor:
        """Images of latents of shape (n, d)."""
        # the features are the last dimension of the product: channels-last memory for nothing
        pixels = self.first(h).view(len(h), self.side, self.side, -1).permute(0, 3, 1, 2)
        return widened(self.last(self.blocks(pixels))).tanh()


@final
class _Trunk(nn.Module):
    """Features of images, summed over the pixels in at least float32: shape (n, features)."""

    def __init__(self, shape: tuple[int, int, int], width: float) -> None:
        super().__init__()
        halving, keeping, *_ = table_of(shape, width)
        blocks: list[nn.Module] = []
        inputs = shape[0]
        for k, outputs in enumerate(halving + keeping):
            blocks.append(_DownBlock(inputs, outputs, halves=k < len(halving), first=k == 0))
            inputs = outputs
        self.features = inputs
        self.blocks = nn.Sequential(*blocks, nn.ReLU())

    def forward(self, v: Tensor) -> Tensor:
        return widened(self.blocks(v)).sum(dim=(2, 3))


@final
class _DownBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, *, halves: bool, first: bool) -> None:
        super().__init__()
        hidden = outputs if first else inputs
        self.halves = halves
        self.leading = nn.Identity() if first else nn.ReLU()
        self.residual = nn.Sequential(
            normed(_conv(inputs, hidden, 3, 2**0.5)),
            nn.ReLU(),
            normed(_conv(hidden, outputs, 3, 2**0.5)),
        )
        same = inputs == outputs and not halves
        self.shortcut = nn.Identity() if same else normed(_conv(inputs, outputs, 1, 1.0))

    def forward(self, x: Tensor) -> Tensor:
        x = self.leading(x)  # for both branches, see the top of this file
        y = self.residual(x)
        if self.halves:
            x, y = avg_pool2d(x, 2), avg_pool2d(y, 2)
        out: Tensor = y + self.shortcut(x)
        return out


@final
class _UpBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.before = nn.Sequential(nn.BatchNorm2d(inputs), nn.ReLU())
        self.residual = nn.Sequential(
            _conv(inputs, outputs, 3, 2**0.5),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            _conv(outputs, outputs, 3, 2**0.5),
        )
        self.shortcut = _conv(inputs, outputs, 1, 1.0)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.residual(_doubled(self.before(x)))
        return y + _doubled(self.shortcut(x))


def _doubled(x: Tensor) -> Tensor:
    return interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)


def _conv(inputs: int, outputs: int, kernel: int, gain: float) -> nn.Conv2d:
    layer = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)
    nn.init.xavier_uniform_(layer.weight, gain)
    return layer


def _linear(inputs: int, outputs: int, bias: bool = True) -> nn.Module:
    layer = nn.Linear(inputs, outputs, bias)
    nn.init.xavier_uniform_(layer.weight)
    return normed(layer)


def residual_networks(
    shape: tuple[int, int, int], latent_dim: int = 128, width: float = 1.0
) -> Networks:
    """The three networks of a size; `width` 1 gives the published ones."""
    channels_of(width, latent_dim)
    energy, posterior = ResidualEnergy(shape, width), ResidualPosterior(shape, latent_dim, width)
    return Networks(energy, posterior, ResidualGenerator(shape, latent_dim, width))

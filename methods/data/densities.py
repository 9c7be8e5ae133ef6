r"""Densities on the plane whose entropy is known: the judges of likelihoods in two dimensions.

The expected log-likelihood of a model is at most that of the truth, the negative entropy,

$$\mathbb{E}_{p}[\log q(v)] \le \mathbb{E}_{p}[\log p(v)] = -H(p),$$

so every density here is one of two kinds for which $H$ is at hand. Uniform on $k$ squares of side $a$:
$p(v) = 1 / (k a^2)$ and $H = \log(k a^2)$. Or an equal mixture of $k$ round Gaussians,

$$p(v) = \frac{1}{2 \pi s^2 k} \sum_{j=1}^{k} e^{-\lVert v - m_j \rVert^2 / (2 s^2)},$$

which on a grid factors into two matrices, one per coordinate: $H$ is one product of them and a sum. A
curve blurred by a Gaussian (circle, moons, Swiss roll) is such a mixture too, with means along
the curve less than $s / 2$ apart: the blurred continuous curve differs from it in the last digits only,
and the mixture is what is sampled, so the density stays exact.

All of them fill the unit square, as the checkerboard of BiSM does: a noise level means the same
everywhere.
"""

import difflib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import final

import torch
from torch import Tensor

from bilevel.refusals import a_generator, shown, whole

_BLOB_SCALE = 0.05
_CURVE_SCALE = 0.03
_CHUNK = 1 << 22  # distances held at a time: 32 MiB of float64
_MARGIN = 12  # standard deviations from the means to the edge of the quadrature
_STEPS = 6  # points of the quadrature per standard deviation


class Density2D(ABC):
    """A density on the plane that can be drawn from, evaluated and integrated.

    Attributes:
        name: what `density` finds it by.
    """

    name: str

    @abstractmethod
    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Independent points, float32 on the generator's device, shape (n, 2)."""

    @abstractmethod
    def log_prob(self, v: Tensor) -> Tensor:
        """Log p(v) in nats, shape (n,) for `v` of shape (n, 2); minus infinity off the support."""

    @property
    @abstractmethod
    def entropy(self) -> float:
        """H(p) in nats; its negative is the highest expected log-likelihood of any model."""


@final
@dataclass(frozen=True, eq=False)
class UniformSquares(Density2D):
    """Uniform on equal squares that do not overlap; the entropy is the logarithm of their area.

    Args:
        name: short name.
        corners: lower left corners, shape (k, 2).
        side: of each square.

    Raises:
        ValueError: if `corners` are no points of the plane, squares overlap or `side` is not positive.
    """

    name: str
    corners: Tensor = field(repr=False)
    side: float

    def __post_init__(self) -> None:
        _check_points(self.corners, "corners")
        _check_positive(self.side, "side")
        gaps = (self.corners[:, None] - self.corners).abs().amax(dim=2).fill_diagonal_(math.inf)
        if (gaps < self.side * (1 - 1e-9)).any():
            raise ValueError(f"squares of side {self.side:g} overlap; move their `corners` apart")

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        corners = _drawn(self.corners, n, generator)
        return corners + self.side * torch.rand(n, 2, generator=generator, device=corners.device)

    def log_prob(self, v: Tensor) -> Tensor:
        _check_points(v, "v")
        offset = v[:, None] - self.corners.to(v)
        # Closed squares: a draw may be rounded onto the upper edge.
        inside = ((offset >= 0) & (offset <= self.side)).all(dim=2).any(dim=1)
        return torch.full_like(v[:, 0], -self.entropy).masked_fill(~inside, -math.inf)

    @property
    def entropy(self) -> float:
        return math.log(len(self.corners) * self.side**2)


@final
@dataclass(frozen=True, eq=False)
class GaussianMixture2D(Density2D):
    r"""Equal mixture of round Gaussians $\mathcal{N}(m_j, s^2 I)$.

    The entropy is the trapezoidal rule on a grid of `s / 6` out to `12 s` from the means; for the
    densities of this module halving the step moves it by less than 1e-11.

    Args:
        name: short name.
        means: shape (k, 2).
        scale: the standard deviation s.

    Raises:
        ValueError: if `means` are no points of the plane or `scale` is not positive.
    """

    name: str
    means: Tensor = field(repr=False)
    scale: float

    def __post_init__(self) -> None:
        _check_points(self.means, "means")
        _check_positive(self.scale, "scale")

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        means = _drawn(self.means, n, generator)
        return means + self.scale * torch.randn(n, 2, generator=generator, device=means.device)

    def log_prob(self, v: Tensor) -> Tensor:
        _check_points(v, "v")
        means = self.means.to(v)
        parts = v.split(max(1, _CHUNK // len(means)))
        exponents = (
            -((part[:, None] - means) ** 2).sum(dim=2) / (2 * self.scale**2) for part in parts
        )
        log_sum = torch.cat([exponent.logsumexp(dim=1) for exponent in exponents])
        return log_sum - math.log(2 * math.pi * self.scale**2 * len(means))

    @cached_property
    def entropy(self) -> float:
        """H(p) in nats, by quadrature."""
        return self._integral(torch.special.entr, _STEPS)

    def _integral(self, of: Callable[[Tensor], Tensor], steps: int) -> float:
        """Integral of a function of p over the plane, on a grid of `steps` points per s."""
        step = self.scale / steps
        factors = []
        for coordinate in self.means.T:
            low, high = coordinate.min(), coordinate.max() + 2 * _MARGIN * self.scale
            count = int((high - low) / step) + 1
            points = low - _MARGIN * self.scale + step * torch.arange(count).to(coordinate)
            distances = (points[:, None] - coordinate) / self.scale
            factors.append(torch.exp(-(distances**2) / 2) / (math.sqrt(2 * math.pi) * self.scale))
        horizontal, vertical = factors
        values = horizontal @ vertical.T / len(self.means)
        return float(of(values).sum()) * step**2


def checkerboard(cells: int = 2) -> UniformSquares:
    """Every other cell of a board on the unit square: half its area, so the entropy is -log 2.

    With 2 x 2 cells it is BiSM's: uniform on [0, .5]^2 and [.5, 1]^2.

    Args:
        cells: along a side, even.

    Raises:
        ValueError: if `cells` is odd or not positive.

    References:
        Bi-level Score Matching for Learning Energy-based Latent Variable Models (Bao, Li, Xu, Su,
        Zhu, Zhang, 2020), https://arxiv.org/abs/2010.07856.
    """
    if cells < 2 or cells % 2:
        raise ValueError(f"`cells` must be even and positive, got {cells}; use 2 for BiSM's board")
    corners = [
        (i / cells, j / cells) for i in range(cells) for j in range(cells) if not (i + j) % 2
    ]
    name = "checkerboard" if cells == 2 else f"checkerboard{len(corners)}"
    return UniformSquares(name, torch.tensor(corners, dtype=torch.float64), 1 / cells)


def blobs(k: int) -> GaussianMixture2D:
    """K Gaussians of standard deviation .05, evenly spread on a circle of radius .4.

    Two to four blobs have names in BiSM's code, with places of their own there. A Gaussian RBM can
    represent those of `blobs(4)` exactly: two latents, one per side of the square they span.

    Args:
        k: number of Gaussians, from 2.

    Raises:
        ValueError: if there are fewer than two.
    """
    if k < 2:
        raise ValueError(f"`blobs` takes at least 2 of them, got {k}")
    angles = 2 * math.pi * (torch.arange(k, dtype=torch.float64) + 0.5) / k
    return GaussianMixture2D(f"blobs{k}", _arc(angles, (0.5, 0.5), 0.4), _BLOB_SCALE)


def circle() -> GaussianMixture2D:
    r"""A circle of radius R = .4, blurred by a Gaussian of standard deviation s = .03.

    At distance r from its centre
    $p = \frac{1}{2 \pi s^2} e^{-(r^2 + R^2) / (2 s^2)} I_0(r R / s^2)$.
    """
    angles = 2 * math.pi * _midpoints(256)
    return GaussianMixture2D("circle", _arc(angles, (0.5, 0.5), 0.4), _CURVE_SCALE)


def rings() -> GaussianMixture2D:
    """Two concentric circles of radii .2 and .4 and of equal mass, blurred with s = .03."""
    angles = 2 * math.pi * _midpoints(256)
    means = torch.cat([_arc(angles, (0.5, 0.5), radius) for radius in (0.2, 0.4)])
    return GaussianMixture2D("rings", means, _CURVE_SCALE)


def moons() -> GaussianMixture2D:
    """Two interleaved half circles of radius 1/3, uniform along their length, blurred with s = .03.

    They have the places of scikit-learn's `make_moons`, shrunk to the unit square.
    """
    angles = math.pi * _midpoints(128)
    means = torch.cat([_arc(angles, (1 / 3, 5 / 12), 1 / 3), _arc(-angles, (2 / 3, 7 / 12), 1 / 3)])
    return GaussianMixture2D("moons", means, _CURVE_SCALE)


def swissroll() -> GaussianMixture2D:
    """A spiral of one and a half turns, radius .15 to .45, uniform in its angle, blurred with s = .03.

    As in scikit-learn's `make_swiss_roll` the angle runs from 1.5 pi to 4.5 pi and the radius is
    proportional to it.
    """
    angles = math.pi * (1.5 + 3 * _midpoints(512))
    means = _arc(angles, (0.5, 0.5), 0.1 * angles / math.pi)
    return GaussianMixture2D("swissroll", means, _CURVE_SCALE)


_MAKERS: dict[str, Callable[[], Density2D]] = {
    "checkerboard": checkerboard,
    "checkerboard8": lambda: checkerboard(4),
    "blobs2": lambda: blobs(2),
    "blobs3": lambda: blobs(3),
    "blobs4": lambda: blobs(4),
    "blobs8": lambda: blobs(8),
    "circle": circle,
    "rings": rings,
    "moons": moons,
    "swissroll": swissroll,
}
DENSITIES = tuple(_MAKERS)


def density(name: str) -> Density2D:
    """A density by its name, one of `DENSITIES`.

    Raises:
        ValueError: if there is none of that name.

    Example:
        >>> board = density("checkerboard")
        >>> board.sample(3, torch.Generator().manual_seed(0)).shape, round(-board.entropy, 4)
        (torch.Size([3, 2]), 0.6931)
    """
    if not isinstance(name, str):
        raise TypeError(f"`name` must be that of a density, got {shown(name)}")
    if name not in _MAKERS:
        close = difflib.get_close_matches(name, DENSITIES, n=1)
        hint = f"did you mean `{close[0]}`? " if close else ""
        raise ValueError(f"there is no density `{name}`; {hint}There are {', '.join(DENSITIES)}")
    return _MAKERS[name]()


def _midpoints(k: int) -> Tensor:
    """Midpoints of k equal intervals of [0, 1]."""
    return (torch.arange(k, dtype=torch.float64) + 0.5) / k


def _arc(angles: Tensor, centre: tuple[float, float], radius: float | Tensor) -> Tensor:
    x, y = centre
    return torch.stack([x + radius * angles.cos(), y + radius * angles.sin()], dim=1)


def _drawn(points: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """N of the points, with replacement."""
    whole("n", n)
    if generator is None:
        raise TypeError(
            "`generator` must be a `torch.Generator`; write `Generator().manual_seed(0)`"
        )
    a_generator("generator", generator)
    device = generator.device
    rows = torch.randint(len(points), (n,), generator=generator, device=device)
    return points.to(device, torch.float32)[rows]


def _check_points(v: Tensor, name: str) -> None:
    if not isinstance(v, Tensor):
        raise TypeError(f"`{name}` must be a tensor, got {shown(v)}; give `torch.as_tensor(...)`")
    if v.dim() != 2 or v.shape[1] != 2 or not v.is_floating_point():
        raise ValueError(
            f"`{name}` must be floating-point points of the plane, shape (n, 2); got {v.dtype} of "
            f"shape {tuple(v.shape)}"
        )


def _check_positive(value: float, name: str) -> None:
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"`{name}` must be positive and finite, got {value}")

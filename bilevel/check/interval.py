r"""What a few directional derivatives say about an angle and a length, with an interval.

The hypergradient $g$ is known in full, the truth $t$ only by derivatives $t^\top d$ along directions.
Random directions alone would tell the cosine with an error of order $1/\sqrt{k}$. Here the truth is
first measured along an orthonormal basis $q_0 = g / |g|, q_1, \dots$ of $g$ and of *guesses* (the same
hypergradient in float64, say), $b_j = t^\top q_j$. What is left, $r = t - \sum_j b_j q_j$, is orthogonal
to all of them and is measured along $k$ random directions $z_i$, standard normal vectors without their
part in the basis. Whatever $t$ and its dimension,

$$ a_i = t^\top z_i \sim \mathcal{N}(0, |r|^2), \qquad \sum_i a_i^2 / |r|^2 \sim \chi^2_k , $$

so $|r|^2$ lies between $\sum_i a_i^2$ over the quantiles $(1 + c)/2$ and $(1 - c)/2$ of $\chi^2_k$ with
confidence $c$, exactly. With $T^2 = \sum_{j > 0} b_j^2 + |r|^2$, the part of the truth across $g$,

$$ \cos = \frac{b_0}{\sqrt{b_0^2 + T^2}}, \qquad
   \text{norm ratio} = \frac{|g|}{\sqrt{b_0^2 + T^2}}, \qquad
   \text{relative error} = \frac{|g - t|}{|t|} = \sqrt{\frac{(|g| - b_0)^2 + T^2}{b_0^2 + T^2}} . $$

All three are functions of $T$ and inherit its interval. A guess costs one direction; a good one makes
$r$ small and the interval narrow, a bad one does no harm. The uncertainty of the differences themselves
is added at its worst. In few dimensions the random directions are replaced by a basis of all that is
left; the interval is then that of the differences alone.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

Interval = tuple[float, float]


@final
@dataclass(frozen=True)
class Measured:
    """Directional derivatives of the truth.

    Attributes:
        size: norm of the hypergradient.
        along: derivatives along the basis, the first along the hypergradient.
        along_noise: their uncertainties.
        across: derivatives along the random directions.
        across_noise: their uncertainties.
        complete: whether those are an orthonormal basis of all that is left.
    """

    size: float
    along: Tensor
    along_noise: Tensor
    across: Tensor
    across_noise: Tensor
    complete: bool

    def rest(self, confidence: float) -> tuple[float, Interval]:
        """The norm of what is left of the truth, and its interval."""
        seen, noise = float(self.across.norm()), float(self.across_noise.norm())
        low, high = max(seen - noise, 0.0), seen + noise
        count = len(self.across)
        if self.complete or not count:
            return seen, (low, high)
        from scipy.special import gammaincinv

        least, most = (
            2 * float(gammaincinv(count / 2, tail))
            for tail in ((1 - confidence) / 2, (1 + confidence) / 2)
        )
        return seen / math.sqrt(count), (low / math.sqrt(most), high / math.sqrt(least))

    def noise(self) -> float:
        """The uncertainty of all differences together."""
        return float(torch.cat([self.along_noise, self.across_noise]).norm())


@final
@dataclass(frozen=True)
class Ranged:
    """A number and the interval it lies in."""

    value: float
    low: float
    high: float

    @property
    def interval(self) -> Interval:
        """The two ends."""
        return self.low, self.high


def estimates(measured: Measured, confidence: float, floor: float) -> tuple[Ranged, Ranged, Ranged]:
    """Cosine, norm ratio and relative error.

    Args:
        measured: the derivatives.
        confidence: of the intervals.
        floor: a size below which the truth counts as this large for the relative error.
    """
    size = measured.size
    b0, n0 = float(measured.along[0]), float(measured.along_noise[0])
    side, side_noise = float(measured.along[1:].norm()), float(measured.along_noise[1:].norm())
    rest, (low, high) = measured.rest(confidence)
    ahead = [b0 - n0, b0, b0 + n0] + ([0.0] if abs(b0) < n0 else [])
    across = [math.hypot(max(side - side_noise, 0.0), low), math.hypot(side + side_noise, high)]
    corners = list(itertools.product(ahead, across))
    middle = b0, math.hypot(side, rest)

    def bounds(function: Callable[[float, float], float]) -> Ranged:
        values = [function(*corner) for corner in corners]
        return Ranged(function(*middle), min(values), max(values))

    def cosine(b: float, across: float) -> float:
        truth = math.hypot(b, across)
        if truth == 0 or size == 0:
            return 1.0 if truth == size else 0.0
        return b / truth

    def ratio(b: float, across: float) -> float:
        return _over(size, math.hypot(b, across), both_zero=1.0)

    def error(b: float, across: float) -> float:
        return _over(math.hypot(size - b, across), max(math.hypot(b, across), floor), both_zero=0.0)

    return bounds(cosine), bounds(ratio), bounds(error)


def _over(a: float, b: float, both_zero: float) -> float:
    return a / b if b > 0 else (both_zero if a == 0 else math.inf)

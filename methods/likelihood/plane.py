r"""Densities of energies on the plane, normalised by a sum over a grid.

$$ \log Z \approx \log \sum_{ij} e^{-E(v_{ij})}\, a, $$

with $v_{ij}$ the midpoints of equal cells of area a. For a smooth energy that is high at the border of
the box the sum converges faster than any power of the cells' side: it is exact to rounding.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias, final

import torch
from torch import Tensor

from bilevel.refusals import whole

Box: TypeAlias = tuple[tuple[float, float], tuple[float, float]]

_AT_ONCE = 1 << 16  # points
_LOW = 0.01  # what the density at the border may be, of its highest value


@final
@dataclass(frozen=True)
class PlaneDensity:
    """A density on a box of the plane.

    Attributes:
        energy: (n, 2) -> (n,), up to a constant.
        box: its sides, ((low, high), (low, high)).
        log_density: at midpoints of the cells, the first coordinate along the rows, shape (size, size).
        log_partition: log Z of the energy on the box.
    """

    energy: Callable[[Tensor], Tensor]
    box: Box
    log_density: Tensor
    log_partition: float

    def log_prob(self, v: Tensor) -> Tensor:
        """Log p(v) in nats, shape (n,); minus infinity outside the box."""
        inside = torch.ones(len(v), dtype=torch.bool, device=v.device)
        for coordinate, (low, high) in zip(v.unbind(1), self.box, strict=True):
            inside &= (coordinate >= low) & (coordinate <= high)
        return (-_energies(self.energy, v) - self.log_partition).masked_fill(~inside, -math.inf)

    def __repr__(self) -> str:
        return f"PlaneDensity(box={self.box}, log_partition={self.log_partition:.4g})"


def plane_density(model: Any, box: Box, *, size: int = 400) -> PlaneDensity:
    """The density of a model of two real visibles, normalised on a box.

    Warns if the density is not low at the border: what lies beyond it is then left out of Z.

    Args:
        model: a learner, or any energy (n, 2) -> (n,) of float32 points.
        box: ((low, high), (low, high)), so large that the density is low at its border.
        size: cells along a side.

    Raises:
        ValueError: if the box is none or empty, the model's visibles are not two numbers, or the energy
            is no finite number per point.

    Example:
        >>> normal = plane_density(lambda v: v.square().sum(1) / 2, ((-6, 6), (-6, 6)))
        >>> round(normal.log_partition, 4), round(math.log(2 * math.pi), 4)
        (1.8379, 1.8379)
    """
    whole("size", size, 2)
    if not _is_box(box):
        raise ValueError(f"`box` must be ((low, high), (low, high)) with low < high, got {box!r}")
    if (shape := getattr(model, "visible_shape", None)) not in (None, (2,)):
        raise ValueError(
            "a density on the plane is one of two real visibles, shape (2,), but those of this "
            f"`{type(model).__name__}` have shape {shape}"
        )
    energy = getattr(model, "energy_function", model)
    like = next(iter(getattr(model, "parameters", list)()), torch.empty(0))
    sides = [(low, (high - low) / size) for low, high in box]
    x, y = (low + step * (torch.arange(size).to(like) + 0.5) for low, step in sides)
    values = -_energies(energy, torch.cartesian_prod(x, y)).double().view(size, size)
    if not values.isfinite().all():
        raise ValueError(
            "the energy is NaN or infinite at some points of `box`; take a smaller one"
        )
    log_partition = float(values.flatten().logsumexp(0)) + sum(math.log(step) for _, step in sides)
    rim = torch.cat([values[0], values[-1], values[:, 0], values[:, -1]]).max()
    share = float((rim - values.max()).exp())
    if share > _LOW and getattr(model, "visible_range", None) is None:
        warnings.warn(
            f"at the border of `box` the density is {share:.0%} of its highest value, and what lies "
            "beyond is not counted; take a larger one",
            stacklevel=2,
        )
    return PlaneDensity(energy, box, values - log_partition, log_partition)


def _is_box(box: Any) -> bool:
    try:
        (left, right), (low, high) = box
        return bool(left < right and low < high)
    except (TypeError, ValueError):
        return False


def _energies(energy: Callable[[Tensor], Tensor], v: Tensor) -> Tensor:
    with torch.no_grad():
        parts = [energy(part) for part in v.split(_AT_ONCE)]
    if any(not isinstance(e, Tensor) or e.ndim != 1 for e in parts) or sum(map(len, parts)) != len(
        v
    ):
        raise ValueError("an energy gives one number per point, shape (n,)")
    return torch.cat(parts)

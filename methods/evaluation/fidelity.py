r"""How alike two sets of images are, by their features: FID, KID, precision, density, coverage.

The Fréchet distance of two sets of features is that of the Gaussians with their moments,

$$ d^2 = \lVert \mu_a - \mu_b \rVert^2
   + \mathrm{tr}\big(C_a + C_b - 2 (C_a^{1/2} C_b\, C_a^{1/2})^{1/2}\big) , $$

the FID on Inception features. It is biased: few images make it too large. The kernel distance has no
such bias: with $k(x, y) = (x^\top y / d + 1)^3$ in d dimensions it is the mean, over random subsets of
$m$ features each, of

$$ \frac{1}{m (m - 1)} \sum_{i \ne j} \big(k(a_i, a_j) + k(b_i, b_j)\big)
   - \frac{2}{m^2} \sum_{i, j} k(a_i, b_j) . $$

Both mix two failures into one number: samples that look like no real image, and real images like which
there is no sample. Neighbours tell them apart. Let $B_k(x_i)$ be the ball around a real $x_i$ that
reaches to its $k$-th nearest real neighbour, $y_j$ the $M$ samples, $N$ the number of reals:

$$ \mathrm{precision} = \frac{1}{M} \sum_j \mathbf{1}\{\exists i: y_j \in B_3(x_i)\} , \qquad
   \mathrm{density} = \frac{1}{5 M} \sum_j \sum_i \mathbf{1}\{y_j \in B_5(x_i)\} , $$

$$ \mathrm{coverage} = \frac{1}{N} \sum_i \mathbf{1}\{\exists j: y_j \in B_5(x_i)\} , $$

and recall is the precision of the reals in the balls around the samples. A single outlier among the
reals makes precision too large, one among the samples recall; density and coverage suffer less.

References:
    GANs trained by a two time-scale update rule converge to a local Nash equilibrium (Heusel et al.,
    2017), https://arxiv.org/abs/1706.08500 (FID).
    Demystifying MMD GANs (Binkowski et al., 2018), https://arxiv.org/abs/1801.01401 (KID). Differs from
    the paper in: 20 subsets instead of 100, of the same 1000 features.
    Improved precision and recall metric for assessing generative models (Kynkäänniemi et al., 2019),
    https://arxiv.org/abs/1904.06991.
    Reliable fidelity and diversity metrics for generative models (Naeem et al., 2020),
    https://arxiv.org/abs/2002.09797 (density, coverage).
"""

import math
from functools import cache
from typing import Any, TypeAlias, final

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from bilevel.batches import not_finite

_Array: TypeAlias = NDArray[np.float64]

FEWEST = 6
"""Rows of a set that `neighbourhoods` needs: each has 5 neighbours."""

_SUBSETS = 20
_NEAR = 5  # the neighbours of density and coverage
_NEARER = 3  # those of precision and recall


def frechet_distance(a: ArrayLike, b: ArrayLike) -> float:
    """Squared Fréchet distance of two sets of features, each (n, k), as the FID takes it.

    Computed here, in double precision; `fid` asks torchmetrics if it can.

    Raises:
        ValueError: if a set has fewer than two rows, the sets differ in their number of features, or a
            feature is NaN or infinite.

    Example:
        >>> square = [[0.0, 0.0], [0.0, 2.0], [2.0, 0.0], [2.0, 2.0]]
        >>> frechet_distance(square, [[x + 3, y] for x, y in square])
        9.0
    """
    x, y = _pair(a, b, 2)
    shift = np.square(x.mean(axis=0) - y.mean(axis=0)).sum()
    cov_x, cov_y = (np.atleast_2d(np.cov(part, rowvar=False)) for part in (x, y))
    values, vectors = np.linalg.eigh(cov_x)
    root = vectors * np.sqrt(values.clip(min=0)) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov_y @ root).clip(min=0)).sum()
    return _distance(float(shift + np.trace(cov_x) + np.trace(cov_y) - 2 * cross))


def fid(a: ArrayLike, b: ArrayLike) -> float:
    """The same by torchmetrics where it is installed, else by `frechet_distance`.

    Raises:
        ValueError: as `frechet_distance`.
    """
    x, y = _pair(a, b, 2)
    library = torchmetrics("fid")
    if library is None:
        return frechet_distance(x, y)
    # of several processes one evaluates: nothing to synchronise with
    metric = library.FrechetInceptionDistance(_Given(x.shape[1]), sync_on_compute=False)
    metric.set_dtype(torch.float64)
    metric.update(torch.from_numpy(x), real=True)
    metric.update(torch.from_numpy(y), real=False)
    return _distance(float(metric.compute()))


def _distance(value: float) -> float:
    """A squared distance, which rounding may have made a little negative.

    Raises:
        ValueError: if it is not a number: squares of the features overflowed.
    """
    if not math.isfinite(value):
        raise ValueError(
            f"the Fréchet distance is {value}: the features are too large to be squared; scale them"
        )
    return max(0.0, value)


def kid(a: ArrayLike, b: ArrayLike, seed: int = 0, *, subset: int = 1000) -> float | None:
    """Kernel distance of two sets of features, each (n, k), by torchmetrics; `None` without it.

    Args:
        a: features of images.
        b: features of other images.
        seed: draws the subsets.
        subset: features in each of the 20 subsets; all of a set that has fewer.

    Raises:
        ValueError: if a set has fewer than two rows, the sets differ in their number of features, or a
            feature is NaN or infinite.
    """
    sets = [torch.from_numpy(part) for part in _pair(a, b, 2)]
    library = torchmetrics("kid")
    if library is None:
        return None
    generator = torch.Generator().manual_seed(seed)
    size = min(subset, *map(len, sets))

    def some(rows: Tensor) -> Tensor:
        return rows[torch.randperm(len(rows), generator=generator)[:size]]

    values = [float(library.poly_mmd(*map(some, sets))) for _ in range(_SUBSETS)]
    return float(np.mean(values))


def neighbourhoods(real: ArrayLike, samples: ArrayLike) -> dict[str, float]:
    """Precision, recall, density and coverage of samples among real images, by their features.

    Args:
        real: features of real images, (n, k).
        samples: features of samples, (m, k).

    Returns:
        By name: `precision`, `recall` and `coverage` in [0, 1], and `density`, 1 on average if samples
        and reals come from one distribution.

    Raises:
        ValueError: if a set has too few rows to have 5 neighbours each, the numbers of features differ,
            or a feature is NaN or infinite.
    """
    x, y = _pair(real, samples, FEWEST)
    real_reach, sample_reach = _reach(x), _reach(y)
    counts = _counts(y, x, real_reach[_NEAR])
    return {
        "precision": float((_counts(y, x, real_reach[_NEARER]) > 0).mean()),
        "recall": float((_counts(x, y, sample_reach[_NEARER]) > 0).mean()),
        "density": float(counts.mean()) / _NEAR,
        "coverage": float((_nearest(x, y) <= real_reach[_NEAR]).mean()),
    }


@cache
def torchmetrics(module: str) -> Any:
    """A module of `torchmetrics.image`, `None` if it is not installed or cannot be imported.

    It imports torch-fidelity where that is installed, which imports torchvision, whose binaries refuse a
    torch they were not built for.
    """
    from importlib import import_module

    try:
        return import_module(f"torchmetrics.image.{module}")
    except (ImportError, RuntimeError, OSError):
        return None


@final
class _Given(nn.Module):
    """Features that are computed already, to a metric that asks for a network."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def _reach(rows: _Array) -> dict[int, _Array]:
    """Distance of each row to its k-th nearest neighbour, by k."""
    from sklearn.neighbors import NearestNeighbors

    distances, _ = NearestNeighbors(n_neighbors=_NEAR).fit(rows).kneighbors()
    return {k: distances[:, k - 1] for k in (_NEARER, _NEAR)}


def _nearest(rows: _Array, others: _Array) -> _Array:
    """Distance of each row to the nearest of the others."""
    from sklearn.neighbors import NearestNeighbors

    distances, _ = NearestNeighbors(n_neighbors=1).fit(others).kneighbors(rows)
    nearest: _Array = distances[:, 0]
    return nearest


def _counts(rows: _Array, centres: _Array, radii: _Array) -> _Array:
    """In how many of the balls each row lies."""
    from sklearn.metrics import pairwise_distances_chunked

    chunks = pairwise_distances_chunked(
        rows, centres, reduce_func=lambda distances, _: (distances <= radii).sum(axis=1)
    )
    return np.concatenate(list(chunks))


def _pair(a: ArrayLike, b: ArrayLike, fewest: int) -> tuple[_Array, _Array]:
    x, y = (np.ascontiguousarray(part, dtype=np.float64) for part in (a, b))
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < fewest:
        raise ValueError(
            f"features are two arrays of shape (n, k) with the same k and n of at least {fewest}, got "
            f"{x.shape} and {y.shape}"
        )
    refuse_undefined(x, "the features of the first set")
    refuse_undefined(y, "the features of the second set")
    return x, y


def refuse_undefined(rows: NDArray[Any] | Tensor, what: str) -> None:
    """Refuse numbers to be measured of which some are NaN or infinite: no measure means anything.

    Args:
        rows: one row, or one number, for each of what is measured.
        what: they are, in the plural.

    Raises:
        ValueError: naming how many rows hold any, and the first.
    """
    values = rows if isinstance(rows, Tensor) else torch.from_numpy(rows)
    count, which = not_finite(values) if len(values) else (0, "")
    if count:
        raise ValueError(
            f"{what} hold NaN or infinity in {count} of {len(values)} rows ({which}); there is nothing "
            "to measure: look at what produced them"
        )

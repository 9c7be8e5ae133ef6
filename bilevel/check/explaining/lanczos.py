r"""Extreme eigenvalues of an operator from its products, by Lanczos' method.

From a random start $q_1$ the recursion $\beta_k q_{k+1} = A q_k - \alpha_k q_k - \beta_{k-1} q_{k-1}$
builds an orthonormal basis of the Krylov space; the eigenvalues of the tridiagonal matrix of the
$\alpha$ and $\beta$ tend to the extreme ones of $A$ first. Every vector is made orthogonal to all
before it, twice, or rounding would bring the same eigenvalue back again and again. Where the space is
exhausted before it is full (eigenvalues that come several times), a new random vector goes on.
"""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bilevel.linear.base import Operator

_MOST = 80  # steps
_MEMORY = 2**26  # numbers that the basis may hold


@final
@dataclass(frozen=True)
class Spectrum:
    """What is known of the eigenvalues of a symmetric operator.

    Attributes:
        size: number of eigenvalues, n.
        smallest: the smallest; where it is not `certain`, the true one is no larger.
        largest: the largest; where it is not `certain`, the true one is no smaller.
        certain: whether the two are exact: the whole space was searched.
        asymmetry: |u^T A v - v^T A u| relative to the products, about 0 for a symmetric operator.
        flat: how many of the eigenvalues found are 0 to rounding.
        lowest: unit eigenvector of the smallest, shape (n,).
        products: products with the operator that were used.
    """

    size: int
    smallest: float
    largest: float
    certain: bool
    asymmetry: float
    flat: int
    lowest: Tensor
    products: int

    @property
    def reach(self) -> float:
        """The largest absolute eigenvalue."""
        return max(abs(self.smallest), abs(self.largest))

    @property
    def condition(self) -> float:
        """Largest over smallest eigenvalue, infinite unless all are positive."""
        return self.largest / self.smallest if self.smallest > 0 else float("inf")


def lanczos(operator: Operator, like: Tensor, *, seed: int = 0, rounding: float) -> Spectrum:
    """Extreme eigenvalues of `operator`, from at most 80 products.

    Args:
        operator: v -> A v on vectors of shape (n,).
        like: any vector it takes.
        seed: of the random start.
        rounding: an eigenvalue below this part of the largest is 0.

    Returns:
        The spectrum; exact where n is at most 80.
    """
    n = like.numel()
    steps = max(2, min(n, _MOST, _MEMORY // n)) if n > 1 else 1
    generator = torch.Generator().manual_seed(seed)
    draw = _Draws(like, generator)
    basis = like.new_zeros(steps, n)
    basis[0] = draw.unit(basis[:0])
    matrix = torch.zeros(steps, steps, dtype=torch.float64)
    asymmetry = scale = 0.0
    for k in range(steps):
        product = operator(basis[k])
        span = basis[: k + 1]
        overlap = (span @ product).double().cpu()
        # for a symmetric operator this column repeats the numbers of the row before
        asymmetry = max(asymmetry, float((overlap[:k] - matrix[k, :k]).abs().max()) if k else 0.0)
        scale = max(scale, float(product.norm()))
        matrix[: k + 1, k] = overlap
        if k + 1 == steps:
            break
        rest = product
        for _ in range(2):
            rest = rest - (span @ rest) @ span
        length = float(rest.norm())
        fresh = length <= 1e-3 * rounding * max(scale, 1e-300) or length != length
        matrix[k + 1, k] = 0.0 if fresh else length
        basis[k + 1] = draw.unit(span) if fresh else rest / length
    return _spectrum(matrix, basis, asymmetry, scale, rounding, n)


@final
class _Draws:
    """Random unit vectors."""

    def __init__(self, like: Tensor, generator: torch.Generator) -> None:
        self._like = like
        self._generator = generator

    def unit(self, span: Tensor) -> Tensor:
        """One that is orthogonal to these, shape (k, n)."""
        drawn = torch.randn(self._like.numel(), generator=self._generator, dtype=torch.float64)
        vector = drawn.to(self._like)
        for _ in range(2 if len(span) else 0):
            vector = vector - (span @ vector) @ span
        unit: Tensor = vector / vector.norm()
        return unit


def _spectrum(
    matrix: Tensor, basis: Tensor, asymmetry: float, scale: float, rounding: float, n: int
) -> Spectrum:
    steps = len(basis)
    if not bool(matrix.isfinite().all()):
        nan = float("nan")
        return Spectrum(n, nan, nan, False, nan, 0, basis[0], steps)
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    zero = values.abs() <= rounding * values.abs().max()
    lowest = vectors[:, 0].to(basis) @ basis
    return Spectrum(
        size=n,
        smallest=float(values[0]),
        largest=float(values[-1]),
        certain=steps == n,
        asymmetry=asymmetry / scale if scale > 0 else 0.0,
        flat=int(zero.sum()),
        lowest=lowest,
        products=steps,
    )

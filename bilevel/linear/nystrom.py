r"""A damped inverse from a few products: the Nystrom approximation of a symmetric matrix.

With a sketch $\Omega$ of $k$ columns, $C = A \Omega$ and $W = \Omega^\top C$, the matrix is taken for
$A_k = C W^{+} C^\top = U \Lambda U^\top$, and with a damping $\rho$

$$ (A_k + \rho I)^{-1} b = U (\Lambda + \rho I)^{-1} U^\top b + \tfrac1\rho (b - U U^\top b) . $$

For $A \succeq 0$ the error in the matrix is at most a multiple of the eigenvalues beyond the $k$ largest, and
none is left at $k = n$.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias, final

import torch
from torch import Tensor

from bilevel.arguments import explained_settings
from bilevel.errors import Result
from bilevel.linear.base import (
    LinearSolution,
    LinearSolver,
    Operator,
    in_own_units,
    outcome,
    refuse_no_system,
    relative,
)
from bilevel.refusals import SEEDS, one_of, positive, whole

Sketch: TypeAlias = Literal["gaussian", "columns"]


@final
@explained_settings
@dataclass(frozen=True)
class Nystrom(LinearSolver):
    r"""$(A_k + \rho I)^{-1} b$ with $A_k$ the Nystrom approximation from `rank` products with A.

    No iteration, so nothing that depends on the right-hand side: `rank` products for any number of
    them. As `preconditioner` of `ConjugateGradient` it makes the iteration see the small eigenvalues
    only, for a Hessian with few large ones.

    An approximation on purpose. Its residual is reported; one above 1 is no success, because the answer
    is then worse than zero: eigenvalues that the sketch has missed are larger than the damping. Negative
    eigenvalues of $A_k + \rho I$ are reported as negative curvature.

    Args:
        rank: columns of the sketch k, each one product with A; from n on the answer is exact.
        damping: the number rho, added to the diagonal of A: what the directions outside of the sketch
            are divided by.
        sketch: "gaussian" draws random directions, "columns" takes random columns of A, which is
            cheaper only where a column is.
        seed: of the sketch; the same at every solve.

    Raises:
        ValueError: if a setting is out of range.

    Example:
        >>> A = torch.diag(torch.tensor([8.0, 1.0, 0.0]))
        >>> Nystrom(rank=3, damping=1.0).solve(lambda v: A @ v, torch.tensor([9.0, 2, 1])).value.round(decimals=4)
        tensor([1.0000, 1.0000, 1.0000])

    References:
        Nystrom Method for Accurate and Scalable Implicit Differentiation (Hataya, Yamada, 2023),
        https://arxiv.org/abs/2302.09726, Eqs. 5 and 6 (`sketch="columns"`), and Randomized Nystrom
        Preconditioning (Frangella, Tropp, Udell, 2023), https://arxiv.org/abs/2110.02820, Algorithm 2.1
        and Eq. 1.3. Differs from the papers in: the eigenvalues come from an eigendecomposition of W in
        place of Woodbury's identity and of a shifted Cholesky factor, so that A may be indefinite.
    """

    approximate: ClassVar[bool] = True

    rank: int = 20
    damping: float = 0.01
    sketch: Sketch = "gaussian"
    seed: int = 0

    def __post_init__(self) -> None:
        whole("rank", self.rank)
        positive("damping", self.damping)
        one_of("sketch", self.sketch, ("gaussian", "columns"))
        whole("seed", self.seed, *SEEDS)

    def solve(
        self, operator: Operator, rhs: Tensor, *, guess: Tensor | None = None
    ) -> LinearSolution:
        refuse_no_system(operator, rhs)
        b, unit = in_own_units(rhs)
        vectors, values = self.eigenpairs(operator, b)
        inside = vectors.mT @ b
        w = vectors @ (inside / (values + self.damping)) + (b - vectors @ inside) / self.damping
        missing = torch.linalg.vector_norm(b - operator(w) - self.damping * w)
        residual = relative(missing, torch.linalg.vector_norm(b))
        noise = torch.finfo(b.dtype).eps * values.abs().max()
        negative = bool(values.min() + self.damping < -10 * noise)
        result = outcome(residual, 1 + 1e-6)
        if negative and result is not Result.NOT_FINITE:
            result = Result.NEGATIVE_CURVATURE
        note = ""
        if result is Result.NOT_CONVERGED:
            note = (
                f"the answer is worse than zero: the eigenvalues that a sketch of rank {len(values)} has "
                f"missed are larger than the damping {self.damping:g}; raise `rank` or `damping`, or use "
                "it as `ConjugateGradient(preconditioner=Nystrom(...))`"
            )
        return LinearSolution(unit * w, result, residual, len(values) + 1, negative, note)

    def prepare(
        self, operator: Operator, like: Tensor, damping: float
    ) -> tuple[tuple[Tensor, ...], int]:
        """The preconditioner `(l_k + d) U (L + d)^-1 U^T + I - U U^T`: what it is made of.

        Args:
            operator: v -> A v.
            like: any vector it takes.
            damping: that of the system, d; it takes the place of this object's own.
        """
        vectors, values = self.eigenpairs(operator, like)
        sizes = values.abs()  # a preconditioner is positive, whatever the matrix is
        sizes = sizes + damping + 10 * torch.finfo(like.dtype).eps * sizes.max()
        return (vectors, sizes.min() / sizes - 1), len(values)

    def apply(self, r: Tensor, *made: Tensor) -> Tensor:
        """The product M r of the preconditioner."""
        vectors, factors = made
        return r + vectors @ (factors * (vectors.mT @ r))

    def eigenpairs(self, operator: Operator, like: Tensor) -> tuple[Tensor, Tensor]:
        """Orthonormal vectors (n, k) and values (k,) of the approximation; the rest of A is 0.

        Args:
            operator: v -> A v.
            like: any vector it takes.
        """
        n = like.numel()
        rank, random = min(self.rank, n), torch.Generator().manual_seed(self.seed)
        if self.sketch == "columns":
            drawn = torch.eye(n, dtype=like.dtype)[:, torch.randperm(n, generator=random)[:rank]]
        else:
            drawn = torch.randn(n, rank, dtype=torch.float64, generator=random).to(like.dtype)
        omega, _ = torch.linalg.qr(drawn.to(like))
        whole = torch.stack([operator(column) for column in omega.mT.contiguous()], dim=1)
        if not bool(whole.isfinite().all()):
            return omega, torch.full_like(whole[0], torch.nan)
        core = omega.mT @ whole
        values, vectors = torch.linalg.eigh((core + core.mT) / 2)
        kept = values.abs() > 10 * torch.finfo(like.dtype).eps * values.abs().max()
        root = torch.where(kept, values.abs(), 1).sqrt()
        # A_k = B sign B^T with B = C Q |D|^(-1/2): half the digits that W^+ would cost
        half = whole @ (vectors * torch.where(kept, 1 / root, 0))
        basis, upper = torch.linalg.qr(half)
        values, vectors = torch.linalg.eigh((upper * values.sign()) @ upper.mT)
        return basis @ vectors, values

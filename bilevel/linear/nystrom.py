r"""A damped inverse from a few products, by the Nystrom approximation of a symmetric matrix.

With a sketch $\Omega$ of $k$ columns, $C = A \Omega$ and $W = \Omega^\top C$, the matrix is taken for
$A_k = C W^{+} C^\top = U \Lambda U^\top$, and with a damping $\rho$

$$ (A_k + \rho I)^{-1} b = U (\Lambda + \rho I)^{-1} U^\top b + \tfrac1\rho (b - U U^\top b) . $$
"""

from dataclasses import dataclass
from typing import ClassVar, final

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
from bilevel.linear.sketch import Sketch, eigenpairs
from bilevel.refusals import SEEDS, one_of, positive, whole


@final
@explained_settings
@dataclass(frozen=True)
class Nystrom(LinearSolver):
    r"""$(A_k + \rho I)^{-1} b$ with $A_k$ the Nystrom approximation from `rank` products with A.

    No iteration, so nothing that depends on the right-hand side: `rank` products for any number of
    them. As `preconditioner` of `ConjugateGradient` it makes the iteration see the small eigenvalues
    only, for a Hessian with few large ones; the damping is then that of the solver.

    An approximation on purpose. Its residual is reported; one above 1 is no success, because the answer
    is then worse than zero: eigenvalues that the sketch has missed are larger than the damping. Negative
    eigenvalues of $A_k + \rho I$ are reported as negative curvature.

    Args:
        rank: columns of the sketch k, each one product with A; from n on the answer is exact.
        damping: the number rho, added to the diagonal of A: what the directions outside of the sketch
            are divided by.
        sketch: "gaussian" draws random directions, "columns" takes random columns of A.
        seed: of the sketch; the same at every solve.

    Raises:
        ValueError: if a setting is out of range.

    Example:
        >>> A = torch.diag(torch.tensor([8.0, 1.0, 0.0]))
        >>> found = Nystrom(rank=3, damping=1.0).solve(lambda v: A @ v, torch.tensor([9.0, 2, 1]))
        >>> found.value.round(decimals=4)
        tensor([1., 1., 1.])

    References:
        Nystrom Method for Accurate and Scalable Implicit Differentiation (Hataya, Yamada, 2023),
        https://arxiv.org/abs/2302.09726 (`sketch="columns"`), and Randomized Nystrom
        Preconditioning (Frangella, Tropp, Udell, 2023), https://arxiv.org/abs/2110.02820, Algorithm 2.1
        and Eq. 1.3. Differs from the papers in: the eigenvalues come from an eigendecomposition of W in
        place of Woodbury's identity and of a shifted Cholesky factor, so that A may be indefinite.
    """

    needs_symmetry: ClassVar[bool] = True
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
        vectors, values = eigenpairs(operator, b, self.rank, self.sketch, self.seed)
        inside = vectors.mT @ b
        w = vectors @ (inside / (values + self.damping))
        if len(values) < len(b):  # else nothing is left, and rounding must not be divided
            w = w + (b - vectors @ inside) / self.damping
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
                "the answer is worse than zero: the eigenvalues that a sketch of rank "
                f"{len(values)} has missed are larger than the damping {self.damping:g}; raise `rank` "
                "or `damping`, or use it as `ConjugateGradient(preconditioner=Nystrom(...))`"
            )
        return LinearSolution(unit * w, result, residual, len(values) + 1, negative, note)

    def prepare(
        self, operator: Operator, like: Tensor, damping: float
    ) -> tuple[tuple[Tensor, ...], int]:
        """What `(l_k + d) U (L + d)^-1 U^T + I - U U^T` is made of, d the damping of the system."""
        vectors, values = eigenpairs(operator, like, self.rank, self.sketch, self.seed)
        sizes, kind = values.abs(), torch.finfo(like.dtype)  # a preconditioner is positive
        sizes = (sizes + damping + 10 * kind.eps * sizes.max()).clamp_min(kind.tiny)
        return (vectors, sizes.min() / sizes - 1), len(values)

    def apply(self, r: Tensor, *made: Tensor) -> Tensor:
        """The product M r of the preconditioner."""
        vectors, factors = made
        return r + vectors @ (factors * (vectors.mT @ r))

"""Conjugate gradients for a symmetric positive definite operator."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel.errors import Result
from bilevel.linear.base import (
    LinearSolution,
    LinearSolver,
    Operator,
    damped,
    initial,
    outcome,
    positive,
)
from bilevel.tracing import tracing


@dataclass(frozen=True)
class ConjugateGradient(LinearSolver):
    """Preconditioned conjugate gradients on `(A + damping I) w = b`.

    Stops at the first direction p with p^T (A + damping I) p <= 0 and returns the current iterate:
    the lower level is then not at a strict minimum and the system has no meaning as a best response.

    Args:
        max_steps: most steps, each one product with A.
        rtol: stop once |residual| <= rtol |b|; "auto" is the square root of the dtype's machine
            epsilon. `None` runs all `max_steps` steps (fewer if the residual becomes 0) and calls
            that a success: the truncated method on purpose.
        damping: added to the diagonal of A.
        preconditioner: r -> M r with M symmetric positive definite, close to the inverse of A.
        warm_start: start from the previous solution.
        check_every: steps between two looks at the residual. Each look waits for the device; on a
            GPU 5 or 10 hides the wait. Steps past the end leave the iterate as it is.

    Raises:
        ValueError: if a setting is out of range.

    Example:
        >>> A = torch.tensor([[2.0, 0.0], [0.0, 4.0]])
        >>> ConjugateGradient().solve(lambda v: A @ v, torch.tensor([2.0, 4.0])).value.round(decimals=5)
        tensor([1., 1.])

    References:
        Methods of Conjugate Gradients for Solving Linear Systems (Hestenes, Stiefel, 1952),
        https://doi.org/10.6028/jres.049.044
    """

    max_steps: int = 100
    rtol: float | str | None = "auto"
    damping: float = 0.0
    preconditioner: Callable[[Tensor], Tensor] | None = None
    warm_start: bool = False
    check_every: int = 1

    def __post_init__(self) -> None:
        positive("max_steps", self.max_steps)
        positive("damping", self.damping, zero=True)
        positive("check_every", self.check_every)
        if isinstance(self.rtol, str):
            if self.rtol != "auto":
                raise ValueError(f'`rtol` must be a number, "auto" or None, got {self.rtol!r}')
        elif self.rtol is not None:
            positive("rtol", self.rtol)

    def solve(
        self, operator: Operator, rhs: Tensor, *, guess: Tensor | None = None
    ) -> LinearSolution:
        operator = damped(operator, self.damping)
        precondition = self.preconditioner or (lambda r: r)
        w, r, products = initial(operator, rhs, guess if self.warm_start else None)
        # residuals are kept relative to |b|: the square of a small gradient underflows in float32
        scale = torch.linalg.vector_norm(rhs).clamp_min(torch.finfo(rhs.dtype).tiny)
        r = r / scale
        z = precondition(r)
        p = z
        rz = torch.dot(r, z)
        negative = torch.zeros((), dtype=torch.bool, device=rhs.device)

        for step in range(self.max_steps):
            solved = self._small(r)
            if step % self.check_every == 0 and not tracing():
                finished = solved | negative | ~r.isfinite().all()
                if bool(finished):  # waits for the device
                    break
            Ap = operator(p)
            products += 1
            curvature = torch.dot(p, Ap)
            negative = negative | ((curvature <= 0) & ~solved)
            # alpha = 0 freezes the iterate: after negative curvature, and at the solution, where
            # the recurrence would go on until it underflows
            alpha = torch.where(negative | solved, torch.zeros_like(rz), rz / curvature)
            w = w + scale * alpha * p
            r = r - alpha * Ap
            z = precondition(r)
            rz, previous = torch.dot(r, z), rz
            p = z + torch.where(previous == 0, torch.zeros_like(rz), rz / previous) * p
        residual = torch.linalg.vector_norm(r)
        result = outcome(residual, self._tolerance(r.dtype))
        if tracing():
            return LinearSolution(w, result, residual, products)
        if bool(negative) and result is not Result.NOT_FINITE:
            result = Result.NEGATIVE_CURVATURE
        return LinearSolution(w, result, residual, products, bool(negative))

    def _tolerance(self, dtype: torch.dtype) -> float | None:
        return torch.finfo(dtype).eps ** 0.5 if isinstance(self.rtol, str) else self.rtol

    def _small(self, r: Tensor) -> Tensor:
        floor = torch.finfo(r.dtype).eps  # below it, the recurrence says nothing about the residual
        tolerance = max(self._tolerance(r.dtype) or 0.0, floor)
        return torch.le(torch.linalg.vector_norm(r), tolerance)

"""Restarted GMRES for any invertible operator, symmetric or not."""

from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel.linear.base import (
    LinearSolution,
    LinearSolver,
    Operator,
    damped,
    initial,
    outcome,
    positive,
    relative,
)


@dataclass(frozen=True)
class GMRES(LinearSolver):
    """Generalized minimal residuals on `(A + damping I) w = b`, restarted.

    Needs neither symmetry nor definiteness: right where the lower level is a saddle or the lower
    "gradient" is a fixed-point map. Stores `restart` vectors.

    Args:
        max_steps: most Arnoldi steps over all restarts, each one product with A; the residual at
            a restart is one more.
        restart: size of the Krylov space.
        rtol: stop once |residual| <= rtol |b|; `None` runs exactly `max_steps` and calls it a
            success.
        damping: added to the diagonal of A.
        warm_start: start from the previous solution.

    Raises:
        ValueError: if a setting is out of range.

    Example:
        >>> A = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
        >>> GMRES().solve(lambda v: A @ v, torch.tensor([1.0, 0.0])).value.round(decimals=5) + 0.0
        tensor([0., 1.])

    References:
        GMRES: A Generalized Minimal Residual Algorithm for Solving Nonsymmetric Linear Systems
        (Saad, Schultz, 1986), https://doi.org/10.1137/0907058
    """

    max_steps: int = 100
    restart: int = 30
    rtol: float | None = 1e-5
    damping: float = 0.0
    warm_start: bool = False

    def __post_init__(self) -> None:
        positive("max_steps", self.max_steps)
        positive("restart", self.restart)
        positive("damping", self.damping, zero=True)
        if self.rtol is not None:
            positive("rtol", self.rtol)

    def solve(
        self, operator: Operator, rhs: Tensor, *, guess: Tensor | None = None
    ) -> LinearSolution:
        operator = damped(operator, self.damping)
        w, r, products = initial(operator, rhs, guess if self.warm_start else None)
        scale = torch.linalg.vector_norm(rhs)
        goal = (self.rtol or 0.0) * scale
        steps = 0
        while steps < self.max_steps and torch.linalg.vector_norm(r) > goal:
            width = min(self.restart, self.max_steps - steps)
            update, used = _cycle(operator, r, width, goal)
            w = w + update
            r = rhs - operator(w)  # the true residual: restarts must not inherit rounding
            steps += used
            products += used + 1
            if not bool(r.isfinite().all()) or not bool(update.any()):
                break
        residual = relative(torch.linalg.vector_norm(r), scale)
        return LinearSolution(w, outcome(residual, self.rtol), residual, products)


def _cycle(operator: Operator, r: Tensor, width: int, goal: Tensor) -> tuple[Tensor, int]:
    """One Arnoldi cycle from residual r: the correction to w and the products it used."""
    beta = torch.linalg.vector_norm(r)
    basis = [r / beta]
    hessenberg = r.new_zeros(width + 1, width)
    target = r.new_zeros(width + 1, 1)
    target[0] = beta
    y = r.new_zeros(0, 1)
    for j in range(width):
        v = operator(basis[j])
        span = torch.stack(basis)
        for _ in range(2):  # Gram-Schmidt twice is as orthogonal as rounding allows
            overlap = span @ v
            v = v - overlap @ span
            hessenberg[: j + 1, j] += overlap
        length = torch.linalg.vector_norm(v)
        hessenberg[j + 1, j] = length
        small = hessenberg[: j + 2, : j + 1]
        # QR and not `lstsq`, whose result differs in the last bit from call to call
        q, upper = torch.linalg.qr(small)
        tiny = torch.finfo(r.dtype).eps * torch.linalg.vector_norm(small)
        if bool(upper[-1, -1].abs() <= tiny):
            break  # a singular operator: this column adds nothing
        y = torch.linalg.solve_triangular(upper, q.mT @ target[: j + 2], upper=True)
        missing = torch.linalg.vector_norm(target[: j + 2] - small @ y)
        # the space cannot grow past an invariant subspace; `length` is then rounding error
        exhausted = length <= 10 * tiny
        if bool((missing <= goal) | exhausted | ~missing.isfinite()):
            break
        basis.append(v / length)
    return y[:, 0] @ torch.stack(basis)[: len(y)], j + 1

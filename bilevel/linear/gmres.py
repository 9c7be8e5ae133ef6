"""Restarted GMRES for any invertible operator, symmetric or not."""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bilevel.arguments import explained_settings
from bilevel.errors import Result
from bilevel.linear.base import (
    LinearSolution,
    LinearSolver,
    Operator,
    damped,
    in_own_units,
    initial,
    outcome,
    refuse_no_system,
    relative,
)
from bilevel.refusals import flag, positive, whole


@final
@explained_settings
@dataclass(frozen=True)
class GMRES(LinearSolver):
    """Generalized minimal residuals on `(A + damping I) w = b`, restarted.

    Needs neither symmetry nor definiteness: right where the lower level is a saddle or the lower
    "gradient" is a fixed-point map. Stores `restart` vectors. The residual tested is the true one,
    computed at every restart and at the end.

    Args:
        max_steps: most Arnoldi steps over all restarts, each one product with A; the residual at
            a restart is one more.
        restart: size of the Krylov space.
        rtol: stop once |residual| <= rtol |b|; `None` runs all `max_steps` as long as they help and
            calls it a success: the truncated method on purpose.
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
        flag("warm_start", self.warm_start)
        whole("max_steps", self.max_steps)
        whole("restart", self.restart)
        positive("damping", self.damping, zero=True)
        if self.rtol is not None:
            positive("rtol", self.rtol)

    def solve(
        self, operator: Operator, rhs: Tensor, *, guess: Tensor | None = None
    ) -> LinearSolution:
        refuse_no_system(operator, rhs)
        operator = damped(operator, self.damping)
        rhs, unit = in_own_units(rhs)
        w, r, products = initial(operator, rhs, guess if self.warm_start else None, unit)
        scale = torch.linalg.vector_norm(rhs)
        goal = (self.rtol or 0.0) * scale
        steps, singular = 0, False
        eps = torch.finfo(rhs.dtype).eps
        missing = torch.linalg.vector_norm(r)
        while steps < self.max_steps and missing > goal:
            width = min(self.restart, self.max_steps - steps)
            update, used, degenerate = _cycle(operator, r, width, goal)
            singular |= degenerate
            # the true residual: restarts must not inherit rounding
            new = rhs - operator(w + update)
            steps += used
            products += used + 1
            before, missing = missing, torch.linalg.vector_norm(new)
            # a correction that brings no progress is rounding, and may be large; along the flat
            # directions of a singular operator it hides behind a little progress
            if bool(missing >= before * (0.5 if singular and steps > used else 1 - eps**0.5)):
                missing = before
                break
            w, r = w + update, new
            if not bool(missing.isfinite()):
                break
        residual = relative(missing, scale)
        result = outcome(residual, self.rtol)
        if singular and result is not Result.NOT_FINITE and residual > (self.rtol or eps**0.5):
            result = Result.SINGULAR
        return LinearSolution(unit * w, result, residual, products)


def _cycle(operator: Operator, r: Tensor, width: int, goal: Tensor) -> tuple[Tensor, int, bool]:
    """One Arnoldi cycle from residual r.

    Returns:
        The correction to w, the products it used, and whether the operator is singular on the space.
    """
    beta = torch.linalg.vector_norm(r)
    basis = [r / beta]
    hessenberg = r.new_zeros(width + 1, width)
    target = r.new_zeros(width + 1, 1)
    target[0] = beta
    y = r.new_zeros(0, 1)
    singular = False
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
        tiny = 10 * torch.finfo(r.dtype).eps * torch.linalg.vector_norm(small)
        # the space cannot grow past an invariant subspace; `length` is then rounding error
        exhausted = length <= tiny
        if bool(upper[-1, -1].abs() <= tiny):
            singular = bool(exhausted)
            break  # this column adds nothing
        y = torch.linalg.solve_triangular(upper, q.mT @ target[: j + 2], upper=True)
        missing = torch.linalg.vector_norm(target[: j + 2] - small @ y)
        if bool((missing <= goal) | exhausted | ~missing.isfinite()):
            break
        basis.append(v / length)
    return y[:, 0] @ torch.stack(basis)[: len(y)], j + 1, singular

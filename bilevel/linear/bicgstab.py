"""Stabilised biconjugate gradients for any invertible operator."""

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, final

import torch
from torch import Tensor

from bilevel.arguments import explained_settings
from bilevel.errors import Result
from bilevel.linear.base import Operator
from bilevel.linear.krylov import Krylov
from bilevel.linear.scalars import Number, Scalars


@final
@explained_settings
@dataclass(frozen=True)
class BiCGStab(Krylov):
    """Stabilised biconjugate gradients on `(A + damping I) w = b`, A symmetric or not.

    GMRES for many steps: it keeps seven vectors however many steps it takes, for two products a step
    and a residual that may rise on the way (the best iterate is returned). The recursion can break
    down, which the result says: on a matrix without symmetric part (a rotation, a game between two
    players) at once.

    Args:
        max_steps: most steps, each two products with A.
        rtol: stop once |residual| <= rtol |b|; "auto" is the square root of the dtype's machine
            epsilon; `None` takes all steps as long as they help and calls that a success.
        damping: added to the diagonal of A.
        warm_start: start from the previous solution.
        check_every: steps between two looks at the residual, each of which waits for the device.

    Raises:
        ValueError: if a setting is out of range.

    Example:
        >>> A = torch.tensor([[2.0, 1.0], [-1.0, 2.0]])
        >>> BiCGStab().solve(lambda v: A @ v, torch.tensor([3.0, 1.0])).value.round(decimals=5)
        tensor([1., 1.])

    References:
        Bi-CGSTAB: A Fast and Smoothly Converging Variant of Bi-CG for the Solution of Nonsymmetric
        Linear Systems (van der Vorst, 1992), https://doi.org/10.1137/0913035. Differs from the paper
        in: passes start again, with a new shadow, from the true residual.
    """

    products: ClassVar[int] = 2
    defect: ClassVar[Result] = Result.BREAKDOWN

    def begin(self, s: Scalars, operator: Operator, r: Tensor) -> tuple[Any, ...]:
        still, zero = torch.zeros_like(r), s.zero(s.of(r[0]))
        one, no = zero + 1, s.false(zero)
        return _Place(still, still, r, r, still, still, one, one, one, one, no, no)

    def step(self, s: Scalars, operator: Operator, enough: Number, *state: Any) -> tuple[Any, ...]:
        here = _Place(*state)
        rounding = s.constant(torch.finfo(here.r.dtype).eps)
        before, rho = s.of(torch.linalg.vector_norm(here.r)), s.of(torch.dot(here.shadow, here.r))
        with s.quiet():
            stopped = (before <= enough) | here.broken
            beta = (rho / here.rho) * (here.alpha / here.omega)
        p = here.r + s.times(beta, here.p - s.times(here.omega, here.v))
        v = operator(p)
        meeting, long = s.of(torch.dot(here.shadow, v)), s.of(torch.linalg.vector_norm(v))
        with s.quiet():  # an inner product that is rounding of its factors says nothing
            lost = (abs(rho) <= rounding * before) | (abs(meeting) <= rounding * long)
            frozen = stopped | lost
            alpha = s.pick(frozen, s.zero(rho), rho / meeting)
        half = here.r - s.times(alpha, v)
        t = operator(half)
        tt, th, hh = s.of(torch.dot(t, t)), s.of(torch.dot(t, half)), s.of(torch.dot(half, half))
        with s.quiet():
            stuck = (abs(th) <= rounding * s.root(tt) * s.root(hh)) & (s.root(hh) > enough)
            omega = s.pick(frozen | stuck | (tt == 0), s.zero(th), th / tt)
        w = s.pick(frozen, here.w, here.w + s.times(alpha, p) + s.times(omega, half))
        r = s.pick(frozen, here.r, half - s.times(omega, t))
        length = s.of(torch.linalg.vector_norm(r))
        with s.quiet():
            broken = here.broken | ((lost | stuck) & ~stopped)
            done = stopped | broken | (length <= enough) | ~s.finite(length)
            best = s.pick((length < here.least) | ~s.finite(length), w, here.best)
            least = s.smaller(length, here.least)
        numbers = (rho, alpha, omega, least, here.negative, broken, done)
        return best, w, r, here.shadow, p, v, *numbers


@final
class _Place(NamedTuple):
    """Where the recursion is; lengths are relative to the residual it began with."""

    best: Tensor
    w: Tensor
    r: Tensor
    shadow: Tensor
    p: Tensor
    v: Tensor
    rho: Number
    alpha: Number
    omega: Number
    least: Number
    negative: Number  # curvature is not looked at
    broken: Number

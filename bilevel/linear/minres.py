"""Minimal residuals for a symmetric operator, definite or not."""

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
class MINRES(Krylov):
    """Minimal residuals on `(A + damping I) w = b` with A symmetric, and indefinite if need be.

    The choice where conjugate gradients stop at negative curvature: the iterate with the least
    residual in the Krylov space, by recurrences with six vectors however many steps are taken.
    Negative curvature is no failure here, but it is reported: the lower variables are then at no
    minimum, and the implicit function theorem speaks of a stationary point. A singular system that has
    a solution is solved; where there is none, the result says so and the value is the best there is.
    So it does for a condition number above 1 / sqrt(epsilon), 3e3 in float32 and 7e7 in float64: the
    error of the iterate grows with its square. GMRES has no such limit.

    Args:
        max_steps: most steps, each one product with A.
        rtol: stop once |residual| <= rtol |b|; "auto" is the square root of the dtype's machine
            epsilon; `None` takes all steps as long as they help and calls that a success.
        damping: added to the diagonal of A.
        warm_start: start from the previous solution.
        check_every: steps between two looks at the residual, each of which waits for the device.

    Raises:
        ValueError: if a setting is out of range.

    Example:
        >>> A = torch.tensor([[2.0, 0.0], [0.0, -4.0]])
        >>> MINRES().solve(lambda v: A @ v, torch.tensor([2.0, 4.0])).value.round(decimals=5)
        tensor([ 1., -1.])

    References:
        Solution of Sparse Indefinite Systems of Linear Equations (Paige, Saunders, 1975),
        https://doi.org/10.1137/0712047. Differs from the paper in: passes start again from the true
        residual, and the signs of the pivots of the Lanczos matrix are watched.
    """

    needs_symmetry: ClassVar[bool] = True
    products: ClassVar[int] = 1
    defect: ClassVar[Result] = Result.SINGULAR

    def begin(self, s: Scalars, operator: Operator, r: Tensor) -> tuple[Any, ...]:
        still, zero = torch.zeros_like(r), s.zero(s.of(r[0]))
        one, no = zero + 1, s.false(zero)
        rotations = (-one, zero, zero, zero)
        return _Place(still, r, still, still, still, zero, *rotations, one, zero, one, no, no)

    def step(self, s: Scalars, operator: Operator, enough: Number, *state: Any) -> tuple[Any, ...]:
        here, eps = _Place(*state), torch.finfo(state[0].dtype).eps
        p = operator(here.v)
        alpha = s.of(torch.dot(here.v, p))
        p = p - s.times(alpha, here.v) - s.times(here.beta, here.before)
        beta = s.of(torch.linalg.vector_norm(p))
        with s.quiet():
            stopped = (here.length <= enough) | here.flat
            squares = alpha * alpha + here.beta * here.beta + beta * beta
            reach = s.larger(here.reach, s.root(squares))
            tiny = s.constant(10 * eps) * reach
            # beyond an invariant subspace there is rounding only
            beta = s.pick(beta <= tiny, s.zero(beta), beta)
            # a pivot that is rounding divides only what cannot be rounding
            unsure = (abs(here.pivot) <= tiny) & (here.beta <= s.constant(10 * eps**0.5) * reach)
            pivot = alpha - s.pick(unsure, s.zero(alpha), here.beta * here.beta / here.pivot)
            delta = here.cs * here.dbar + here.sn * alpha
            gbar = here.sn * here.dbar - here.cs * alpha
            dbar, epsilon = -here.cs * beta, here.sn * beta
            # |A r| / |r|, as small as the iterate's own error is then large: it grows as the square of
            # the condition number
            left = s.root(gbar * gbar + dbar * dbar)
            flat = here.flat | ((left <= s.constant(eps**0.5) * reach) & ~stopped)
            frozen = stopped | flat
            gamma = s.root(gbar * gbar + beta * beta)
            cs, sn = gbar / gamma, beta / gamma
            move = s.pick(frozen, s.zero(cs), cs * here.length)
            length = s.pick(frozen, here.length, sn * here.length)
            negative = here.negative | ((pivot < -tiny) & ~stopped)
            done = frozen | (length <= enough) | ~s.finite(length)
            shrink, onward = 1 / gamma, 1 / beta
        d = here.v - s.times(here.epsilon, here.older) - s.times(delta, here.old)
        d = s.times(shrink, d)
        w = s.pick(frozen, here.w, here.w + s.times(move, d))
        numbers = (beta, cs, sn, dbar, epsilon, length, reach, pivot, negative, flat, done)
        return w, s.times(onward, p), here.v, d, here.old, *numbers


@final
class _Place(NamedTuple):
    """Where the recursion is: the iterate, two Lanczos vectors, two directions, and numbers."""

    w: Tensor
    v: Tensor
    before: Tensor
    old: Tensor
    older: Tensor
    beta: Number
    cs: Number
    sn: Number
    dbar: Number
    epsilon: Number
    length: Number  # of the residual
    reach: Number  # at most |A|
    pivot: Number  # of the Lanczos matrix; one below 0 is negative curvature
    negative: Number
    flat: Number

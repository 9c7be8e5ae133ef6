"""Conjugate gradients on the normal equations, for any operator that knows its transpose."""

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, final

import torch
from torch import Tensor

from bilevel.arguments import explained_settings
from bilevel.errors import Result
from bilevel.linear.base import Operator, transposed
from bilevel.linear.krylov import Krylov
from bilevel.linear.scalars import Number, Scalars


@final
@explained_settings
@dataclass(frozen=True)
class NormalCG(Krylov):
    r"""Conjugate gradients on `B^T B w = B^T b` with `B = A + damping I`, A symmetric or not.

    Never breaks down and needs no definiteness: the residual falls with every step, and a singular
    system gets the solution of least norm, or of least squares if there is none (which the result
    says). The price is that the condition number counts squared: on a well-behaved system others are
    much faster. It needs products with the transposed matrix, the operator's attribute `transposed`.
    That of a loss's second derivative is itself; a lower level given by a condition has another one.

    Args:
        max_steps: most steps, each a product with A and one with its transpose.
        rtol: stop once |residual| <= rtol |b|; "auto" is the square root of the dtype's machine
            epsilon; `None` takes all steps as long as they help and calls that a success.
        damping: added to the diagonal of A (not of `A^T A`, as in some other libraries).
        warm_start: start from the previous solution.
        check_every: steps between two looks at the residual, each of which waits for the device.

    Raises:
        ValueError: if a setting is out of range.
        TypeError: in `solve`, if the operator has no `transposed`.

    Example:
        >>> A = torch.tensor([[0.0, 2.0], [-1.0, 0.0]])
        >>> product = lambda v: A @ v
        >>> product.transposed = lambda v: A.T @ v
        >>> NormalCG().solve(product, torch.tensor([2.0, 1.0])).value.round(decimals=5)
        tensor([-1.,  1.])

    References:
        Methods of Conjugate Gradients for Solving Linear Systems (Hestenes, Stiefel, 1952),
        https://doi.org/10.6028/jres.049.044, in the form known as CGLS: the residual that is kept is
        b - B w, and not that of the normal equations.
    """

    products: ClassVar[int] = 2
    defect: ClassVar[Result] = Result.SINGULAR

    def begin(self, s: Scalars, operator: Operator, r: Tensor) -> tuple[Any, ...]:
        z = transposed(operator, "NormalCG")(r)
        zz = s.of(torch.dot(z, z))
        no = s.false(zz)
        return _Place(torch.zeros_like(r), r, z, zz, s.zero(zz) + 1, s.zero(zz), no, no)

    def step(self, s: Scalars, operator: Operator, enough: Number, *state: Any) -> tuple[Any, ...]:
        here = _Place(*state)
        q = operator(here.p)
        qq, pp = s.of(torch.dot(q, q)), s.of(torch.dot(here.p, here.p))
        with s.quiet():
            stopped = (here.length <= enough) | here.flat
            reach = s.pick(stopped | (pp == 0), here.reach, s.larger(here.reach, qq / pp))
            # B^T r is rounding: nothing of r lies in the range of B
            noise = s.constant((10 * torch.finfo(q.dtype).eps) ** 2) * reach
            flat = here.flat | ((here.zz <= noise * here.length * here.length) & ~stopped)
            frozen = stopped | flat
            alpha = s.pick(frozen, s.zero(qq), here.zz / qq)
        w = s.pick(frozen, here.w, here.w + s.times(alpha, here.p))
        r = s.pick(frozen, here.r, here.r - s.times(alpha, q))
        z = transposed(operator, "NormalCG")(r)
        zz, length = s.of(torch.dot(z, z)), s.of(torch.linalg.vector_norm(r))
        with s.quiet():
            beta = zz / here.zz
            done = frozen | (length <= enough) | ~s.finite(length)
        return w, r, z + s.times(beta, here.p), zz, length, reach, here.negative, flat, done


@final
class _Place(NamedTuple):
    """Where the recursion is: the iterate, its residual, the direction, and what was seen so far."""

    w: Tensor
    r: Tensor
    p: Tensor
    zz: Number  # |B^T r|^2
    length: Number  # |r| relative to where the pass began
    reach: Number  # squared, of the largest |B p| / |p|
    negative: Number  # curvature is not looked at
    flat: Number

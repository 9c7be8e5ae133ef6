"""Conjugate gradients for a symmetric positive definite operator."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, final

import torch
from torch import Tensor

from bilevel.arguments import explained_settings
from bilevel.errors import Result
from bilevel.linear.base import (
    LinearSolution,
    LinearSolver,
    Operator,
    Preconditioner,
    check_rtol,
    damped,
    in_own_units,
    initial,
    iterated,
    refuse_no_system,
    tolerance,
)
from bilevel.linear.blockwise import solve_blocks
from bilevel.linear.scalars import Number, Scalars, bent_or_flat, scalars_for
from bilevel.refusals import callable_or_none, flag, positive, whole

if TYPE_CHECKING:
    from bilevel.oracles import Oracles


@final
@explained_settings
@dataclass(frozen=True)
class ConjugateGradient(LinearSolver):
    """Preconditioned conjugate gradients on `(A + damping I) w = b`.

    The recursion's residual drifts away from |b - A w| (in float32 by factors of thousands). So the
    true one is computed at the end, one product more; it is what is reported and tested. Where it
    has not arrived and steps are left, the iteration starts again from it, as long as that helps.

    Stops at the first direction p with p^T (A + damping I) p < 0 beyond rounding and returns the
    current iterate: the lower level is then not at a strict minimum and the system has no meaning
    as a best response. A direction that is flat to rounding ends the solve, too: the matrix is
    singular to working precision, and the iterate with the least residual is returned. In float32
    that includes matrices with a condition number above about 1e7.

    Args:
        max_steps: most steps, each one product with A.
        rtol: stop once |residual| <= rtol |b|; "auto" is the square root of the dtype's machine
            epsilon. `None` runs all `max_steps` steps (fewer if the residual becomes 0) and calls
            that a success: the truncated method on purpose.
        damping: added to the diagonal of A.
        preconditioner: r -> M r with M symmetric positive definite, close to the inverse of A; or one
            that is made from the matrix at every solve, such as `Nystrom(rank=20)`.
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

    needs_symmetry: ClassVar[bool] = True

    max_steps: int = 100
    rtol: float | str | None = "auto"
    damping: float = 0.0
    preconditioner: Callable[[Tensor], Tensor] | Preconditioner | None = None
    warm_start: bool = False
    check_every: int = 1

    def __post_init__(self) -> None:
        flag("warm_start", self.warm_start)
        if getattr(self.preconditioner, "prepared", self.preconditioner) is self.preconditioner:
            callable_or_none("preconditioner", self.preconditioner, "preconditioner(residual)")
        whole("max_steps", self.max_steps)
        positive("damping", self.damping, zero=True)
        whole("check_every", self.check_every)
        if self.rtol is not None:
            check_rtol(self.rtol)

    def separates(self) -> bool:
        return self.preconditioner is None

    def prepared(self, oracles: "Oracles") -> LinearSolver:
        inner = getattr(self.preconditioner, "prepared", None)
        return self if inner is None else replace(self, preconditioner=inner(oracles))

    def solve(
        self, operator: Operator, rhs: Tensor, *, guess: Tensor | None = None
    ) -> LinearSolution:
        refuse_no_system(operator, rhs)
        s = scalars_for(operator, rhs)
        goal = 0.0 if self.rtol is None else tolerance(self.rtol, rhs.dtype)
        key = type(self), self.damping, self.preconditioner, goal
        blocks = getattr(operator, "blocks", None)
        if blocks is not None and self.preconditioner is None:  # independent systems side by side
            return solve_blocks(
                blocks, self, goal, operator, rhs, guess if self.warm_start else None
            )
        warm = self.warm_start and guess is not None and guess.shape == rhs.shape
        given = (rhs, guess) if warm else (rhs,)
        made, spent = self._prepared(operator, rhs)
        begin = iterated(operator, ("begin", key), partial(self._begin, s, goal, warm))
        finish = iterated(operator, ("finish", key), partial(self._finish, s))
        unit, rhs, scale, *state, done = begin(*given, *made)
        here = _Place(*state)
        w, r, products = here.w, here.r, len(given) - 1 + spent
        steps, last, kept = 0, math.inf, None
        advance = iterated(operator, ("step", key), partial(self._step, s, goal))
        while True:
            here, walked = self._walk(
                advance, here, s.of(scale), done, self.max_steps - steps, made
            )
            steps += walked
            products += walked
            if walked:  # else the residual at the start is the true one already
                w, r = finish(rhs, scale, here.w, here.best, here.flat)
                products += 1
            residual = torch.linalg.vector_norm(r)
            # the one wait for the device at the end
            size, negative, flat = s.read(s.of(residual), here.negative, here.flat)
            if kept is not None and size > last:  # a restart that made it worse
                w, residual = kept
            result = self._result(min(size, last) if size == size else size, goal, negative, flat)
            helps = math.isfinite(size) and size < last / 2 and walked > 0
            if result is not Result.NOT_CONVERGED or steps >= self.max_steps or not helps:
                return LinearSolution(unit * w, result, residual, products, bool(negative))
            last, kept = size, (w, residual)
            here, done = self._place(s, goal, w, r, made)

    def _result(self, size: float, goal: float, negative: float, flat: float) -> Result:
        if not math.isfinite(size):
            return Result.NOT_FINITE
        if negative:
            return Result.NEGATIVE_CURVATURE
        if size <= goal:
            return Result.SUCCESS
        if flat:
            return Result.SINGULAR
        return Result.SUCCESS if self.rtol is None else Result.NOT_CONVERGED

    def _walk(
        self,
        advance: Callable[..., Any],
        here: "_Place",
        scale: Number,
        done: Number,
        most: int,
        made: tuple[Tensor, ...],
    ) -> "tuple[_Place, int]":
        """Steps of the recursion until it is done."""
        steps = 0
        while steps < most:
            if steps % self.check_every == 0 and bool(done):  # waits for the device
                break
            steps += 1
            *now, done = advance(scale, *here, *made)
            here = _Place(*now)
        return here, steps

    def _prepared(self, operator: Operator, rhs: Tensor) -> tuple[tuple[Tensor, ...], int]:
        """What the preconditioner is made of, and the products that took."""
        prepare = getattr(self.preconditioner, "prepare", None)
        found: tuple[tuple[Tensor, ...], int] = ((), 0)
        return found if prepare is None else prepare(operator, rhs, self.damping)

    def _conditioned(self, r: Tensor, made: tuple[Tensor, ...]) -> Tensor:
        """The product M r with the preconditioner."""
        if self.preconditioner is None:
            return r
        known: Any = self.preconditioner
        product: Tensor = known.apply(r, *made) if made else known(r)
        return product

    def _begin(
        self, s: Scalars, goal: float, warm: bool, operator: Operator, rhs: Tensor, *others: Tensor
    ) -> tuple[Any, ...]:
        """The right-hand side in its own units, and the recursion at its start."""
        guess, made = others[0] if warm else None, others[warm:]
        rhs, unit = in_own_units(rhs)
        w, r, _ = initial(damped(operator, self.damping), rhs, guess, unit)
        scale = torch.linalg.vector_norm(rhs).clamp_min(torch.finfo(rhs.dtype).tiny)
        here, done = self._place(s, goal, w, r / scale, made)
        return unit, rhs, scale, *here, done

    def _place(
        self, s: Scalars, goal: float, w: Tensor, r: Tensor, made: tuple[Tensor, ...]
    ) -> "tuple[_Place, Number]":
        """The recursion at the iterate w with residual r, and whether there is nothing to do."""
        z = self._conditioned(r, made)
        rz = s.of(torch.dot(r, z))
        length = self._length(s, r, rz)
        no = s.false(length)
        here = _Place(w, r, z, rz, length, w, length, s.zero(length), no, no)
        return here, (length <= self._enough(s, goal, r)) | ~s.finite(length)

    def _finish(
        self, s: Scalars, operator: Operator, rhs: Tensor, scale: Tensor, *found: Any
    ) -> tuple[Tensor, Tensor]:
        """The iterate that counts, of the last and the best one, and its true residual."""
        w, best, flat = found
        # before a flat direction shows, nearly flat ones have made the iterate large
        w = s.pick(flat, best, w)
        return w, (rhs - damped(operator, self.damping)(w)) / scale

    def _enough(self, s: Scalars, goal: float, r: Tensor) -> Any:
        """The residual at which to stop: below rounding the recursion says nothing about it."""
        return s.constant(max(goal, torch.finfo(r.dtype).eps))

    def _length(self, s: Scalars, r: Tensor, rz: Number) -> Number:
        """The norm of r; without a preconditioner, rz is its square."""
        return s.root(rz) if self.preconditioner is None else s.of(torch.linalg.vector_norm(r))

    def _step(
        self, s: Scalars, goal: float, operator: Operator, scale: Number, *place: Any
    ) -> tuple[Any, ...]:
        """A step of the recursion, and whether the next one would stop."""
        here, made = _Place(*place[: len(_Place._fields)]), place[len(_Place._fields) :]
        w, r, p = here.w, here.r, here.p
        eps = torch.finfo(r.dtype).eps
        enough = self._enough(s, goal, r)
        Ap = operator(p) + self.damping * p if self.damping else operator(p)
        curvature, pp = s.of(torch.dot(p, Ap)), s.of(torch.dot(p, p))
        stretched = s.of(torch.dot(Ap, Ap))
        with s.quiet():
            stopped = (here.length <= enough) | here.negative | here.flat
            reach = s.larger(here.reach, stretched / pp)
            bent, level = bent_or_flat(s, curvature, pp, stretched, reach, eps)
            negative, flat = here.negative | (bent & ~stopped), here.flat | (level & ~stopped)
            # alpha = 0 freezes the iterate: after such a direction, and at the solution, where the
            # recurrence would go on until it underflows
            frozen = stopped | negative | flat
            alpha = s.pick(frozen, s.zero(here.rz), here.rz / curvature)
            move = scale * alpha
        w = w + s.times(move, p)
        r = r - s.times(alpha, Ap)
        z = self._conditioned(r, made)
        rz = s.of(torch.dot(r, z))
        with s.quiet():
            length = self._length(s, r, rz)
            beta = s.pick(here.rz == 0, s.zero(rz), rz / here.rz)
            done = (length <= enough) | negative | flat | ~s.finite(length)
            best = s.pick(length < here.least, w, here.best)
            least = s.smaller(length, here.least)
        return w, r, z + s.times(beta, p), rz, length, best, least, reach, negative, flat, done


@final
class _Place(NamedTuple):
    """Where the recursion is: the iterate, its residual, the direction, and what was seen so far."""

    w: Tensor
    r: Tensor
    p: Tensor
    rz: Number
    length: Number
    best: Tensor
    least: Number
    reach: Number  # squared, of the largest |A p| / |p|: at most |A|
    negative: Number
    flat: Number

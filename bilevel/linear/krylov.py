"""`Krylov`: what iterations in a Krylov space share. A solver writes its beginning and one step."""

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from bilevel.errors import Result
from bilevel.linear.base import (
    LinearSolution,
    LinearSolver,
    Operator,
    check_rtol,
    damped,
    in_own_units,
    initial,
    iterated,
    outcome,
    refuse_no_system,
    relative,
    tolerance,
)
from bilevel.linear.scalars import Number, Scalars, scalars_for
from bilevel.refusals import flag, positive, whole


@dataclass(frozen=True)
class Krylov(LinearSolver):
    """Abstract base of solvers that walk through a Krylov space in passes, by short recurrences.

    A recursion's own residual drifts away from |b - A w|. So the true one is computed after every pass,
    one product more; it is what is tested and reported. Another pass starts from it as long as steps
    are left and the last one at least halved it. The iterate with the least residual is returned.

    Args:
        max_steps: most steps over all passes.
        rtol: stop once |residual| <= rtol |b|; "auto" is the square root of the dtype's machine
            epsilon; `None` takes all steps as long as they help and calls that a success.
        damping: added to the diagonal of A.
        warm_start: start from the previous solution.
        check_every: steps between two looks at the residual, each of which waits for the device.

    Attributes:
        products: products with A (or its transpose) that a step takes.
        defect: what is wrong where a recursion ends without having arrived.
    """

    products: ClassVar[int]
    defect: ClassVar[Result]

    max_steps: int = 100
    rtol: float | str | None = "auto"
    damping: float = 0.0
    warm_start: bool = False
    check_every: int = 1

    def __post_init__(self) -> None:
        flag("warm_start", self.warm_start)
        whole("max_steps", self.max_steps)
        positive("damping", self.damping, zero=True)
        whole("check_every", self.check_every)
        if self.rtol is not None:
            check_rtol(self.rtol)

    @abstractmethod
    def begin(self, s: Scalars, operator: Operator, r: Tensor) -> tuple[Any, ...]:
        """The state of the recursion for `A d = r`, at d = 0.

        Args:
            s: how numbers are kept.
            operator: v -> A v.
            r: what is left to solve, of length 1.

        Returns:
            Vectors and numbers. First the answer d, last whether negative curvature was met and
            whether the recursion has to end.
        """

    @abstractmethod
    def step(self, s: Scalars, operator: Operator, enough: Number, *state: Any) -> tuple[Any, ...]:
        """A step of the recursion; it does not look at values, and past the end it changes nothing.

        Args:
            s: how numbers are kept.
            operator: v -> A v.
            enough: the length of the residual at which to stop.
            *state: as `begin` returns it.

        Returns:
            The state, and as one more entry whether the next step would do nothing.
        """

    @final
    def solve(
        self, operator: Operator, rhs: Tensor, *, guess: Tensor | None = None
    ) -> LinearSolution:
        refuse_no_system(operator, rhs)
        s, system = scalars_for(operator, rhs), damped(operator, self.damping)
        step = partial(_on_damped, self.step, s, self.damping)
        advance = iterated(operator, (type(self), self.damping), step)
        rhs, unit = in_own_units(rhs)
        w, r, products = initial(system, rhs, guess if self.warm_start else None, unit)
        scale, eps = torch.linalg.vector_norm(rhs), torch.finfo(rhs.dtype).eps
        goal = 0.0 if self.rtol is None else tolerance(self.rtol, rhs.dtype)
        length = torch.linalg.vector_norm(r)
        residual = relative(length, scale)
        size = float(residual)  # waits for the device, as every pass does
        steps, most, negative, ended = 0, self.max_steps, False, False
        while most > 0 and goal < size < math.inf:
            start = self.begin(s, system, r / length)
            enough = s.zero(s.of(length)) + max(goal / size, eps)
            found, walked = _walk(partial(advance, enough), start, most, self.check_every)
            steps, products = steps + walked, products + self.products * walked + 1
            bent, over = s.read(*found[-2:])
            negative, ended = negative or bool(bent), ended or bool(over)
            new = w + length * found[0]
            missing = rhs - system(new)
            now = float(relative(torch.linalg.vector_norm(missing), scale))
            if not now < size:  # rounding has grown large on the way: go half of it
                most = walked // 2
            elif now < size / 2 and not (over and self.defect is Result.SINGULAR):
                most = self.max_steps
            else:  # where nothing of r lies in the range of A a pass would walk through rounding
                most = 0
            most = min(most, self.max_steps - steps)
            if now < size or math.isnan(now):  # a NaN must be seen
                w, r, size, length = new, missing, now, torch.linalg.vector_norm(missing)
                residual = relative(length, scale)
        result = outcome(residual, None if self.rtol is None else goal)
        if ended and result is not Result.NOT_FINITE and size > (goal or eps**0.5):
            result = self.defect
        return LinearSolution(unit * w, result, residual, products, negative)


def _on_damped(
    step: Callable[..., Any], s: Scalars, damping: float, operator: Operator, *numbers: Any
) -> Any:
    return step(s, damped(operator, damping), *numbers)


def _walk(
    advance: Callable[..., Any], state: tuple[Any, ...], most: int, check_every: int
) -> tuple[tuple[Any, ...], int]:
    """Steps of a recursion until it says that it is done; the state it ended in, and their number."""
    steps, done = 0, False
    while steps < most and not (steps % check_every == 0 and bool(done)):
        *now, done = advance(*state)
        state, steps = tuple(now), steps + 1
    return state, steps

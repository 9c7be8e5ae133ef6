"""`LinearSolver`: solve `A w = b` from products with `A` alone."""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, TypeAlias, final

import torch
from torch import Tensor

from bilevel.errors import Result
from bilevel.refusals import positive, shown

if TYPE_CHECKING:
    from bilevel.oracles import Oracles

Operator: TypeAlias = Callable[[Tensor], Tensor]


@final
class LinearSolution(NamedTuple):
    """What a linear solver returns; on failure `value` is the best iterate it can offer.

    Attributes:
        value: the solution w, shape (n,).
        result: how the solve ended. A solver with a tolerance says `SUCCESS` only if `residual`
            meets it.
        residual: relative residual |b - A w| / |b| of `value`, computed from `value` itself and not
            by a recursion; `None` if it was not computed.
        num_products: number of products with A, those for the residual included.
        negative_curvature: whether a direction p with p^T A p < 0, beyond rounding, was met.
        note: what the solver can say of a failure in numbers, a sentence; empty if nothing.
    """

    value: Tensor
    result: Result
    residual: Tensor | None
    num_products: int
    negative_curvature: bool = False
    note: str = ""


class LinearSolver(ABC):
    """Abstract base of the linear solvers; each is a frozen record of its settings.

    Attributes:
        warm_start: whether a solve starts from the previous solution.
        approximate: whether the answer is not the solution on purpose, however long the solver runs.
        needs_symmetry: whether the answer means nothing where A is not symmetric.
    """

    warm_start: bool = False
    approximate: ClassVar[bool] = False
    needs_symmetry: ClassVar[bool] = False

    def separates(self) -> bool:
        """Whether systems side by side, a block diagonal matrix, are solved as each would be alone."""
        return False

    @abstractmethod
    def solve(
        self, operator: Operator, rhs: Tensor, *, guess: Tensor | None = None
    ) -> LinearSolution:
        """Solve `operator(w) = rhs`.

        Args:
            operator: v -> A v on vectors of shape (n,).
            rhs: right-hand side b, shape (n,).
            guess: where to start, used if `warm_start` is on and if it is better than zero.

        Returns:
            The solution and how the solve ended.
        """

    def unwatched(self) -> Callable[[Operator, Tensor, list[Tensor]], LinearSolution] | None:
        """The same without a look at values, short enough for one graph; `None` if there is no such.

        `(operator, rhs, sure) -> solution`. To the list it appends a truth value: whether `solve` would
        have ended like this, with a success.
        """
        return None

    def prepared(self, oracles: "Oracles") -> "LinearSolver":
        """The solver for one linearization of the lower level.

        Args:
            oracles: the problem at its current variables, for a solver that looks at more than products.
        """
        return self


class Preconditioner(Protocol):
    """A preconditioner that is made from the matrix, once for a solve."""

    def prepare(
        self, operator: Operator, like: Tensor, damping: float
    ) -> tuple[tuple[Tensor, ...], int]:
        """What it is made of for `A + damping I`, and how many products with A that took."""

    def apply(self, r: Tensor, *made: Tensor) -> Tensor:
        """The product M r; it does not look at values."""


def refuse_no_system(operator: Any, rhs: Any) -> None:
    """Refuse what is no linear system: a matrix for its products, anything but a vector of reals.

    Raises:
        TypeError: if the operator is no function, or the right-hand side no vector of floating point.
    """
    if not callable(operator):
        raise TypeError(
            f"`operator` must be a function v -> A v, got {shown(operator)}; give `lambda v: A @ v`"
        )
    if not isinstance(rhs, Tensor) or rhs.ndim != 1 or not rhs.is_floating_point():
        got = f"{rhs.dtype} of shape {tuple(rhs.shape)}" if isinstance(rhs, Tensor) else shown(rhs)
        raise TypeError(
            f"`rhs` must be a floating-point tensor of shape (n,), got {got}; make it one with "
            "`torch.as_tensor(rhs).double().flatten()`"
        )


def check_rtol(rtol: float | str) -> None:
    """Refuse a tolerance that is neither a positive number nor "auto"."""
    if not isinstance(rtol, str):
        positive("rtol", rtol)
    elif rtol != "auto":
        raise ValueError(f'`rtol` must be a number, "auto" or None, got {rtol!r}')


def tolerance(rtol: float | str, dtype: torch.dtype) -> float:
    """The number that `rtol` stands for; "auto" is the square root of the machine epsilon.

    That is 1.5e-8 in float64 and 3.5e-4 in float32. A residual cannot be computed more exactly than
    to about epsilon times |A| |w| / |b|, which grows up to epsilon times the condition number: at a
    condition of 1e12, "auto" is out of reach in float32 always and in float64 for most b.
    """
    return torch.finfo(dtype).eps ** 0.5 if isinstance(rtol, str) else rtol


def relative(residual: Tensor, scale: Tensor) -> Tensor:
    """`residual / scale`, and 0 where both are 0 (a zero right-hand side is solved by zero)."""
    return residual / scale.clamp_min(torch.finfo(scale.dtype).tiny)


def in_own_units(rhs: Tensor) -> tuple[Tensor, Tensor]:
    """A right-hand side with entries up to 2, and the unit it is measured in, a power of 2.

    The squares of a small gradient underflow (in float32 below 1e-22), and a residual made of them
    would be 0 wherever the solution lies. A power of 2 changes no digit.
    """
    largest = rhs.abs().amax().clamp_min(torch.finfo(rhs.dtype).tiny)
    unit = largest.log2().floor().exp2()
    return rhs / unit, unit


def damped(operator: Operator, damping: float) -> Operator:
    """The operator `A + damping I`."""
    return Damped(operator, damping) if damping else operator


@final
class Damped:
    """The operator `A + damping I` itself.

    Args:
        operator: v -> A v.
        damping: added to the diagonal.
    """

    def __init__(self, operator: Operator, damping: float) -> None:
        self._operator = operator
        self._damping = damping

    def __call__(self, vector: Tensor) -> Tensor:
        """Product with a vector of shape (n,)."""
        return self._operator(vector) + self._damping * vector

    @property
    def transposed(self) -> "Damped":
        """The transpose, if the operator has one; otherwise there is no such attribute."""
        back: Operator = self._operator.transposed  # type: ignore[attr-defined]
        return self if back is self._operator else Damped(back, self._damping)


def transposed(operator: Operator, solver: str) -> Operator:
    """Products with the transposed matrix, if the operator has them (`operator.transposed`).

    Raises:
        TypeError: if it has none, saying how to give it.
    """
    found: Operator | None = getattr(operator, "transposed", None)
    if found is None:
        raise TypeError(
            f"`{solver}` needs products with the transposed matrix, and this operator has no attribute "
            "`transposed`; set it (`operator.transposed = lambda v: A.T @ v`, or `= operator` for a "
            "symmetric one), or use `GMRES` or `BiCGStab`, which need none"
        )
    return found


def iterated(operator: Operator, key: Hashable, step: Callable[..., Any]) -> Callable[..., Any]:
    """`step(operator, *tensors) -> tensors`, to be called many times with tensors of the same kinds.

    In one piece, product and all, if the operator knows how (`operator.iterate`).

    Args:
        operator: v -> A v.
        key: all that the step depends on besides its arguments.
        step: a function that does not look at values.
    """
    iterate = getattr(operator, "iterate", None)
    run: Callable[..., Any] = iterate(key, step) if iterate else partial(step, operator)
    return run


def dense(operator: Operator, like: Tensor) -> Tensor:
    """The operator as a matrix; `like` is any vector it takes.

    All columns at once if the operator knows how (`operator.matrix()`), else one product for each.
    """
    matrix = getattr(operator, "matrix", None)
    if matrix is not None:
        with contextlib.suppress(RuntimeError):  # an operation without a batched derivative
            whole: Tensor = matrix()
            return whole
    eye = torch.eye(like.numel(), dtype=like.dtype, device=like.device)
    return torch.stack([operator(column) for column in eye], dim=1)


def outcome(residual: Tensor, rtol: float | None) -> Result:
    """How a solve with this relative residual ended; without `rtol` any finite one will do."""
    if not bool(residual.isfinite()):
        return Result.NOT_FINITE
    return Result.SUCCESS if rtol is None or residual <= rtol else Result.NOT_CONVERGED


def initial(
    operator: Operator, rhs: Tensor, guess: Tensor | None, unit: Tensor
) -> tuple[Tensor, Tensor, int]:
    """Where to start, for a right-hand side in its own units: iterate, its residual, products used.

    A guess that is worse than zero (the problem has moved on, or the last solve failed) is dropped;
    the comparison stays on the device.
    """
    if guess is None or guess.shape != rhs.shape:
        return torch.zeros_like(rhs), rhs, 0
    guess = guess / unit
    residual = rhs - operator(guess)
    better = torch.linalg.vector_norm(residual) < torch.linalg.vector_norm(rhs)
    zero = torch.zeros_like(rhs)
    return torch.where(better, guess, zero), torch.where(better, residual, rhs), 1

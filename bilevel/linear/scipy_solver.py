"""Any solver of SciPy's for sparse systems, or one called as those are."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from bilevel.arguments import explained_settings
from bilevel.linear.base import (
    LinearSolution,
    LinearSolver,
    Operator,
    check_rtol,
    in_own_units,
    outcome,
    refuse_no_system,
    relative,
    tolerance,
)
from bilevel.refusals import flag, shown


@final
@explained_settings
@dataclass(frozen=True)
class SciPy(LinearSolver):
    """A function that takes a `scipy.sparse.linalg.LinearOperator` and a right-hand side.

    What SciPy has and this library has not (LSMR, LGMRES, QMR), or a solver of your own in NumPy. It
    runs on the processor: from a GPU every product is a round trip, and the solver waits for each.

    Args:
        function: `function(operator, b, **options)` returns the solution, or a tuple that begins with
            it.
        rtol: stop once |residual| <= rtol |b|: given to the function as `rtol` (`atol` and `btol` for
            LSMR and LSQR) if it has that argument, and tested afterwards on the true residual. "auto"
            is the square root of the dtype's machine epsilon. `None` leaves the function its own, and
            any answer better than zero is a success.
        options: further arguments, such as `{"maxiter": 50}`; also a smaller `rtol` for functions whose
            own is relative to |A| |w| (MINRES, LSMR, LSQR).
        warm_start: start from the previous solution; the function must have an argument `x0`.

    Raises:
        TypeError: if `function` is no function, or its answer is no vector of n numbers.
        ValueError: if a setting is out of range, or (with `warm_start`) there is no `x0`.

    Example:
        >>> import scipy.sparse.linalg
        >>> solver = SciPy(scipy.sparse.linalg.minres, rtol=1e-10)
        >>> solver.solve(lambda v: 2 * v, torch.ones(2, dtype=torch.double)).value
        tensor([0.5000, 0.5000], dtype=torch.float64)
    """

    function: Callable[..., Any]
    rtol: float | str | None = "auto"
    options: Mapping[str, Any] = field(default_factory=dict)
    warm_start: bool = False

    def __post_init__(self) -> None:
        if not callable(self.function) or isinstance(self.function, type):
            raise TypeError(
                "`function` must be one of `scipy.sparse.linalg`, or called as they are, got "
                f"{shown(self.function)}"
            )
        if self.rtol is not None:
            check_rtol(self.rtol)
        if not isinstance(self.options, Mapping):
            raise TypeError(
                "`options` must be a dictionary of further arguments of the function, such as "
                f'`{{"maxiter": 50}}`, got {shown(self.options)}'
            )
        if flag("warm_start", self.warm_start) and "x0" not in self._takes():
            raise ValueError("`warm_start` needs a function with an argument `x0`; leave it out")

    def __hash__(self) -> int:
        return hash((self.function, self.rtol, self.warm_start))

    def solve(
        self, operator: Operator, rhs: Tensor, *, guess: Tensor | None = None
    ) -> LinearSolution:
        refuse_no_system(operator, rhs)
        from scipy.sparse.linalg import LinearOperator

        b, unit = in_own_units(rhs)
        n, kind = len(b), b.dtype if b.dtype in (torch.float32, torch.float64) else torch.float32
        count = 0

        def plain(vector: Tensor) -> Any:
            return vector.detach().to("cpu", kind).numpy()

        def through(product: Operator) -> Callable[[Any], Any]:
            def call(vector: Any) -> Any:
                nonlocal count
                count += 1
                return plain(product(torch.as_tensor(np.array(vector).reshape(n)).to(b)))

            return call

        products = {"matvec": through(operator)}
        if (back := getattr(operator, "transposed", None)) is not None:
            products["rmatvec"] = through(back)
        target = plain(b)
        system = LinearOperator((n, n), dtype=target.dtype, **products)
        keywords = dict(self.options)
        rtol = None if self.rtol is None else tolerance(self.rtol, kind)
        if rtol is not None:
            names = ["rtol"] if "rtol" in self._takes() else ["atol", "btol"]
            keywords = dict.fromkeys([x for x in names if x in self._takes()], rtol) | keywords
        if self.warm_start and guess is not None and guess.shape == rhs.shape:
            keywords["x0"] = plain(guess / unit)
        found = self.function(system, target, **keywords)
        w = torch.as_tensor(np.array(found[0] if isinstance(found, tuple) else found)).to(b)
        if w.shape != b.shape:
            raise TypeError(
                f"`function` must return a vector of shape ({n},), as its second "
                f"argument is, or a tuple that begins with one, got shape {tuple(w.shape)}"
            )
        residual = relative(torch.linalg.vector_norm(b - operator(w)), torch.linalg.vector_norm(b))
        nearly = 1 - torch.finfo(b.dtype).eps ** 0.5
        result = outcome(residual, nearly if rtol is None else rtol)
        return LinearSolution(unit * w, result, residual, count + 1)

    def _takes(self) -> Mapping[str, Any]:
        return inspect.signature(self.function).parameters

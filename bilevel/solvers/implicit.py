r"""`Implicit`: the best-response Jacobian by the implicit function theorem.

At a lower solution $\partial_y G(x, y^*) = 0$. Differentiating in $x$,

$$ \partial^2_{yy} G \, \frac{dy^*}{dx} + \partial^2_{yx} G = 0, \qquad
   \Big(\frac{dy^*}{dx}\Big)^{\!\top} v = - (\partial^2_{yx} G)^\top w
   \quad\text{with}\quad (\partial^2_{yy} G)^\top w = v . $$

One linear system, one cross product. The formula holds at a lower solution only: its error is of the
order of the lower residual, which `stats` reports.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, TypeAlias, final

import torch
from torch import Tensor

from bilevel.arguments import explained_settings
from bilevel.linear import ConjugateGradient, LinearSolution, LinearSolver
from bilevel.linear.base import Operator, in_own_units, outcome, relative
from bilevel.linearization import Linearization, refuse_asymmetric
from bilevel.optimizers import Optimizers
from bilevel.oracles import Oracles
from bilevel.refusals import whole
from bilevel.solvers.base import AtOnce, Response, ResponseProduct, Solver
from bilevel.tree import Tree

LinearFunction: TypeAlias = Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]


@final
@dataclass(frozen=True)
class _Given(LinearSolver):
    """A function of the user's own that solves a linear system."""

    function: LinearFunction

    def solve(
        self, operator: Operator, rhs: Tensor, *, guess: Tensor | None = None
    ) -> LinearSolution:
        value = self.function(operator, rhs)
        if not isinstance(value, Tensor) or value.shape != rhs.shape:
            got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
            raise TypeError(
                f"`linear_solver` must return a vector of shape {tuple(rhs.shape)}, as its second "
                f"argument is, got {got}"
            )
        own, unit = in_own_units(rhs)
        missing = torch.linalg.vector_norm(own - operator(value / unit))
        residual = relative(missing, torch.linalg.vector_norm(own))
        # truncated on purpose or not, an answer must be better than zero, which leaves exactly |b|
        nearly = 1 - torch.finfo(rhs.dtype).eps ** 0.5
        return LinearSolution(value, outcome(residual, nearly), residual, num_products=1)


def as_linear_solver(given: Any) -> LinearSolver:
    """The linear solver that was given, or one that is a function of the user's own.

    Raises:
        TypeError: if it is neither.
    """
    if isinstance(given, type):  # callable, as a function of the user's own is
        name = given.__name__
        raise TypeError(f"`linear_solver` is the class `{name}`; give an instance, `{name}()`")
    if isinstance(given, LinearSolver):
        return given
    if not callable(given):
        raise TypeError(
            "`linear_solver` must be a `LinearSolver` or a function `(operator, rhs) -> "
            f"solution`, got {given!r}"
        )
    return _Given(given)


@final
@explained_settings
@dataclass(frozen=True)
class Implicit(Solver):
    """Implicit differentiation with a linear solver of choice.

    Of several lower batches, the lower loss is the mean: gradient, Hessian and cross product are
    averaged over them.

    Args:
        linear_solver: `ConjugateGradient`, `MINRES`, `GMRES`, `BiCGStab`, `NormalCG`, `FixedPoint`,
            `Nystrom`, `KFAC`, `EKFAC`, `Neumann`, `Identity`, `Cholesky`, `SciPy`, or a function
            `(operator, rhs) -> solution` on vectors of shape (n,). The residual of a function's
            answer is computed and reported; how small it must be is the function's own business, so
            every answer better than zero (a relative residual below 1) is a success.
        lower_batches: how many fresh lower batches `train` draws for one hypergradient, where the lower
            level has data of its own.

    Raises:
        TypeError: if `linear_solver` is neither, or its answer is not a vector.

    Example:
        >>> Implicit(ConjugateGradient(max_steps=20, damping=0.1)).linear_solver.damping
        0.1

    References:
        Optimizing Millions of Hyperparameters by Implicit Differentiation (Lorraine, Vicol,
        Duvenaud, 2020), https://arxiv.org/abs/1911.02590, Theorem 1.
    """

    linear_solver: LinearSolver | LinearFunction = field(default_factory=ConjugateGradient)
    lower_batches: int = 1

    def __post_init__(self) -> None:
        as_linear_solver(self.linear_solver)
        whole("lower_batches", self.lower_batches)

    def __repr__(self) -> str:
        more = "" if self.lower_batches == 1 else f", lower_batches={self.lower_batches}"
        return f"{type(self).__name__}(linear_solver={self.linear_solver!r}{more})"

    def num_lower_batches(self) -> int:
        return self.lower_batches

    def approximates(self) -> bool:
        return as_linear_solver(self.linear_solver).approximate

    def separates(self) -> bool:
        return as_linear_solver(self.linear_solver).separates()

    def context(self, oracles: Oracles) -> AbstractContextManager[None]:
        return oracles.differentiated_twice(type(self).__name__)

    def rehearse(self, oracles: Oracles) -> None:
        self._prepared(oracles, None)

    def _prepared(self, oracles: Oracles, linear: Linearization | None) -> LinearSolver:
        """The linear solver for the lower level as it is here, if it suits it."""
        solver = as_linear_solver(self.linear_solver)
        if solver.needs_symmetry and oracles.problem.gives_lower_condition:
            linear = linear or oracles.linearize_lower(oracles.upper, oracles.lower)
            refuse_asymmetric(linear, type(solver).__name__, type(oracles.problem).__name__)
        return solver.prepared(oracles)

    def respond(self, oracles: Oracles, state: Any, lower_optimizer: Optimizers | None) -> Response:
        linear = oracles.linearize_lower(oracles.upper, oracles.lower)
        solver = self._prepared(oracles, linear)

        def solve(operator: Operator, rhs: Tensor) -> LinearSolution:
            return solver.solve(operator, rhs, guess=state)

        return _solved(oracles, linear, solve, warm_start=solver.warm_start)

    def at_once(
        self, oracles: Oracles, state: Any, lower_optimizer: Optimizers | None
    ) -> AtOnce | None:
        solve = as_linear_solver(self.linear_solver).unwatched()
        if solve is None or oracles.problem.gives_lower_condition:
            return None

        def respond(here: Oracles, given: Any, sure: list[Tensor]) -> Response:
            linear = here.linearize_lower(here.upper, here.lower)
            return _solved(here, linear, lambda operator, rhs: solve(operator, rhs, sure))

        return AtOnce((type(self), self.linear_solver), (), respond)


def _solved(
    oracles: Oracles,
    linear: Linearization,
    solve: Callable[[Operator, Tensor], LinearSolution],
    *,
    warm_start: bool = False,
) -> Response:
    """The response, with a solver of the linear system."""

    def vjp(cotangent: Tree) -> ResponseProduct:
        rhs = linear.layout.ravel(list(cotangent.values()))
        solution = solve(linear.hessian, rhs)
        product = {name: -g for name, g in linear.cross(solution.value).items()}
        return ResponseProduct(
            product,
            result=solution.result,
            linear_residual=solution.residual,
            negative_curvature=solution.negative_curvature,
            num_products=solution.num_products,
            state=solution.value if warm_start else None,
            note=solution.note,
        )

    return Response(oracles.lower, vjp, lower_residual=linear.residual)

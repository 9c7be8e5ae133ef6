"""`best_response` and `hyperobjective`: the lower solution as a differentiable layer."""

import functools
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from bilevel.distributed import world_size
from bilevel.linear import GMRES, ConjugateGradient, LinearSolver
from bilevel.losses.purity import examine, examined
from bilevel.losses.substitution import attentive
from bilevel.lower.condition import Condition, Point, responding
from bilevel.lower.level import LowerLevel, LowerSolver, checked_solver
from bilevel.oracles import Oracles
from bilevel.problem import Problem
from bilevel.refusals import SEEDS, a_tensor, nearest, positive, whole
from bilevel.solvers.implicit import LinearFunction, as_linear_solver
from bilevel.tree import Tree

_NAME = "best_response"

P = ParamSpec("P")
T = TypeVar("T")


def _never_traced(function: Callable[P, T]) -> Callable[P, T]:
    """`torch.compiler.disable`, whose import takes seconds, for when somebody compiles."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        dynamo = sys.modules.get("torch._dynamo")
        run = function if dynamo is None else dynamo.disable(function)
        answer: T = run(*args, **kwargs)
        return answer

    call._torchdynamo_disable = True  # type: ignore[attr-defined]
    return call


@_never_traced
def best_response(
    problem: Problem,
    batch: Any = None,
    *,
    upper: Mapping[str, Tensor] | None = None,
    solve: LowerSolver = LowerLevel.solution,
    linear_solver: LinearSolver | LinearFunction | None = None,
    tolerance: float | None = 1e-3,
    seed: int = 0,
) -> Tree:
    r"""The lower solution $y^*(x)$ as tensors that autograd can differentiate, in any torch program.

    The answer is part of the graph of every tensor that the lower loss depends on and that requires
    grad: the problem's upper variables or the tensors given in their places, tensors of the batch,
    and whatever else the loss reaches (a network it closes over). Its derivative is that of the
    implicit function theorem,

    $$ \frac{dy^*}{dx} = - \big(\partial^2_{yy} G\big)^{-1} \partial^2_{yx} G, $$

    computed in the backward pass by one linear solve; gradients of gradients are right, too. The
    solver that found $y^*$ is not differentiated, and $y^*$ has no derivative in where it started.
    Under `torch.no_grad()` the numbers are the same, without a graph.

    Args:
        problem: the problem; it is left as it was.
        batch: batch of the lower loss.
        upper: tensors in the places of upper variables, by name, such as outputs of a network; the
            other upper variables are the problem's own.
        solve: solves the lower level: a function of a `LowerLevel` that returns y in any form. By
            default in closed form where the problem has one, else by L-BFGS and Newton steps.
        linear_solver: solves the system of the backward pass, as in `Implicit`;
            `ConjugateGradient()` by default, `GMRES()` for a condition or with constraints.
        tolerance: a warning is given if the lower gradient that is left at y exceeds this fraction of
            what it is without y (|Hy|) or at the start; `None` to look at nothing.
        seed: seed of the random numbers drawn inside the loss (dropout masks).

    Returns:
        The lower variables by name.

    Raises:
        ValueError: if `upper` has unknown names, or another shape, dtype or device than a variable; if
            the answer of `solve` does not fit or is not finite; if a variable belongs to both levels.
        TypeError: if `solve` is no function or its answer is neither dict nor tensor nor array.
        HypergradientError: in the backward pass, if the linear solver did not succeed.
        RuntimeError: inside `torch.func` transforms, in `torch.inference_mode()`, or with several
            processes.

    Example:
        >>> problem = Problem.from_functions(
        ...     lambda x, y, _: y["y"].sum(), lambda x, y, _: (y["y"] ** 2 - x["x"]).square().sum(),
        ...     {"x": torch.tensor([4.0])}, {"y": torch.tensor([1.0])},
        ... )
        >>> x = torch.tensor([9.0], requires_grad=True)
        >>> y = best_response(problem, upper={"x": x})["y"]  # a square root
        >>> slope, = torch.autograd.grad(y.sum(), x, create_graph=True)
        >>> curvature, = torch.autograd.grad(slope.sum(), x)
        >>> [round(t.item(), 3) for t in (y, 6 * slope, 108 * curvature)]
        [3.0, 1.0, -1.0]

    References:
        Efficient and Modular Implicit Differentiation (Blondel et al., 2022),
        https://arxiv.org/abs/2105.15183, section 2. Differs from the paper in: the backward pass is
        differentiable to any order.
    """
    oracles, given = _bound(problem, batch, upper, seed)
    return _layer(oracles, given, solve, linear_solver, tolerance)


@_never_traced
def hyperobjective(
    problem: Problem,
    upper_batch: Any = None,
    lower_batch: Any = None,
    *,
    upper: Mapping[str, Tensor] | None = None,
    solve: LowerSolver = LowerLevel.solution,
    linear_solver: LinearSolver | LinearFunction | None = None,
    tolerance: float | None = 1e-3,
    seed: int = 0,
) -> Tensor:
    r"""The upper loss at the lower solution, $\Phi(x) = F(x, y^*(x))$, a scalar with its graph.

    Its gradient is the hypergradient, its Hessian-vector products are those of $\Phi$:

        value = hyperobjective(problem, ...)
        gradient = torch.autograd.grad(value, x, create_graph=True)

    Args:
        problem: the problem; it is left as it was.
        upper_batch: batch of the upper loss.
        lower_batch: batch of the lower loss.
        upper: as for `best_response`, and so are the others.
        solve: see there.
        linear_solver: see there.
        tolerance: see there.
        seed: see there.

    Raises:
        ValueError: as `best_response`.
        TypeError: as `best_response`.
        RuntimeError: as `best_response`.

    Example:
        >>> problem = Problem.from_functions(
        ...     lambda x, y, _: y["y"].square().sum(), lambda x, y, _: (y["y"] - x["x"].exp()).cosh(),
        ...     {"x": torch.tensor(0.0)}, {"y": torch.tensor(0.0)},
        ... )
        >>> x = problem.upper.x
        >>> slope, = torch.autograd.grad(hyperobjective(problem), x, create_graph=True)
        >>> curvature, = torch.autograd.grad(slope, x)  # of exp(2x)
        >>> round(slope.item(), 3), round(curvature.item(), 3)
        (2.0, 4.0)
    """
    oracles, given = _bound(problem, lower_batch, upper, seed)
    lower = _layer(oracles, given, solve, linear_solver, tolerance)
    with attentive, oracles.differentiated_twice("hyperobjective"):
        return oracles.on(upper_batch, [lower_batch]).evaluate("upper", given, lower).loss


def _bound(
    problem: Problem, batch: Any, upper: Mapping[str, Tensor] | None, seed: int
) -> tuple[Oracles, Tree]:
    """The problem at the upper variables that count, and those with their graphs."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise RuntimeError(
            f"`{_NAME}` works with `torch.autograd.grad` and `.backward()`, not inside `torch.func` "
            "transforms; use `hypergradients` for several problems at once, and "
            "`torch.autograd.functional` for Jacobians"
        )
    if world_size() > 1:
        raise RuntimeError(
            f"`{_NAME}` belongs to one process, but {world_size()} train together; let `train` solve "
            "the lower level, which averages over them"
        )
    oracles = Oracles(problem, None, [batch], seed=whole("seed", seed, *SEEDS))
    name = type(problem).__name__
    if oracles.shared:
        raise ValueError(
            f"`{next(iter(oracles.shared))}` belongs to both levels of `{name}`: a lower solution does "
            "not depend on where its own variables started, so there is nothing to differentiate; "
            "use `Unrolled` for what a few steps from there give"
        )
    own = oracles.slots.variables("upper")
    given = dict(own)
    for key, value in ({} if upper is None else upper).items():
        if key not in own:
            raise ValueError(f"`{name}` has no upper variable `{key}`; {nearest(str(key), own)}")
        a_tensor(f"upper[{key!r}]", value)
        _refuse_misfit(key, value, own[key])
        given[key] = value
    return oracles.at(given, oracles.lower), given


def _refuse_misfit(name: str, value: Tensor, variable: Tensor) -> None:
    """Refuse a tensor that cannot stand in the place of a variable."""
    for what, got, wanted in (
        ("shape", tuple(value.shape), tuple(variable.shape)),
        ("dtype", value.dtype, variable.dtype),
        ("device", value.device, variable.device),
    ):
        if got != wanted:
            raise ValueError(
                f"`upper[{name!r}]` has {what} {got}, but the upper variable has {wanted}; convert it "
                f"({'`.reshape`' if what == 'shape' else '`.to`'} keeps the graph)"
            )


def _layer(
    oracles: Oracles,
    given: Tree,
    solve: LowerSolver,
    linear_solver: LinearSolver | LinearFunction | None,
    tolerance: float | None,
) -> Tree:
    problem = oracles.problem
    symmetric = not (problem.gives_lower_condition or problem.constrains_lower)
    usual = ConjugateGradient() if symmetric else GMRES()
    linear = as_linear_solver(usual if linear_solver is None else linear_solver)
    checked_solver("solve", solve)
    if tolerance is not None:
        positive("tolerance", tolerance)
    with attentive, oracles.differentiated_twice(_NAME):
        with torch.enable_grad():
            if not examined(oracles.problem, ["lower"]):
                examine(oracles, ["lower"], whole=True)
            level = LowerLevel(oracles)
            solution = level.tree(solve(level))
        system = Condition(oracles, linear, given)
        vector = system.layout.ravel(list(solution.values()))
        point = system.begin(vector)
        if tolerance is not None:
            _remark(oracles, level, point, vector, tolerance)
    if torch.is_grad_enabled() and system.inputs:
        vector = responding(system, vector)
    return dict(zip(oracles.lower, system.layout.unravel(vector), strict=True))


def _remark(
    oracles: Oracles, level: LowerLevel, point: "Point", y: Tensor, tolerance: float
) -> None:
    """Warn if the lower level is not solved."""
    gradient = point.layout.ravel([g.detach() for g in point.gradient])
    left = torch.linalg.vector_norm(gradient)
    if not bool(left.isfinite()):
        raise ValueError(
            f"the lower gradient of `{type(oracles.problem).__name__}` is NaN or infinite at the "
            "solution that was given; look at the lower loss there"
        )
    eps = torch.finfo(y.dtype).eps ** 0.5
    ahead = y + eps * gradient / left.clamp_min(torch.finfo(y.dtype).tiny)  # for a solution at 0
    scale = torch.linalg.vector_norm(point.hessian(ahead))
    if bool(left <= tolerance * scale):
        return
    start = level.gradient(level.start)
    first = torch.linalg.vector_norm(point.layout.ravel(list(start.values())))
    if bool(left <= tolerance * torch.maximum(first, scale)):
        return
    share = float(left / torch.maximum(first, scale))
    warnings.warn(
        f"the lower level of `{type(oracles.problem).__name__}` is not solved: {share:.1e} of its "
        f"gradient is left (norm {float(left):.1e}), and derivatives of the solution are off by "
        "about that times the condition number of the lower Hessian; let `solve` take more steps, or "
        f"raise `tolerance` ({tolerance:g}) if the answer can bear it",
        RuntimeWarning,
        stacklevel=_outside(),
    )


def _outside() -> int:
    """The `stacklevel` of the caller of this file."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.endswith(
        ("lower/layer.py", "eval_frame.py")
    ):
        frame, level = frame.f_back, level + 1
    return level

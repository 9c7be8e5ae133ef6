"""`explain`: one page about what a solver computes on a problem, what is wrong and what to change."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from bilevel.arguments import explained
from bilevel.check.explaining.circumstances import (
    batch_statistics,
    dropout,
    same_batch,
)
from bilevel.check.explaining.circumstances import (
    precision as rounding,
)
from bilevel.check.explaining.curvature import curvature, lower_level
from bilevel.check.explaining.derivatives import stopped_gradients
from bilevel.check.explaining.page import Diagnosis, Explanation, Severity, ranked
from bilevel.check.explaining.rates import lower_rate, step_sizes
from bilevel.check.explaining.scene import Rates, Scene
from bilevel.check.explaining.terms import numbers, response_term
from bilevel.check.explaining.variables import still_variables
from bilevel.devices import usable_precision
from bilevel.optimizers import Optimizers, check_optimizers, optimizers_of
from bilevel.problem import Problem, refuse_no_problem
from bilevel.refusals import SEEDS, whole
from bilevel.solvers import Solver
from bilevel.solvers.given import given_solver

__all__ = ["Diagnosis", "Explanation", "Severity", "explain"]

# What causes other findings comes before them.
_EXAMINERS: Sequence[Callable[[Scene], Iterator[Diagnosis]]] = (
    stopped_gradients,
    still_variables,
    rounding,
    batch_statistics,
    curvature,
    lower_rate,
    lower_level,
    response_term,
    step_sizes,
    same_batch,
    dropout,
)


@explained
def explain(
    problem: Problem,
    solver: Solver,
    upper_batch: Any = None,
    lower_batches: Sequence[Any] = (None,),
    *,
    upper_optimizer: Optimizers | None = None,
    lower_optimizer: Optimizers | None = None,
    lower_steps: int = 1,
    num_steps: int = 10_000,
    precision: torch.dtype | None = None,
    seed: int = 0,
) -> Explanation:
    r"""Say on one page what a solver computes at a problem's current variables, and what to change.

    Looked at, in this order: whether autograd and difference quotients of the losses agree (a
    `.detach()` or `float(...)` on the way); which upper variables get no gradient, and why; rounding;
    batch statistics; the extreme eigenvalues of the lower Hessian, by Lanczos' method; whether lower
    steps contract; how far the lower level is from solved, and what the answer can bear; what share of
    the hypergradient is dropped, or how far the linear solve, the damping, the truncation or the number
    of steps takes it from the exact one; whether the step sizes of the two levels fit each other;
    whether both levels see the same rows.

    The problem, its buffers, its `.grad` fields, the optimizers and the random generators are left as
    they were: what moves are copies. All but rounding is measured on a copy in float64 where the losses
    can be computed in it.

    Args:
        problem: the problem, at the point to look at. A run after some hundred steps tells most.
        solver: the solver.
        upper_batch: batch of the upper loss, as `draw` returns it.
        lower_batches: batches of the lower loss.
        upper_optimizer: the optimizer(s) of the upper level. With those of the lower level, at most 50
            turns are rehearsed on a copy.
        lower_optimizer: the optimizer(s) of the lower level.
        lower_steps: lower steps in a turn, as for `train`.
        num_steps: turns that the run will take: an upper level that needs more is too slow.
        precision: lower-precision dtype that the losses are computed in, as for `train`.
        seed: seed of random directions and of dropout.

    Returns:
        The findings, the worst first; print it.

    Raises:
        ValueError: if the problem does not fit the solver, a loss is not a function of its variables
            and its batch, the problem cannot be copied, or an optimizer has step hooks.
        TypeError: if an argument is of the wrong kind.

    Example:
        >>> from bilevel import Alternating
        >>> problem = Problem.from_functions(
        ...     lambda x, y, _: (y["y"] - 3).square().sum(),
        ...     lambda x, y, _: (y["y"] - x["x"].sin()).square().sum(),
        ...     {"x": torch.ones(2).double()}, {"y": torch.ones(2).double().sin()},
        ... )
        >>> page = explain(problem, Alternating())
        >>> page.top.topic, page.top.severity, page.top.measured
        ('dropped term', 'wrong', 1.0)
        >>> print(page.top.change)
        use `Implicit()` where the lower level is nearly solved, `Unrolled(...)` where it is not
    """
    refuse_no_problem(problem)
    solver = given_solver("None" if solver is None else solver)
    rates = Rates(
        optimizers_of("upper_optimizer", upper_optimizer),
        optimizers_of("lower_optimizer", lower_optimizer),
        whole("lower_steps", lower_steps, 0),
        whole("num_steps", num_steps),
    )
    if rates.upper:
        check_optimizers(problem, "upper", rates.upper)
    if rates.lower:
        check_optimizers(problem, "lower", rates.lower)
    _refuse_hooks([*rates.upper, *rates.lower])
    seed = whole("seed", seed, *SEEDS)
    usable_precision(precision)
    with torch.enable_grad():
        scene = Scene(problem, solver, upper_batch, lower_batches, rates, precision, seed)
        start = time.perf_counter()  # the first call may have compiled something
        scene.given_again()
        one = time.perf_counter() - start
        findings = [found for examine in _EXAMINERS for found in examine(scene)]
        measured = numbers(scene)
    seconds = time.perf_counter() - start
    return Explanation(
        problem=problem._get_name(),  # type: ignore[no-untyped-call]  # torch's
        solver=repr(solver),
        findings=ranked(findings),
        numbers=measured,
        seconds=seconds,
        cost=seconds / max(one, 1e-9),
    )


def _refuse_hooks(optimizers: Sequence[torch.optim.Optimizer]) -> None:
    for optimizer in optimizers:
        if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
            raise ValueError(
                f"`explain` rehearses steps on copies, but `{type(optimizer).__name__}` has step hooks "
                "(a projection?), which may write into the problem itself; call it without this "
                "optimizer"
            )

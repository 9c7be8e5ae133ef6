"""What penalty solvers say of a penalty that is too small, from the curvatures they come across."""

import warnings

from bilevel.tree import Tree, add, dot


def secant_curvature(start: Tree, end: Tree, first: Tree, last: Tree) -> float | None:
    """The mean curvature of a loss between two points, from its gradients there; `None` for no way."""
    way = {name: y.detach() - start[name].detach() for name, y in end.items()}
    length = float(dot(way, way))
    return float(dot(way, add(last, first, -1.0))) / length if length > 0 else None


def warn_if_small(
    solver: str, penalty: float, upper: float | None, lower: float | None, *, times: float = 2.0
) -> None:
    """Warn, once in a run, of a penalty that the curvatures along the first steps prove too small.

    The theory asks for `penalty >= times * L / mu`, with L the largest curvature of the upper loss in
    the lower variables and mu the smallest of the lower loss. A curvature along one way bounds L from
    below and mu from above, so what it asks for is needed at least.

    Args:
        solver: name of the solver.
        penalty: the penalty.
        upper: the curvature of the upper loss along the way.
        lower: that of the lower loss.
        times: the factor of the theory.
    """
    if upper is None or lower is None or lower <= 0:
        return
    needed = times * abs(upper) / lower
    if penalty < needed:
        warnings.warn(
            f"the penalty {penalty:.3g} of `{solver}` is below {needed:.3g}, the least that its "
            f"theory needs here ({times:g} L / mu; along the first steps the upper loss curves by "
            f"{upper:.2g}, the lower one by {lower:.2g}): the penalised lower problem may have no "
            f"minimum and its bias is not small. Set `penalty` to {2 * needed:.2g} or more",
            RuntimeWarning,
            stacklevel=2,
        )


def warn_if_unbounded(
    solver: str, penalty: float, upper: float | None, lower: float | None
) -> None:
    """Warn, once in a run, of a penalised loss that curves down along the first steps.

    Args:
        solver: name of the solver.
        penalty: the penalty.
        upper: the curvature of the upper loss along the way.
        lower: that of the lower loss.
    """
    if upper is None or lower is None or lower <= 0:
        return
    needed = -upper / lower
    if penalty < needed:
        warnings.warn(
            f"the penalty {penalty:.3g} of `{solver}` is below {needed:.3g}, the least that its "
            f"theory needs here (along the first steps the upper loss curves down by {-upper:.2g}, the "
            f"lower one up by {lower:.2g}): the penalised loss falls away from the lower solution. Set "
            f"`penalty` to {2 * needed:.2g} or more",
            RuntimeWarning,
            stacklevel=2,
        )


def warn_if_rough(smoothing: float, lower: float | None) -> None:
    """Warn, once in a run, of a Moreau envelope whose own problem is not convex along the first step.

    Args:
        smoothing: gamma of the envelope.
        lower: the curvature of the lower loss along the way.
    """
    if lower is None or lower >= 0:
        return
    most = -0.5 / lower
    if smoothing >= most:
        warnings.warn(
            f"`smoothing` = {smoothing:.3g} of `MEHA` is not below {most:.3g}, the most that its theory "
            f"allows here (1 / (2 rho); along the first step the lower loss curves by {lower:.2g}): the "
            f"envelope may have several minima. Set it to {most / 2:.2g} or less",
            RuntimeWarning,
            stacklevel=2,
        )

"""`refuse_untrue`: lower losses whose gradient is not what autograd says, before it is relied on."""

from bilevel.losses.hooks import refuse_hooks
from bilevel.problem import Problem
from bilevel.tree import Tree


def refuse_untrue(problem: Problem, lower: Tree, solver: str) -> None:
    """Refuse a lower level that is not there, stops its gradient or has hooks on its variables.

    Args:
        problem: the problem.
        lower: its lower variables.
        solver: name of the solver that needs the true gradient of the lower loss.

    Raises:
        ValueError: with what is in the way.
    """
    name = type(problem).__name__
    if not lower:
        raise ValueError(
            f"`{solver}` needs a lower level, but `{name}.lower` has no trainable variables; put "
            "them there and leave `requires_grad` on, or use `Alternating()`"
        )
    if problem.stops_lower_gradient is not None:
        raise ValueError(
            f"`{solver}` needs the true gradient of both losses, but in `{name}` "
            f"{problem.stops_lower_gradient}, or `Alternating()`"
        )
    refuse_hooks(lower, solver)


def refuse_no_lower_loss(problem: Problem, solver: str, advice: str = "") -> None:
    """Refuse a lower level that is no plain loss, for solvers that add the loss to the upper one.

    Args:
        problem: the problem.
        solver: what needs the loss, as a refusal begins with it.
        advice: what to use instead, if that is not `Implicit`.

    Raises:
        ValueError: if the lower level is an equation or has constraints.
    """
    name = type(problem).__name__
    if problem.gives_lower_condition:
        raise ValueError(
            f"{solver} needs a lower loss, but the lower level of `{name}` is an equation "
            f"(`lower_condition`); {advice or 'use `Implicit(GMRES())`, which needs the equation alone'}"
        )
    if problem.constrains_lower:
        raise ValueError(
            f"{solver} takes the lower loss for all there is, but `{name}` has constraints "
            f"(`lower_constraints`); {advice or 'use `Implicit()`, which respects them'}"
        )


def refuse_no_true_loss(problem: Problem, lower: Tree, solver: str) -> None:
    """Refuse a lower level whose loss, as it is differentiated, is not all there is.

    Args:
        problem: the problem.
        lower: its lower variables.
        solver: name of the solver.

    Raises:
        ValueError: with what is in the way.
    """
    refuse_untrue(problem, lower, solver)
    refuse_no_lower_loss(problem, f"`{solver}`")


def unused_by(problem: str, count: int) -> str:
    """What is said of a lower loss that depends on none of its variables, of which there are `count`."""
    return (
        f"the lower loss of `{problem}` does not depend on any of its {count} lower variables; check "
        "for a `.detach()`, a `torch.no_grad()` or the wrong module in `lower_loss`"
    )

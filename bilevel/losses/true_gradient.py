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

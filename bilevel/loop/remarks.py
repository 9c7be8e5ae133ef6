"""What `train` says once, after the first hypergradient, about upper variables that do not move."""

import warnings

import torch

from bilevel.distributed import is_main
from bilevel.solvers import Hypergradient, Solver

_CAUSES = (
    "look for a `.detach()`, a `float(...)` or `.item()`, or a `torch.no_grad()` between it and the "
    "losses, or for noise that it scales in `draw` instead of in a loss"
)


def remark(
    hypergradient: Hypergradient, solver: Solver, *, levels: int = 2, stacklevel: int
) -> None:
    """Warn of a first hypergradient that is exactly zero, as a whole or where no loss uses a variable.

    It looks at numbers, so it waits for the device.

    Args:
        hypergradient: the first one of a run.
        solver: the solver it comes from.
        levels: 1 for a problem without lower variables.
        stacklevel: as in `warnings.warn`.
    """
    grad = hypergradient.grad
    zero = {name for name, g in grad.items() if not torch.any(g != 0)}
    still = [name for name in hypergradient.stats.unreached if name in zero]
    # of a solver that moves both levels, the variables of its own may begin at 0, and all that they add
    nothing = bool(zero) and len(zero) == len(grad) and not solver.moves_lower
    if not is_main() or not (still or nothing):
        return
    names = ", ".join(f"`{name}`" for name in still[:3]) + (", ..." if len(still) > 3 else "")
    if still and levels == 1:
        text = (
            f"the upper loss does not depend on {names}, so it never moves. That is no harm to a bias "
            "that cancels, a constant added to all that the loss compares; if it is something else, "
            f"{_CAUSES}"
        )
    elif still and solver.drops_response:
        text = (
            f"the upper loss does not depend on {names}, and `{solver}` (the default solver is "
            "`Alternating()`) drops what comes through the lower level: it never moves. Use "
            "`solver=Implicit()` or `Unrolled(...)` if it acts through the lower level; if not, "
            f"{_CAUSES}"
        )
    elif still:
        text = f"neither loss depends on {names}, so it never moves: {_CAUSES}"
    else:
        text = (
            "the first hypergradient is exactly 0 in all upper variables; if they are not at an "
            f"optimum, {_CAUSES}"
        )
    warnings.warn(text, RuntimeWarning, stacklevel=stacklevel + 1)

"""`own_step_sizes`: of a solver's own gradient steps, its setting or the lower optimizer's rates."""

from typing import TypeAlias

from torch import Tensor

from bilevel.optimizers import Optimizers, learned_options, listed
from bilevel.oracles import Oracles
from bilevel.refusals import positive

Rates: TypeAlias = dict[str, float | Tensor]


def check_step_size(setting: float | None) -> None:
    """Refuse a step size that is neither `None` nor positive."""
    if setting is not None:
        positive("step_size", setting)


def own_step_sizes(
    oracles: Oracles,
    setting: float | None,
    lower_optimizer: Optimizers | None,
    solver: str,
    purpose: str,
    *,
    learned: bool = False,
) -> Rates:
    """The step size for each lower variable: the one given, or that of the lower optimizer.

    A variable that the optimizers leave out has none: it is a constant, in a solver's own steps as well.

    Args:
        oracles: the problem.
        setting: the solver's own; `None` for the learning rates that the optimizers have now.
        lower_optimizer: the running optimizer(s) of the lower level.
        solver: name of the solver.
        purpose: what it does by gradient steps, as a refusal goes on after its name.
        learned: whether options of the optimizers may be learned, as where their steps are unrolled.

    Raises:
        ValueError: if there is neither, or the optimizers move other variables or have options that are
            learned.
    """
    groups = [g for one in listed(lower_optimizer or []) for g in one.param_groups]
    of = {id(p): group["lr"] for group in groups for p in group["params"]}
    variables = oracles.slots.variables("lower")
    found = {name: _value(of[id(p)]) for name, p in variables.items() if id(p) in of}
    if setting is not None:
        return dict.fromkeys(found or variables, setting)
    if not lower_optimizer:
        raise ValueError(
            f"`{solver}` {purpose} by gradient steps. Without `step_size` these have the learning "
            f"rate of the lower optimizer, and there is none; give `{solver}` a `step_size` (below "
            "2 / largest eigenvalue of the lower Hessian), or pass `lower_optimizer`"
        )
    if not learned:
        refuse_learned_options(oracles, lower_optimizer, solver)
    if not found:
        raise ValueError(
            f"`{solver}` takes its step sizes from `lower_optimizer`, which moves none of the lower "
            f"variables; build it from `problem.lower.parameters()`, or give `{solver}` a `step_size`"
        )
    return found


def refuse_learned_options(oracles: Oracles, lower_optimizer: Optimizers, solver: str) -> None:
    """Refuse a running lower optimizer with options to be learned, for which no gradient would come.

    Args:
        oracles: the problem.
        lower_optimizer: the running optimizer(s) of the lower level.
        solver: name of the solver that takes the options for numbers.

    Raises:
        ValueError: naming the option.
    """
    for optimizer in listed(lower_optimizer):
        for option in learned_options(optimizer, oracles.problem.parameters()):
            raise ValueError(
                f"`{option}` of the lower optimizer is a tensor that is learned or belongs to the "
                f"problem, and `{solver}` takes it for a number, so that no gradient would come back "
                f"through it; use `Unrolled`, or give the number (`float({option})`)"
            )


def _value(rate: float | Tensor) -> float | Tensor:
    """A learning rate without a graph."""
    return rate.detach() if isinstance(rate, Tensor) else rate

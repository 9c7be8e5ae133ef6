"""`TurnSettings`: how the turns of a run go."""

from dataclasses import dataclass
from typing import final

import torch

from bilevel.choices import Choice, check_choice
from bilevel.devices import usable_precision
from bilevel.distributed import world_size
from bilevel.lower.level import LowerSolver, checked_solver
from bilevel.refusals import flag, whole


@final
@dataclass(frozen=True)
class TurnSettings:
    """How the turns of a run go; named as the arguments of `train`.

    Attributes:
        lower_steps: lower steps in a turn.
        upper_first: whether the upper step comes before them.
        throw: raise where a hypergradient does not succeed.
        compile: how the steps are made into graphs, if at all (`bilevel.choices`).
        precision: lower-precision dtype the losses are computed in, `None` for that of the variables.
        move_batches: bring each batch to the problem's device.
        lower_solver: solves the lower level in each turn, instead of steps.
        accumulate: pieces that each batch is evaluated in.
        reset_lower: begin every turn with the lower variables of the start of the run.

    Raises:
        ValueError: for a precision that would go wrong, or a lower solver in several processes.
        TypeError: if a switch is neither `True` nor `False`; `compile` has two words besides.
    """

    lower_steps: int
    upper_first: bool = False
    throw: bool = True
    compile: Choice = False
    precision: torch.dtype | None = None
    move_batches: bool = True
    lower_solver: LowerSolver | None = None
    accumulate: int = 1
    reset_lower: bool = False

    def __post_init__(self) -> None:
        for name in ("throw", "move_batches", "reset_lower"):
            flag(name, getattr(self, name))
        check_choice(self.compile)
        usable_precision(self.precision)
        if whole("accumulate", self.accumulate) > 1 and self.compile:
            raise ValueError(
                "`accumulate` evaluates a batch in pieces, which compiled steps do not know; leave out "
                "`compile`"
            )
        if self.lower_solver is None:
            return
        checked_solver("lower_solver", self.lower_solver)
        if world_size() > 1:
            raise ValueError(
                f"`lower_solver` solves in one process, but {world_size()} train together; use "
                "`lower_steps`, whose gradients are averaged over them"
            )

    @property
    def lower_moves(self) -> bool:
        """Whether a turn moves the lower variables, in steps or by a solver."""
        return self.lower_steps > 0 or self.lower_solver is not None

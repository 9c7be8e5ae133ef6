"""`TurnSettings`: how the turns of a run go."""

from dataclasses import dataclass
from typing import final

import torch

from bilevel.choices import Choice, check_choice
from bilevel.devices import usable_precision
from bilevel.refusals import flag


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

    Raises:
        ValueError: for a precision that would go wrong.
        TypeError: if a switch is neither `True` nor `False`; `compile` has two words besides.
    """

    lower_steps: int
    upper_first: bool = False
    throw: bool = True
    compile: Choice = False
    precision: torch.dtype | None = None
    move_batches: bool = True

    def __post_init__(self) -> None:
        for name in ("throw", "move_batches"):
            flag(name, getattr(self, name))
        check_choice(self.compile)
        usable_precision(self.precision)

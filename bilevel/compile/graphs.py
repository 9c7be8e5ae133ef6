"""`Graphs`: the compiled units of one set of decisions that Python takes."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor

from bilevel.compile.guards import Guard
from bilevel.compile.lowering import is_stale
from bilevel.compile.prepared import Prepared, filled_with
from bilevel.compile.split import TwoParts
from bilevel.compile.trees import signature

_FEW = 4  # graphs of one unit


@final
@dataclass(eq=False)
class Unit:
    """A compiled unit: `before(fixed)` and, of a stage, `after(residuals, moving)`."""

    extra: list[Tensor]
    answer: list[Any]
    structure: Any
    before: Callable[..., Any]
    parts: TwoParts | None = None
    after: Callable[..., Any] | None = None
    late_answer: list[Any] = field(default_factory=list)
    late_structure: Any = None
    strides: tuple[Any, ...] = ()
    steady: bool | None = None  # whether the first part leads to what it takes; not known yet
    steps: dict[Any, Callable[..., Any] | None] = field(default_factory=dict)

    def answered(self, given: Sequence[Prepared]) -> Any:
        """What the unit says, of a unit without a second part."""
        with torch.no_grad():
            new = self.before(*[t for part in given for t in part.tensors], *self.extra)
        return filled_with(self.answer, self.structure, new)


Units = dict[Any, Unit | None]  # None: it could not be made


@final
@dataclass(eq=False)
class Graphs:
    """The graphs for one set of decisions.

    Attributes:
        units: those that a hypergradient cannot do without.
        attempts: others, which it can.
        full: whether no more graphs are made.
        settled: whether a whole hypergradient has run, and nothing as it is.
        whole: whether all units could be compiled.
    """

    modes: Any
    guard: Guard
    units: Units = field(default_factory=dict)
    attempts: Units = field(default_factory=dict)
    counts: dict[Any, int] = field(default_factory=dict)
    facts: dict[Hashable, Any] = field(default_factory=dict)
    constants: list[tuple[Tensor, int]] = field(default_factory=list)
    extra: list[tuple[Tensor, Any]] = field(default_factory=list)
    full: bool = False
    settled: bool = False
    whole: bool = True

    def holds(self) -> bool:
        """Whether nothing has changed that they take for granted."""
        laid_out = all(signature(tensor) == was for tensor, was in self.extra)
        return laid_out and not is_stale(self.constants) and self.guard.holds()

    def unit(
        self,
        among: Units,
        key: Hashable,
        given: Sequence[Prepared],
        make: Callable[[Sequence[Prepared]], Unit],
    ) -> Unit | None:
        """The unit for these arguments, made if it is new; `None` if that has failed before.

        Raises:
            ValueError: if there are too many for other arguments.
        """
        full = key, *[part.kinds() for part in given]
        if full not in among:
            count = self.counts.get(key, 0)
            if count >= _FEW:
                raise ValueError(
                    f"there are {_FEW} graphs of it and shapes or constants of the batch have "
                    "changed; pad the batches to few shapes, and make numbers tensors"
                )
            self.counts[key] = count + 1
            among[full] = None
            among[full] = make(given)
        return among[full]

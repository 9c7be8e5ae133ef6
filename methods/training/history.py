"""`History`: what a training recorded, and how a step becomes a line of it."""

from dataclasses import dataclass, field
from typing import Any, final

from bilevel import Result, Solver, Step


@final
@dataclass(frozen=True)
class History:
    """What training recorded.

    Attributes:
        records: one dict of plain numbers per `log_every` steps.
        steps: upper steps taken in this call.
        seconds: training time of this call.
        evaluations: one dict of plain numbers per `evaluate_every` steps.
        solver: how the hypergradient was computed.
        total: upper steps of the run so far, those before it was resumed included.
        stopped: what ended it early and at which step, a sentence; `None` if it went to its end.
    """

    records: list[dict[str, Any]] = field(default_factory=list)
    steps: int = 0
    seconds: float = 0.0
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    solver: Solver | None = None
    total: int = 0
    stopped: str | None = None

    @property
    def steps_per_second(self) -> float:
        """Speed of this call, evaluation and callbacks excluded."""
        return self.steps / self.seconds if self.seconds else float("nan")


def record(step: Step) -> dict[str, Any]:
    """A step as plain numbers (waits for the device), and how its hypergradient ended if not well."""
    result = step.hypergradient.result
    ended = {} if result is Result.SUCCESS else {"result": result.name.lower()}
    return {"step": step.number, **step.numbers(), **ended}

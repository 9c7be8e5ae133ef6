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
    """

    records: list[dict[str, Any]] = field(default_factory=list)
    steps: int = 0
    seconds: float = 0.0
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    solver: Solver | None = None
    total: int = 0

    @property
    def steps_per_second(self) -> float:
        """Speed of this call, evaluation and callbacks excluded."""
        return self.steps / self.seconds if self.seconds else float("nan")


def record(step: Step) -> dict[str, Any]:
    """A step as plain numbers (waits for the device)."""
    stats, result = step.hypergradient.stats, step.hypergradient.result
    optional = {
        "lower_loss": step.lower_loss,
        "lower_residual": step.lower_residual,
        "linear_residual": stats.linear_residual,
    }
    return {
        "step": step.number,
        "seconds": round(step.seconds, 4),
        "upper_loss": float(step.upper_loss),
        **{name: float(value) for name, value in step.logs.items()},
        "direct_norm": float(stats.direct_norm),
        "response_norm": float(stats.response_norm),
        **{name: float(value) for name, value in optional.items() if value is not None},
        **({} if result is Result.SUCCESS else {"result": result.name.lower()}),
    }

"""`Step`: what the loop yields after every upper step."""

from dataclasses import dataclass
from typing import final

from torch import Tensor

from bilevel.cards import digits, numbers_by_name
from bilevel.check.certificate import Certificate
from bilevel.solvers import Hypergradient
from bilevel.state import State


@final
@dataclass(frozen=True)
class Step:
    """What `train` yields after each upper step; tensors stay on the device.

    Attributes:
        number: upper steps taken so far, from 1.
        upper_loss: the upper loss at which the hypergradient was taken.
        lower_loss: the lower loss before the last lower step, `None` without lower steps.
        lower_residual: the norm of its gradient dG/dy, before clipping; `None` without lower steps.
        logs: what the losses logged.
        hypergradient: the solver's whole record.
        seconds: time spent in the loop so far, without the time the caller took between steps.
        state: the run's live state; `state.save(path)` writes a checkpoint.
        certificate: how far the hypergradient is from the truth, in steps that `certify_every` names.
    """

    number: int
    upper_loss: Tensor
    lower_loss: Tensor | None
    lower_residual: Tensor | None
    logs: dict[str, Tensor]
    hypergradient: Hypergradient
    seconds: float
    state: State
    certificate: Certificate | None = None

    def numbers(self) -> dict[str, float]:
        """Losses, what they logged, norms and the time, as plain numbers (waits for the device)."""
        stats = self.hypergradient.stats
        optional = {
            "lower_loss": self.lower_loss,
            "lower_residual": self.lower_residual,
            "linear_residual": stats.linear_residual,
        }
        return {
            "seconds": round(self.seconds, 4),
            "upper_loss": float(self.upper_loss),
            **{name: float(value) for name, value in self.logs.items()},
            "direct_norm": float(stats.direct_norm),
            "response_norm": float(stats.response_norm),
            **{name: float(value) for name, value in optional.items() if value is not None},
            **({} if self.certificate is None else self.certificate.numbers()),
        }

    def __repr__(self) -> str:
        found = {
            "upper_loss": self.upper_loss,
            "lower_loss": self.lower_loss,
            "lower_residual": self.lower_residual,
            **self.logs,
        }
        return f"Step {self.number}: {numbers_by_name(found)}; {digits(self.seconds)} s"


def merged(lower: dict[str, Tensor], upper: dict[str, Tensor]) -> dict[str, Tensor]:
    """What both losses logged; a name that both use is told apart by its level."""
    both = lower.keys() & upper.keys()
    if not both:
        return {**lower, **upper}
    levels = (("lower", lower), ("upper", upper))
    return {
        f"{level}.{name}" if name in both else name: value
        for level, logs in levels
        for name, value in logs.items()
    }

"""What can go wrong, as sentences: outcomes of a numerical procedure and the errors they become."""

import enum
from typing import Any


class Result(enum.Enum):
    """Outcome of a hypergradient or of a linear solve; the value is the sentence a person reads."""

    SUCCESS = "the computation succeeded"
    NOT_CONVERGED = (
        "the linear solver used all its steps without reaching its tolerance; give it more steps, "
        "a looser `rtol`, some `damping` or a `preconditioner`, or ask for the result back with "
        "`throw=False`"
    )
    NEGATIVE_CURVATURE = (
        "the lower-level Hessian has a direction of negative curvature, so the lower variables are "
        "not at a strict minimum; take more lower steps, add `damping`, or use `GMRES` or `Unrolled`"
    )
    DIVERGED = (
        "the iteration diverged: its residual grew beyond the right-hand side; take a smaller "
        "`step_size` (below 2 / largest eigenvalue of the Hessian) or use `ConjugateGradient`"
    )
    NOT_FINITE = (
        "a NaN or infinite number appeared; look at the losses and their gradients at this point"
    )


class HypergradientError(RuntimeError):
    """A hypergradient whose computation did not succeed; `hypergradient` holds what it got to."""

    def __init__(self, message: str, hypergradient: Any) -> None:
        super().__init__(message)
        self.hypergradient = hypergradient


class DivergenceError(RuntimeError):
    """Training met a NaN or infinite number; `step` and `term` say when and where."""

    def __init__(self, step: int, term: str, value: float, advice: str = "") -> None:
        super().__init__(
            f"training diverged at step {step}: `{term}` is {value}. {advice}".rstrip()
        )
        self.step = step
        self.term = term


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or that belongs to another configuration."""

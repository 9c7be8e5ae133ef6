"""Why a hypergradient is not the truth: what the guesses that were measured along with it say."""

import math
from dataclasses import dataclass
from typing import final

from torch import Tensor

from bilevel.errors import Result
from bilevel.solvers import Solver

IN_DOUBLE = "the same in float64"
DIRECT = "the direct term alone"
SOLVED = "the same at the lower solution"
EXACT = "the response differentiated exactly"
EXCHANGED = "the same with the batches exchanged"
BOTH = (
    "moves both levels at once: what it answers becomes the hypergradient when the lower variables and "
    "its own have settled, in `train`"
)

_STOPPED = (
    "a `.detach()`, `torch.no_grad()`, `float(...)` or `.item()` in the lower loss, or a buffer that "
    "holds what should be computed"
)


@final
@dataclass(frozen=True)
class Suspicion:
    """What is known about a hypergradient that is not the truth.

    Attributes:
        solver: what it comes from.
        answer: the hypergradient as a vector.
        error: its relative error.
        cosine: cosine of its angle to the truth.
        norm_ratio: its norm over that of the truth.
        tolerance: largest relative error that passes.
        guesses: other hypergradients, as vectors.
        errors: their relative errors.
        rounded: the type it was computed in if that is less than float64.
        result: how its computation ended, if it came as a record.
        residual: norm of the lower gradient where it was taken, if that is known.
        stray: whether it is another than the solver gives here, asked again.
        buffers: whether buffers that advance in the lower steps change the upper loss.
        values: the upper loss it was taken at and that of the truth, if both are known.
    """

    solver: Solver
    answer: Tensor
    error: float
    cosine: float
    norm_ratio: float
    tolerance: float
    guesses: dict[str, Tensor]
    errors: dict[str, float]
    rounded: str | None
    result: Result | None
    residual: float | None
    stray: bool
    buffers: bool
    values: tuple[float, float] | None

    def cause(self) -> str:
        """A clause that names the likely cause."""
        if not bool(self.answer.isfinite().all()):
            return "it is not finite"
        if self.stray:
            return self._exchanged() or self._scale() or self._other()
        solvers = self._rounding() or self._unsolved() or self._dropped() or self._inexact()
        return solvers or self._scale() or self._losses()

    @property
    def _name(self) -> str:
        return type(self.solver).__name__

    def _right(self, name: str) -> bool:
        """Whether a guess is the truth, or much nearer to it."""
        error = self.errors.get(name, math.inf)
        return error <= min(max(self.tolerance, 0.3 * self.error), 0.5)

    def _is(self, name: str) -> bool:
        """Whether the hypergradient is that guess, up to rounding."""
        guess = self.guesses.get(name)
        if guess is None:
            return False
        apart = float((self.answer - guess).norm())
        return apart <= 0.02 * max(float(self.answer.norm()), float(guess.norm()))

    def _rounding(self) -> str:
        if self.rounded is None or not self._right(IN_DOUBLE):
            return ""
        return (
            f"rounding: computed in {self.rounded} it is off, {IN_DOUBLE} has relative error "
            f"{self.errors[IN_DOUBLE]:.1g}; compute it in a wider type, or unroll fewer steps"
        )

    def _exchanged(self) -> str:
        if not self._is(EXCHANGED):
            return ""
        return "it is that of the upper batch and the lower batch exchanged"

    def _unsolved(self) -> str:
        if not self._right(SOLVED) or self.solver.drops_response:
            return ""
        residual = "" if self.residual is None else f" (its gradient has norm {self.residual:.1g})"
        return (
            f"the lower level is far from solved{residual}; {SOLVED} has relative error "
            f"{self.errors[SOLVED]:.1g}"
        )

    def _dropped(self) -> str:
        if not self._is(DIRECT):
            return ""
        if self.solver.drops_response:
            return f"`{self._name}` drops the response term"
        if self.solver.moves_lower:
            return f"`{self._name}` {BOTH}"
        return f"it is the direct term alone, no response arrives: look for {_STOPPED}"

    def _inexact(self) -> str:
        if self.result not in (None, Result.SUCCESS) and self.result is not None:
            return f"`{self._name}` did not succeed: {self.result.value}"
        if not self._right(EXACT):
            return ""
        off = f"{EXACT} has relative error {self.errors[EXACT]:.1g}"
        if self.solver.approximates():
            return f"`{self._name}` approximates the response term ({off})"
        return (
            f"`{self._name}` misses the response term: damping, too few products, or a mistake in the "
            f"solver ({off})"
        )

    def _scale(self) -> str:
        if abs(self.cosine) < 1 - self.tolerance**2:
            return ""
        if self.cosine < 0:
            return "it points exactly the wrong way: a sign is wrong"
        return f"it points the right way but is {self.norm_ratio:.3g} times as long as the truth"

    def _other(self) -> str:
        said = f"it is not what `{self._name}` gives here"
        if self.values is None or _near(*self.values):
            return f"{said}: other variables, batches, steps or another seed?"
        return (
            f"{said}: it was taken where the upper loss is {self.values[0]:.5g}, the truth where it is "
            f"{self.values[1]:.5g}"
        )

    def _losses(self) -> str:
        if self.buffers:
            return (
                "buffers that advance in the lower steps change the answer, and a hypergradient holds "
                f"them where they are; or look for {_STOPPED}"
            )
        if self.solver.drops_response:
            return f"`{self._name}` drops the response term"
        if self.solver.approximates():
            return f"`{self._name}` approximates the response term, or look for {_STOPPED}"
        return f"the losses' derivatives are not those of their values: look for {_STOPPED}"


def _near(a: float, b: float) -> bool:
    return abs(a - b) <= 1e-2 * max(abs(a), abs(b), 1e-12)

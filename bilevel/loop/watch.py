"""`Watch`: looks for NaN, and for numbers that are finite and have still run away."""

import math
import warnings
from collections.abc import Iterable
from typing import final

import torch
from torch import Tensor

from bilevel.devices import widest
from bilevel.errors import DivergenceError
from bilevel.loop.turn import Term

_ADVICE = "Lower the learning rates or clip the gradients (`clip_upper`, `clip_lower`)"
_GROWTH = 1e8
"""A loss above this many times its first value (or 1, if that is larger) is remarked."""


@final
class Watch:
    """Looks at many steps at once, and still names the first step and term.

    A logged number stops the training if it is infinite, but not if it is NaN: metrics that are
    undefined on a batch are NaN (an AUC without positives). If the loss is NaN in the same step, the
    logged number is named first.

    Args:
        variables: of both levels, as they are before the first step.
    """

    def __init__(self, variables: Iterable[Tensor]) -> None:
        self._variables = list(variables)
        self._size = _largest(self._variables)  # nothing waits for it before the end
        self._pending: list[tuple[int, Term, Tensor]] = []
        self._undefined: set[str] = set()  # logged as NaN in a step whose losses were finite
        self._scales: dict[str, float] = {}
        self._remarked = False

    def add(self, step: int, terms: list[tuple[Term, Tensor]]) -> None:
        """Remember the terms of a step; those that are not scalars are left out."""
        self._pending += [(step, term, t) for term, t in terms if t.numel() == 1]

    def look(self) -> None:
        """Look at all that was added since the last look.

        Warns if a loss has become many times what it was: once.

        Raises:
            DivergenceError: if a term is NaN or infinite, with its step.
        """
        undefined: list[tuple[int, Term, float]] = []
        for (step, term, _), value in zip(self._pending, self._values(), strict=True):
            if math.isfinite(value):
                self._compare(step, term, value)
                continue
            if term.logged and math.isnan(value):
                undefined.append((step, term, value))
                continue
            for s, t, v in undefined:
                if s == step and t.name not in self._undefined:
                    raise DivergenceError(s, t.name, v, _ADVICE)
                self._undefined.add(t.name)
            raise DivergenceError(step, term.name, value, _ADVICE)
        self._undefined |= {term.name for _, term, _ in undefined}
        self._pending.clear()

    def _compare(self, step: int, term: Term, value: float) -> None:
        """Remark a loss that has become many times what it was at first."""
        if term.logged or term.name not in ("upper loss", "lower loss"):
            return
        scale = self._scales.setdefault(term.name, max(1.0, abs(value)))
        if abs(value) > _GROWTH * scale:
            self._remark(
                f"at step {step} the {term.name} is {value:.3g}, after {scale:.3g} at first"
            )

    def end(self) -> None:
        """Look at the variables after the last step, which no loss shows.

        Warns if they have become many times what they were, unless a loss was remarked.
        """
        if not self._variables or self._remarked:
            return
        before, after = max(1.0, float(self._size)), float(_largest(self._variables))
        if after > _GROWTH * before:  # NaN is reported elsewhere
            self._remark(
                f"the largest variable is {after:.3g} after the last step, {before:.3g} before"
            )

    def _remark(self, what: str) -> None:
        if not self._remarked:
            warnings.warn(
                f"training seems to diverge: {what}. {_ADVICE}", RuntimeWarning, stacklevel=4
            )
        self._remarked = True

    def _values(self) -> list[float]:
        terms = [t for *_, t in self._pending]
        device = terms[-1].device  # a logged Python number is on the CPU
        if device.type == "cpu":
            return [t.item() for t in terms]
        # one wait for all
        values: list[float] = torch.stack(
            [t.reshape(()).to(device, widest(device)) for t in terms]
        ).tolist()
        return values


@torch.no_grad()
def _largest(variables: list[Tensor]) -> Tensor:
    """The largest absolute value among tensors, a scalar on the device of the first."""
    sizes = [v.detach().abs().max().to(widest(v.device)) for v in variables if v.numel()]
    return torch.stack([s.to(sizes[0].device) for s in sizes]).max() if sizes else torch.zeros(())

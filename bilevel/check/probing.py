"""`Probe`: derivatives of the truth along directions, each from as few evaluations as will do."""

import math
from typing import NamedTuple, final

import torch
from torch import Tensor

from bilevel.check.differences import RATIO, Ladder, climb_down, roughness, sizes
from bilevel.check.procedures import Site
from bilevel.tree import Tree

_ROUGH = 0.1  # of the tolerance: differences less certain than this get a ladder each
_CAREFUL = 4.0  # times what the ladders say of a single difference


@final
class _Step(NamedTuple):
    """A step that has proved good: relative to the size, what it may be off, whether that is much."""

    fraction: float
    spread: float
    rough: bool


@final
class Probe:
    r"""Measures $t^\top d$, the derivative of F at the lower level's answer, along directions d.

    Args:
        site: the problem's modules, into which numbers are written.
        tolerance: relative to `scale`, that will be told apart.
        error: how far the lower level's answer is off.
        generator: of the moves that show how rough F is.

    Attributes:
        size: number of entries of a direction.
        scale: how large the truth is, about; no derivative is resolved better than relative to it.
        bend: how much the derivative along the first direction changes within its step.
        evaluations: of F so far.
    """

    def __init__(
        self, site: Site, tolerance: float, error: Tree, generator: torch.Generator
    ) -> None:
        self._site = site
        self._tolerance = tolerance
        self._points = {n: x.reshape(-1).double() for n, x in site.points.items()}
        # a variable moves by the size of its entries, typically
        self._sizes = {n: float(sizes(x).square().mean().sqrt()) for n, x in self._points.items()}
        self.size = sum(len(x) for x in self._points.values())
        self.scale = 0.0
        self.bend = 0.0
        self.evaluations = 0
        self._known: dict[str, _Step] = {}
        moves = torch.randn(self.size, generator=generator, dtype=torch.float64)
        parts = zip(self._split(moves).items(), self._sizes.values(), strict=True)
        shaped = {n: size * d for (n, d), size in parts}
        center = site.center
        blur = roughness(lambda t: self._value({n: t * d for n, d in shaped.items()}), center)
        self._blur = blur + site.unsolved(error) + _eps(site) * abs(center)

    def _split(self, vector: Tensor) -> Tree:
        parts = vector.split([len(x) for x in self._points.values()])
        named = zip(self._site.points.items(), parts, strict=True)
        return {n: part.to(x.device).view(x.shape) for (n, x), part in named}

    def variables(self) -> dict[str, slice]:
        """Where each upper variable lies in a vector."""
        ends, found = 0, {}
        for name, x in self._points.items():
            found[name] = slice(ends, ends + len(x))
            ends += len(x)
        return found

    def derivative(self, direction: Tensor, kind: str) -> tuple[float, float]:
        """The derivative along a direction of any length, and its uncertainty.

        Args:
            direction: shape (size,).
            kind: directions of one kind are expected to be equally smooth.
        """
        length = float(direction.norm())
        shaped = self._split(direction / length)
        ladder = Ladder(
            lambda t: self._value({n: t * d for n, d in shaped.items()}),
            self._site.center,
            self._blur,
            self._reach(shaped),
        )
        known = self._known.get(kind)
        if known is None or known.rough:
            value, noise = self._scout(ladder, kind, self.scale / length)
        else:
            step = 2.0 ** round(math.log2(known.fraction * ladder.size))
            value = ladder.central(step)
            noise = known.spread + self._blur / step
        return length * value, length * noise if math.isfinite(value) else math.inf

    def _scout(self, ladder: Ladder, kind: str, least: float) -> tuple[float, float]:
        """By a whole ladder of steps, which also finds a step for the next direction."""
        best = climb_down([ladder], self._tolerance, least)[0]
        if not math.isfinite(best.value):
            return best.value, math.inf
        if not self._known:
            self.bend = best.bend
        small = best.step / RATIO
        off = _CAREFUL * abs(ladder.central(small) - best.value) + best.noise
        rough = off > _ROUGH * self._tolerance * max(least, abs(best.value))
        self._known[kind] = _Step(small / ladder.size, off, rough)
        return best.value, best.noise

    def _reach(self, shaped: Tree) -> float:
        """How far x can be moved along a direction before a variable is another one altogether."""
        moved = {n: float(d.square().mean().sqrt()) for n, d in shaped.items()}
        return min(self._sizes[n] / by for n, by in moved.items() if by > 0)

    def _value(self, offsets: Tree) -> float:
        self.evaluations += 1
        return self._site.value(offsets)


def _eps(site: Site) -> float:
    """What rounding does to F in the least precise type that it may be computed in."""
    return max(torch.finfo(x.dtype).eps for x in site.points.values())

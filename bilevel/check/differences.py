r"""Derivatives of a function that may be rough, noisy or undefined nearby, with an honest uncertainty.

Along a unit direction $d$ the central differences

$$ D_k = \frac{F(x + h_k d) - F(x - h_k d)}{2 h_k}, \qquad h_{k+1} = h_k / r, $$

are taken from large steps to small ones, and two neighbours make an estimate of fourth order,

$$ E_k = \frac{r^2 D_{k+1} - D_k}{r^2 - 1} . $$

Where the function is smooth, estimates agree from the first on. Where a step crosses kinks they agree
only once the steps are smaller than the distance to the nearest one; where rounding rules they part
again. Between the two lies a plateau: the estimate that differs least from both its neighbours. How
far it differs, plus the rounding of F over the step, is its uncertainty. A kink at x itself shows in
the one-sided differences: half their jump is added.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import final

import torch
from torch import Tensor

EPSILON = torch.finfo(torch.float64).eps
FIRST = 2.0**-7  # the largest step, relative to the size of what moves
RATIO = 8.0  # powers of two: x + h and x - h are exact
_LEAST = 2.0**-40  # the smallest
_SHRINK = 16  # times that the first step is shortened where the function is not finite


@final
@dataclass(frozen=True)
class Derivative:
    """A derivative along one direction.

    Attributes:
        value: the derivative, NaN where the function is not finite around the point.
        noise: its uncertainty.
        step: the larger of the two steps it was made from.
        bend: how much the derivative changes within that step.
    """

    value: float
    noise: float
    step: float
    bend: float


@final
class Ladder:
    """Differences of one function of one number at smaller and smaller steps.

    Args:
        function: t -> F(x + t d); NaN where it is not defined.
        center: F(x).
        rounding: how far F is off by rounding, absolute.
        size: how far x can be moved along d without becoming another number altogether.
        ratio: between a step and the next.
    """

    def __init__(
        self,
        function: Callable[[float], float],
        center: float,
        rounding: float,
        size: float,
        ratio: float = RATIO,
    ) -> None:
        self._function = function
        self._center = center
        self._rounding = rounding
        self.size = size
        self._ratio = ratio
        self._seen: dict[float, tuple[float, float]] = {}
        self.steps: list[float] = []
        self.largest = abs(center)

    def start(self, step: float, goal: float) -> None:
        """Take the first two differences, from the largest step at which the function is finite.

        A step relative to a tiny number drowns in rounding if F does not feel that number as tiny: it
        is then made larger, as long as F stays finite.
        """
        for _ in range(_SHRINK):
            if self._look(step):
                break
            step /= self._ratio
        else:
            return
        most = max(FIRST, step)
        while step < most and self._blurred(step, goal):
            longer = min(step * self._ratio**2, most)
            if not self._look(longer):
                break
            step = longer
        self.steps = [step]
        self.descend()

    def descend(self) -> None:
        """The next smaller step."""
        step = self.steps[-1] / self._ratio
        if self._look(step):
            self.steps.append(step)

    def exhausted(self) -> bool:
        """Whether the next step cannot be better than what is known: rounding alone exceeds it."""
        step = self.steps[-1] / self._ratio if self.steps else 0.0
        if len(self.steps) < 2 or step < _LEAST * min(self.size, self.steps[0]):
            return True
        return self._blur(step) >= self.best().noise

    def best(self) -> Derivative:
        """The plateau."""
        if len(self.steps) < 2:
            return Derivative(math.nan, math.inf, math.nan, 0.0)
        return min(self._candidates(), key=lambda e: e.noise)

    def central(self, step: float) -> float:
        """The central difference at one step."""
        return self._difference(step)[0] if self._look(step) else math.nan

    def _candidates(self) -> list[Derivative]:
        central, bend = zip(*(self._difference(step) for step in self.steps), strict=True)
        square = self._ratio**2
        pairs = list(pairwise(central))
        estimates = [(square * b - a) / (square - 1) for a, b in pairs]
        found = []
        for k, value in enumerate(estimates):
            near = [abs(value - estimates[j]) for j in (k - 1, k + 1) if 0 <= j < len(estimates)]
            apart = max(near) if near else abs(value - central[1])
            apart *= 4 if len(near) == 1 else 1  # one neighbour may agree by accident
            blur = self._blur(self.steps[k + 1])
            jump = abs(self._ratio * bend[k + 1] - bend[k]) / (self._ratio - 1)
            at_kink = jump > max(0.1 * abs(bend[k + 1]), 3 * blur)
            noise = apart + blur + (jump if at_kink else 0.0)
            found.append(Derivative(value, noise, self.steps[k], abs(bend[k])))
        return found

    def _look(self, step: float) -> bool:
        if step not in self._seen:
            self._seen[step] = self._function(step), self._function(-step)
        plus, minus = self._seen[step]
        finite = math.isfinite(plus) and math.isfinite(minus)
        if finite:
            self.largest = max(self.largest, abs(plus), abs(minus))
        return finite

    def _difference(self, step: float) -> tuple[float, float]:
        """The central difference, and half the difference of the one-sided ones."""
        plus, minus = self._seen[step]
        return (plus - minus) / (2 * step), (plus - 2 * self._center + minus) / (2 * step)

    def _blur(self, step: float) -> float:
        values = self._seen.get(step, (self._center, self._center))
        return (self._rounding + EPSILON * max(map(abs, values))) / step

    def _blurred(self, step: float, goal: float) -> bool:
        return self._blur(step / self._ratio) > goal * abs(self._difference(step)[0])


def climb_down(ladders: Sequence[Ladder], tolerance: float, least: float) -> list[Derivative]:
    """Derivatives along the directions of one variable, each from as few steps as will do.

    Args:
        ladders: one for each direction.
        tolerance: relative to all of them together; a tenth of it is aimed at.
        least: a size below which the derivatives need not be resolved relative to themselves.
    """
    for ladder in ladders:
        ladder.start(FIRST * ladder.size, tolerance / 10)
    open_ = list(ladders)
    while True:
        best = [ladder.best() for ladder in ladders]
        size = max(least, math.hypot(*(e.value for e in best if math.isfinite(e.value))))
        goal = tolerance / 10 * size / math.sqrt(len(ladders))
        open_ = [rung for rung in open_ if not rung.exhausted() and rung.best().noise > goal]
        if not open_:
            return best
        for ladder in open_:
            before = len(ladder.steps)
            ladder.descend()
            if len(ladder.steps) == before:
                open_ = [other for other in open_ if other is not ladder]


def at_step(ladders: Sequence[Ladder], step: float) -> list[Derivative]:
    """Derivatives from two differences each, at `step` and at the next smaller one."""
    for ladder in ladders:
        if ladder._look(step):
            ladder.steps = [step]
            ladder.descend()
    return [ladder.best() for ladder in ladders]


def roughness(function: Callable[[float], float], center: float) -> float:
    """How far F is off by rounding: second differences over steps too small for anything else.

    Args:
        function: t -> F(x + t d), where t = 1 moves x by about its own size.
        center: F(x).
    """
    step = 2.0**-40
    values = [function(t * step) if t else center for t in (-2, -1, 0, 1, 2)]
    seconds = [abs(a - 2 * b + c) for a, b, c in zip(values, values[1:], values[2:], strict=False)]
    known = [s for s in seconds if math.isfinite(s)]
    return max(known, default=0.0) / 2


def sizes(point: Tensor) -> Tensor:
    """How large each entry of a variable is: 0 is taken for as large as the others, or for 1."""
    size = point.abs()
    others = size[size > 0]
    typical = others.square().mean().sqrt() if len(others) else torch.ones((), dtype=size.dtype)
    return torch.where(size > 0, size, typical.to(size))


def shares(counts: Sequence[int], total: int) -> list[int]:
    """How many directions each variable gets: all its entries if they fit, at least one."""
    given = [0] * len(counts)
    order = sorted(range(len(counts)), key=lambda i: counts[i])
    for place, i in enumerate(order):
        fair = (total - sum(given)) // (len(counts) - place)
        given[i] = min(counts[i], max(1, fair))
    return given


def directions(point: Tensor, most: int, generator: torch.Generator) -> tuple[Tensor, list[float]]:
    """Unit directions for one variable, and its size along each.

    Every coordinate if there are at most `most`; else random ones, in which each entry moves in
    proportion to its own size.
    """
    n, size = len(point), sizes(point)
    if n <= most:
        powers = [2.0 ** math.floor(math.log2(s)) for s in size.tolist()]
        return torch.eye(n, dtype=point.dtype, device=point.device), powers
    drawn = torch.randn(most, n, generator=generator, dtype=torch.float64)
    moves = drawn.to(point) * size
    lengths = torch.linalg.vector_norm(moves, dim=1)
    return moves / lengths[:, None], lengths.tolist()

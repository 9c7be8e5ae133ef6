r"""Whether the step sizes of the two levels fit the problem and each other.

Three things go wrong without a word. Lower steps that are too large do not contract. An upper level
that is too fast leaves the lower one behind: the hypergradient is taken where it means nothing. An
upper level that is too slow does not get anywhere: a published data-cleaning run with one rate of 1e-5
for both levels ends with the weight .497 on the noisy half, where it started with .5; at 1e-1 for the
upper level alone it reaches .008.

How long the upper level needs is an extrapolation. A rehearsal of at most 50 turns lowers the
(linearised) upper loss by $\sum_t g_t \cdot (x_t - x_{t+1})$. What there is to gain is at most what
moving each variable by its own size along the hypergradient gains, and at most $|g|^2 / 2\kappa$ where
the upper objective has curvature $\kappa > 0$ along it.
"""

import math
from collections.abc import Iterator

import torch

from bilevel.check.explaining.page import Diagnosis, graded
from bilevel.check.explaining.rehearsal import (
    TURNS,
    Rehearsal,
    bend,
    growth,
    rate,
    rates_of,
    reach,
    rehearse,
)
from bilevel.check.explaining.scene import Scene, angle, long_vector
from bilevel.check.procedures import write
from bilevel.solvers import Hypergradient
from bilevel.tree import Tree

LOWER_RATE, RATES = "lower rate", "step sizes"
_PART = 0.1  # of its size: how far the upper variables are moved to see curvature
_ARRIVED = 0.05  # of the largest hypergradient on the way: below it, its direction does not count
_IDLE = 1e-7  # of the upper loss: a gain below it is none


def lower_rate(scene: Scene) -> Iterator[Diagnosis]:
    """Whether the lower steps contract."""
    found = scene.spectrum
    grown = growth(scene) if scene.oracles.lower else None
    if grown is None:
        return
    bound = 2 / found.largest if found is not None and found.largest > 0 else math.inf
    used = rate(scene.rates.lower) if scene.solver.unrolled_steps() is None else None
    limit = f"; plain gradient steps need a rate below {bound:.2g}" if bound < math.inf else ""
    if grown < 3:
        said = f"40 lower steps bring the lower gradient to {grown:.2g} of its size"
        yield Diagnosis(LOWER_RATE, "fine", grown, said)
        return
    of = f" ({rates_of(scene.rates.lower)})" if used is not None else ""
    yield Diagnosis(
        LOWER_RATE,
        "wrong",
        grown,
        f"the lower steps{of} diverge: 40 of them make the lower gradient {grown:.2g} times as large"
        f"{limit}",
        f"take a lower rate below {bound:.1g}" if bound < math.inf else "take a smaller lower rate",
    )


def step_sizes(scene: Scene) -> Iterator[Diagnosis]:
    """Whether the rates of the two levels fit each other, by a rehearsal on copies."""
    rates = scene.rates
    if not rates.upper or (scene.oracles.lower and not rates.lower):
        yield Diagnosis(
            RATES,
            "fine",
            None,
            "not looked at: give `upper_optimizer` and `lower_optimizer` to have them rehearsed",
        )
        return
    seen = rehearse(scene, min(TURNS, rates.num_steps))
    said = f"{rates_of(rates.upper)} above, {rates_of(rates.lower)} below"
    if (found := _runs_away(scene, seen, said)) is not None:
        yield found
        return
    needed = _turns_needed(scene, seen)
    if needed is not None and needed > rates.num_steps / 3:
        yield _too_slow(scene, seen, needed, said)
        return
    if (left := _left_behind(scene, seen, said)) is not None:
        yield left
        return
    yield Diagnosis(
        RATES,
        "fine",
        needed,
        f"{seen.turns} rehearsed turns ({said}) show no mismatch{_pace(scene, needed)}",
    )


def _pace(scene: Scene, needed: float | None) -> str:
    """How many turns each level needs, in words."""
    said = []
    grown = growth(scene) if scene.oracles.lower else None
    if grown is not None and 0 < grown < 0.9 and scene.rates.lower_steps:
        settles = 40 / (scene.rates.lower_steps * -math.log(grown))
        said.append(f"the lower level settles in about {max(1, round(settles))}")
    if needed is not None:
        said.append(f"the upper level gets where it points in about {max(1, round(needed))}")
    return f": {', '.join(said)}" if said else ""


def _runs_away(scene: Scene, seen: Rehearsal, said: str) -> Diagnosis | None:
    """The upper level diverges or swings to and fro."""
    if seen.broken is not None:
        meaning = f"the rehearsal ({said}) is no longer finite after {seen.broken} turns"
    else:
        moves = seen.path[1:] - seen.path[:-1]
        cosines = torch.nn.functional.cosine_similarity(moves[1:], moves[:-1], dim=1)
        turning = float(cosines.mean()) if len(cosines) else 1.0
        best, last = min(seen.values), max(seen.values[len(seen.values) // 2 :])
        rises = last - seen.values[0] > 0.5 * abs(seen.values[0]) + 1e-12
        still = float(moves.norm()) <= 1e-3 * float(long_vector(reach(scene)).norm())
        if still or not (rises or (turning < -0.3 and last - best > 0.1 * abs(best))):
            return None
        meaning = (
            f"in {seen.turns} rehearsed turns ({said}) the upper loss goes from {seen.values[0]:.3g} up "
            f"to {last:.3g}; successive upper steps have cosine {turning:.2f}"
        )
    return Diagnosis(
        RATES,
        "wrong",
        max(seen.values[-1], 0.0),
        f"{meaning}: the upper level is too fast for the lower one to follow",
        "lower the upper rate, ten times to begin with, or take more lower steps a turn",
    )


def _turns_needed(scene: Scene, seen: Rehearsal) -> float | None:
    """How many turns the upper level needs at the rehearsed speed; `None` if there is no way to go."""
    first = seen.slopes[0]
    size = long_vector(reach(scene))
    gained = float((seen.slopes * (seen.path[:-1] - seen.path[1:])).sum())
    # moving each variable by its size against its gradient
    to_gain = float(first.norm() * size.norm())
    along = _along(scene, first, size)
    curved = bend(scene, along)
    if curved is not None and curved > 0:
        to_gain = min(to_gain, float(first @ first) / (2 * curved))
    if to_gain <= _IDLE * max(abs(seen.values[0]), 1e-300):
        return None
    return seen.turns * to_gain / gained if gained > 0 else math.inf


def _along(scene: Scene, slope: torch.Tensor, size: torch.Tensor) -> Tree:
    """A short move of the upper variables against the hypergradient."""
    length = _PART * float(size.norm())
    flat_move = -slope * (length / max(float(slope.norm()), 1e-300))
    variables = scene.copy.variables("upper")
    parts = flat_move.split([x.numel() for x in variables.values()])
    return {n: p.view(x.shape).to(x) for (n, x), p in zip(variables.items(), parts, strict=True)}


def _too_slow(scene: Scene, seen: Rehearsal, needed: float, said: str) -> Diagnosis:
    size = float(long_vector(reach(scene)).norm())
    moved = float((seen.path[-1] - seen.path[0]).norm()) / size
    severity = graded(needed, scene.rates.num_steps / 3, scene.rates.num_steps)
    factor = needed / (scene.rates.num_steps / 10)
    up, down = rate(scene.rates.upper), rate(scene.rates.lower)
    same = "; both levels have the same rate" if up is not None and up == down else ""
    often = (
        f"about {_round(factor)} times the upper rate"
        if math.isfinite(factor)
        else "a much larger upper rate"
    )
    if math.isfinite(needed):
        way = f"it needs about {_round(needed)} turns to get where its hypergradient points"
    else:
        way = "it gets nowhere"
    return Diagnosis(
        RATES,
        severity,
        needed,
        f"the upper level hardly moves: {moved:.1g} of its size in {seen.turns} rehearsed turns "
        f"({said}); {way}, and the run has {scene.rates.num_steps:,}{same}",
        f"take two time scales: {often}, the lower one as it is",
    )


def _round(number: float) -> str:
    return f"{float(f'{number:.1g}'):,.0f}"


def _left_behind(scene: Scene, seen: Rehearsal, said: str) -> Diagnosis | None:
    """Whether the lower level follows: the hypergradient at the end, and with the lower level solved."""
    if scene.second_order is not None or not scene.oracles.lower:
        return None
    upper, lower = seen.end
    with scene.at({n: y.double() if scene.double else y for n, y in lower.items()}):
        variables = scene.copy.variables("upper")
        write({n: x for n, x in variables.items() if n not in scene.oracles.shared}, upper)
        now: Hypergradient = scene.solved_by(scene.eager)
        before, after = scene.follow(3)
        if not after < 0.5 * before and after > 1e-6:
            return None
        solved = scene.solved_by(scene.eager)
    cosine = angle(now.grad, solved.grad)
    left = float(long_vector(solved.grad).norm())
    if cosine > 0.3 or left < _ARRIVED * float(seen.slopes.norm(dim=1).max()):
        return None
    return Diagnosis(
        RATES,
        "wrong",
        cosine,
        f"after {seen.turns} rehearsed turns ({said}) the lower level is left behind: with it solved, "
        f"the hypergradient has cosine {cosine:.2f} with the one that is followed",
        "lower the upper rate, or take more lower steps a turn",
    )

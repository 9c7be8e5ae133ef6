"""What differences and a solver's answer say together: for each variable, then in one sentence."""

import math
from dataclasses import dataclass, field
from typing import Literal, final

import torch
from torch import Tensor

from bilevel.cards import Card
from bilevel.check.causes import BOTH
from bilevel.check.differences import Derivative
from bilevel.solvers import Solver

Outcome = Literal["agrees", "disagrees", "inconclusive"]
_SURE = 3.0  # uncertainties that a difference must exceed to count
_GROSS = 0.1  # relative error of a single entry that no approximation excuses


@final
@dataclass(frozen=True)
class VariableCheck:
    """How the answer for one upper variable compares with the truth.

    Attributes:
        name: name of the variable.
        outcome: "agrees", "disagrees", or "inconclusive" where the differences cannot tell.
        relative_error: |answer - truth|, relative to the largest of the truth, the direct term and
            how much the truth changes within the step. At an optimum only the last is not 0.
        noise: uncertainty of the truth, on the same scale.
        cosine: cosine of the angle between answer and truth, 1 where both are 0.
        step: largest step of the differences that were used.
        answer: the solver's directional derivatives, shape (directions,).
        truth: those of the procedure.
        direct: those of the direct term alone.
        entry: the entry that is wrong where the variable as a whole seems right, else `None`.
    """

    name: str
    outcome: Outcome
    relative_error: float
    noise: float
    cosine: float
    step: float
    answer: Tensor
    truth: Tensor
    direct: Tensor
    entry: int | None = None

    def __repr__(self) -> str:
        return f"VariableCheck of {self.name}: {self.outcome}, {_numbers(self)}"


@final
@dataclass(frozen=True)
class HypergradientCheck:
    """How a solver's hypergradient compares with the truth.

    Attributes:
        cosine: cosine of the angle between the two (over the directions tried).
        relative_error: that of the variable which decides: one that fails, or the worst of those
            that pass (see `bilevel.check.VariableCheck`).
        noise: relative uncertainty of the finite differences themselves, for the same variable.
        verdict: one sentence, beginning with "agrees", "disagrees" or "inconclusive".
        passed: whether every variable agrees, and the value of the upper loss with them.
        answer: the solver's directional derivatives, shape (directions,).
        truth: those of the procedure, shape (directions,).
        variables: the same for each upper variable by itself.
    """

    cosine: float
    relative_error: float
    noise: float
    verdict: str
    passed: bool
    answer: Tensor
    truth: Tensor
    variables: dict[str, VariableCheck] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.verdict

    def __repr__(self) -> str:
        return str(self._card())

    def _repr_html_(self) -> str:
        return self._card().html()

    def _card(self) -> Card:
        rows = [(name, f"{c.outcome}, {_numbers(c)}") for name, c in self.variables.items()]
        return Card(f"HypergradientCheck: {self.verdict}", rows if len(rows) > 1 else [])


def _numbers(check: VariableCheck) -> str:
    return (
        f"relative error {check.relative_error:.1e} (known to {check.noise:.0e}), "
        f"cosine {check.cosine:.3f}, {len(check.answer)} directions"
    )


def cosine(a: Tensor, b: Tensor) -> float:
    """Cosine of the angle between two vectors; 1 if both are 0, 0 if one is."""
    sizes = float(a.norm()) * float(b.norm())
    if sizes == 0:
        return 1.0 if float(a.norm()) == float(b.norm()) else 0.0
    return float(a @ b) / sizes


def judge(
    name: str,
    answer: Tensor,
    estimates: list[Derivative],
    direct: Tensor,
    *,
    resolution: float,
    accuracy: float,
    coordinates: bool,
    tolerance: float,
) -> VariableCheck:
    """Compare the answer for one variable with differences.

    Args:
        name: of the variable.
        answer: the solver's derivatives along the directions.
        estimates: the procedure's.
        direct: those of the direct term.
        resolution: the derivative that would change F by F itself when the variable is moved by its
            own size. A truth and an answer that are 0 compared with this are equal.
        accuracy: relative accuracy that the solver itself claims.
        coordinates: whether the directions are the variable's entries.
        tolerance: largest relative error that passes.
    """
    truth, noises, bends = (
        torch.tensor([getattr(e, key) for e in estimates], dtype=answer.dtype).to(answer.device)
        for key in ("value", "noise", "bend")
    )
    step = max(e.step for e in estimates)
    error, noise = float((answer - truth).norm()), float(noises.norm())
    scale = max(float(truth.norm()), float(direct.norm()), float(bends.norm()))
    within = error <= _SURE * noise
    if within and noise <= tolerance * resolution and error > tolerance * scale:
        scale = resolution  # 0 as far as differences can tell
    entry = None
    outcome: Outcome
    if not bool(answer.isfinite().all()):
        outcome = "disagrees"
    elif not math.isfinite(error) or not math.isfinite(noise):
        outcome = "inconclusive"
    elif error <= tolerance * scale:
        outcome = "agrees"
        if coordinates:
            entry = _gross(answer, truth, noises, tolerance * bends, accuracy * scale)
            outcome = "agrees" if entry is None else "disagrees"
    else:
        outcome = "inconclusive" if within else "disagrees"
    relative = error / scale if scale > 0 else (0.0 if error == 0 else error * math.inf)
    uncertain = noise / scale if scale > 0 else (0.0 if noise == 0 else math.inf)
    angle = 1.0 if outcome == "agrees" and scale == resolution else cosine(answer, truth)
    return VariableCheck(
        name, outcome, relative, uncertain, angle, step, answer, truth, direct, entry
    )


def _gross(answer: Tensor, truth: Tensor, noise: Tensor, flat: Tensor, floor: float) -> int | None:
    """The entry that is grossly wrong though it is too small to be seen in the whole."""
    error = (answer - truth).abs()
    wrong = error > _GROSS * torch.maximum(answer.abs(), truth.abs())
    wrong &= (error > 10 * noise) & (error > flat) & (error > 1e3 * floor)
    return int(error.where(wrong, 0).argmax()) if bool(wrong.any()) else None


def conclude(
    checks: list[VariableCheck],
    solver: Solver,
    tolerance: float,
    *,
    value: tuple[float, float] | None,
    blur: float,
    early: bool,
) -> HypergradientCheck:
    """One record and one sentence from those of the variables.

    Args:
        checks: one for each variable.
        solver: the solver that was checked.
        tolerance: largest relative error that passes.
        value: the upper loss by the solver and by the procedure, if they must be equal.
        blur: how far the upper loss is off by rounding.
        early: whether the answer was taken before the lower level was solved.
    """
    order = {"agrees": 0, "inconclusive": 1, "disagrees": 2}
    worst = max(checks, key=lambda c: (order[c.outcome], c.relative_error))
    moved = value is not None and _differ(*value, tolerance, blur)
    where = f"`{worst.name}`" + ("" if worst.entry is None else f", entry {worst.entry}")
    numbers = (
        f"relative error {worst.relative_error:.1e} (tolerance {tolerance:.0e}), "
        f"cosine {worst.cosine:.3f}"
    )
    if moved and value is not None:
        where = f"{numbers} in {where}; " if worst.outcome == "disagrees" else ""
        verdict = (
            f"disagrees: {where}{solver} takes the upper loss to be {value[0]:.6g}, but the same "
            f"steps in a plain loop end at {value[1]:.6g}"
        )
    elif worst.outcome == "disagrees":
        verdict = f"disagrees: {numbers} in {where}; {_cause(worst, solver, tolerance, early)}"
    elif worst.outcome == "inconclusive":
        verdict = f"inconclusive: {numbers} in {where}; {_doubt(worst)}"
    else:
        verdict = f"agrees: {numbers}"
    answer, truth = (torch.cat([getattr(c, key) for c in checks]) for key in ("answer", "truth"))
    return HypergradientCheck(
        cosine=worst.cosine if worst.outcome == "agrees" else cosine(answer, truth),
        relative_error=worst.relative_error,
        noise=worst.noise,
        verdict=verdict,
        passed=worst.outcome == "agrees" and not moved,
        answer=answer,
        truth=truth,
        variables={c.name: c for c in checks},
    )


def _differ(ours: float, theirs: float, tolerance: float, blur: float) -> bool:
    if math.isfinite(ours) and math.isfinite(theirs):
        return abs(ours - theirs) > max(tolerance * abs(theirs), 10 * blur)
    return math.isfinite(ours) != math.isfinite(theirs)


def _cause(check: VariableCheck, solver: Solver, tolerance: float, early: bool) -> str:
    """What may be behind a variable that fails."""
    if not bool(check.answer.isfinite().all()):
        return "the hypergradient is not finite"
    if early:
        return "it was taken before the lower level was solved (`solve_first=False`)"
    if solver.drops_response:
        return f"{solver} drops or approximates the response term"
    if solver.moves_lower:
        return f"{solver} {BOTH}"
    rest = float((check.answer - check.direct).norm())
    if rest <= tolerance * max(float(check.direct.norm()), float(check.truth.norm())):
        return (
            "it is the direct term alone, no response arrives at this variable; look for a "
            "`.detach()`, `torch.no_grad()`, `float(...)` or `.item()` on its way through the lower "
            "loss"
        )
    if solver.approximates():
        return f"{solver} drops or approximates the response term"
    return (
        f"either {solver} differentiates something else than these losses (a stopped gradient, a "
        "lower level or a linear system that is not solved), or another procedure was meant (see "
        "`against`)"
    )


def _doubt(check: VariableCheck) -> str:
    """Why the differences cannot tell."""
    if not bool(check.truth.isfinite().all()):
        return "the upper loss is not finite around this point"
    return (
        f"the differences themselves are uncertain by {check.noise:.1e}: the procedure is not "
        "smooth at any step, or rounding hides the derivative; if you know a better step, give "
        "it as `step`"
    )

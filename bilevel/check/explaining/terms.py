r"""What the two terms of the hypergradient are worth, and what a solver makes of the second one.

The reference is the implicit hypergradient with its linear system solved to rounding: where the lower
variables are, and at the lower minimum nearby. A solver's answer differs from the first by its linear
solve (or by dropping the term, or by its steps), and the first from the second by the lower level that
is not solved.
"""

import math
from collections.abc import Iterator
from dataclasses import fields

import torch

from bilevel.check.explaining.page import Diagnosis, Severity, graded
from bilevel.check.explaining.scene import Scene, angle, apart, changed, long_vector
from bilevel.errors import Result
from bilevel.solvers import Solver

LOOK, WRONG = 0.1, 0.5  # of a hypergradient that may be off before it is said
DROPPED, LINEAR, DAMPING = "dropped term", "linear solve", "damping"
TRUNCATED, STEPS = "truncation", "unrolled steps"


def short(number: float) -> str:
    """A small number in two digits."""
    return f"{number:.1e}" if number else "0"


def response_term(scene: Scene) -> Iterator[Diagnosis]:
    """What the solver makes of the response term."""
    if not scene.oracles.lower:
        yield Diagnosis(
            DROPPED, "fine", 0.0, "the problem has a single level: there is no response"
        )
    elif scene.solver.drops_response:
        yield _dropped(scene)
    elif scene.solver.unrolled_steps() is not None:
        yield from _unrolled(scene)
    else:
        yield from _solved(scene)


def _unknown(topic: str, why: str) -> Diagnosis:
    return Diagnosis(topic, "look", None, f"not measured: {why}")


def _dropped(scene: Scene) -> Diagnosis:
    """What share of the hypergradient is dropped."""
    if scene.here is None:
        return _unknown(DROPPED, str(scene.second_order))
    whole = scene.here.grad
    kept, cosine = scene.answer.grad, angle(scene.answer.grad, whole)
    share = apart(kept, whole)
    alone = [n for n, g in whole.items() if bool(g.any()) and not bool(kept[n].any())]
    if not bool(long_vector(whole).any()) and not bool(long_vector(kept).any()):
        return Diagnosis(DROPPED, "fine", 0.0, "both terms are 0 here")
    if share == float("inf") or share > 1e3:  # the two terms cancel
        share = min(share, 1e3)
    hidden = bool(alone) and len(alone) < len(whole)
    severity: Severity = graded(share, LOOK, WRONG)
    if severity == "wrong" and ((cosine > 0.9 and not alone) or not scene.convex):
        severity = "look"  # at no minimum the response is an estimate
    if severity == "fine" and hidden:
        severity = "look"
    if severity == "fine":
        return Diagnosis(
            DROPPED,
            severity,
            share,
            f"the response term, which this solver drops, is {share:.2g} of the hypergradient",
        )
    names = ", ".join(f"`{n}`" for n in alone[:3])
    only = f"; {names} would move through the lower level only, and stand still" if alone else ""
    return Diagnosis(
        DROPPED,
        severity,
        share,
        f"`{scene.solver}` drops the response term, which is {share:.2g} of the whole hypergradient; "
        f"what is kept has cosine {cosine:.2f} with it{only}"
        + ("" if scene.convex else "; an estimate, for the lower variables are at no minimum"),
        "use `Implicit()` where the lower level is nearly solved, `Unrolled(...)` where it is not",
    )


def _solved(scene: Scene) -> Iterator[Diagnosis]:
    """How far the linear solve is from the solution."""
    if scene.here is None:
        yield _unknown(LINEAR, str(scene.second_order))
        return
    answer, reference = scene.answer, scene.here
    error, cosine = apart(answer.grad, reference.grad), angle(answer.grad, reference.grad)
    failed = answer.result is not Result.SUCCESS
    severity: Severity = graded(error, LOOK, WRONG)
    if scene.negligible(answer.grad, reference.grad):
        severity = "fine"
    residual = answer.stats.linear_residual
    numbers = "" if residual is None else f" (relative residual {float(residual):.1e})"
    if severity == "fine" and not failed:
        yield Diagnosis(
            LINEAR,
            "fine",
            error,
            f"the hypergradient is within {short(error)} of that of the exact solve{numbers}",
        )
        return
    if not scene.convex:
        yield Diagnosis(
            LINEAR,
            "look",
            error,
            f"ended with `{answer.result.name}`, but no solution is a best response: the lower Hessian "
            "is not positive definite",
            "see what is said of the curvature",
        )
        return
    damping = scene.options.get("damping") or 0.0
    if damping and severity != "fine" and _damping_is_it(scene, error):
        yield _too_damped(scene, float(damping), error, cosine, severity)
        return
    if failed and severity == "fine":
        severity = "look"
    said = f"; it ended with `{answer.result.name}`" if failed else ""
    yield Diagnosis(
        LINEAR,
        severity,
        error,
        f"the hypergradient is off by {error:.2g} of its length (cosine {cosine:.2f}) because the "
        f"linear system is not solved{numbers}{said}",
        _better_solve(scene),
    )


def _damping_is_it(scene: Scene, error: float) -> bool:
    """Whether the answer without damping is much better."""
    assert scene.here is not None
    other = scene.solved_by(changed(scene.eager, "damping", 0.0))
    rest = apart(other.grad, scene.here.grad)
    return math.isfinite(rest) and rest < 0.5 * error


def _too_damped(
    scene: Scene, damping: float, error: float, cosine: float, severity: Severity
) -> Diagnosis:
    found = scene.spectrum
    assert found is not None
    low = max(found.smallest, 0.0)
    goal = 0.05 * low if low > 0 else 1e-3 * found.reach
    return Diagnosis(
        DAMPING,
        severity,
        error,
        f"`damping={damping:g}` is large beside the eigenvalues of the lower Hessian "
        f"({found.smallest:.2g} to {found.largest:.2g}): the hypergradient is off by {error:.2g} of its "
        f"length (cosine {cosine:.2f})",
        f"take `damping` of about {goal:.1g}" + (" or 0" if low > 0 else ""),
    )


def _better_solve(scene: Scene) -> str:
    """What to change in the settings of a linear solve, from the eigenvalues."""
    found, options = scene.spectrum, scene.options
    assert found is not None
    positive = scene.convex
    needed = _steps_for(found.condition, found.size) if positive else 0
    instead = f"use `ConjugateGradient(max_steps={needed})`" if positive else "use `GMRES()`"
    if "step_size" in options:
        step, bound = float(options["step_size"]), 2 / found.largest if found.largest > 0 else 0.0
        if step >= bound:
            return (
                f"the series diverges unless `step_size` is below 2 / largest eigenvalue = {bound:.2g}, "
                f"and it is {step:g}; {instead}"
            )
        terms = math.ceil(3 / (step * found.smallest)) if positive else 0
        more = f"the series needs about {terms} terms at this `step_size`, " if positive else ""
        best = 1 / found.largest
        fastest = f"fewer at `step_size={best:.2g}`; " if positive and step < 0.8 * best else ""
        return f"{more}{fastest}{instead}"
    if "scale" in options:
        return (
            "the identity stands for the inverse of a Hessian with eigenvalues from "
            f"{found.smallest:.2g} to {found.largest:.2g}; {instead}"
        )
    if "max_steps" in options and positive:
        return (
            f"the condition number is {found.condition:.2g}, for which conjugate gradients need about "
            f"{needed} steps, and `max_steps` is {options['max_steps']}; give more, or a "
            "`preconditioner`"
        )
    return instead


def _steps_for(condition: float, size: int) -> int:
    """Steps of conjugate gradients to a relative error of 1e-6."""
    return max(1, min(size, math.ceil(math.sqrt(condition) / 2 * math.log(2e6))))


# ---------------------------------------------------------------------- unrolled steps


def _unrolled(scene: Scene) -> Iterator[Diagnosis]:
    truncate = scene.options.get("truncate")
    steps = scene.solver.unrolled_steps()
    assert steps is not None
    if truncate is not None and truncate < steps.num_steps:
        whole = scene.solved_by(changed(scene.eager, "truncate", None))
        error, cosine = (f(scene.answer.grad, whole.grad) for f in (apart, angle))
        meaning = (
            f"the last {truncate} of {steps.num_steps} steps give a hypergradient that is off by "
            f"{error:.2g} of its length (cosine {cosine:.2f}) from that of all steps"
        )
        change = 'raise `truncate`, or leave it out with `mode="recompute"`, which keeps few graphs'
        severity = graded(error, LOOK, WRONG)
        yield Diagnosis(TRUNCATED, severity, error, meaning, change if severity != "fine" else "")
        yield _enough_steps(scene, changed(scene.eager, "truncate", None), steps.num_steps)
    else:
        yield _enough_steps(scene, scene.eager, steps.num_steps)


def _enough_steps(scene: Scene, solver: Solver, num_steps: int) -> Diagnosis:
    """How much of the response of a solved lower level the steps carry."""
    if scene.oracles.shared:
        return Diagnosis(
            STEPS,
            "fine",
            None,
            f"variables belong to both levels: the answer is what {num_steps} steps reach from there",
        )
    if scene.there is None:
        return Diagnosis(
            STEPS,
            "fine",
            None,
            f"the answer is what {num_steps} steps reach; no lower minimum was found to compare with",
        )
    unrolled, solved = scene.solved_by(solver).grad, scene.there.grad
    error, cosine = apart(unrolled, solved), angle(unrolled, solved)
    if not error < 1e3:
        severity: Severity = "wrong"
    else:
        severity = "fine" if error < LOOK else "look"  # it may be the steps that are meant
    meaning = (
        f"after {num_steps} steps the hypergradient differs by {error:.2g} of its length (cosine "
        f"{cosine:.2f}) from that of the solved lower level"
    )
    change = "" if severity == "fine" else _more_steps(error, num_steps)
    return Diagnosis(STEPS, severity, error, meaning, change)


def _more_steps(error: float, num_steps: int) -> str:
    if not 0 < error < 1:
        return (
            "take more steps or a lower rate that contracts, start nearer to the lower minimum, or use "
            "`Implicit`; nothing is to be done where the answer is meant to be what the steps reach"
        )
    factor = error ** (1 / num_steps)
    needed = math.ceil(math.log(0.05) / math.log(factor)) if factor < 1 else num_steps
    return (
        f"each step leaves {factor:.3f} of the error: take about {needed} steps, a larger lower rate, "
        "or `Implicit`; nothing is to be done where the answer is meant to be what the steps reach"
    )


def numbers(scene: Scene) -> dict[str, float]:
    """Norms of what was computed."""
    stats = scene.given.stats
    found = {"upper loss": float(scene.given.value), "direct term": float(stats.direct_norm)}
    reference = scene.here
    if reference is not None:
        found["response term (exact solve)"] = float(reference.stats.response_norm)
    if not scene.solver.drops_response:
        found["response term (this solver)"] = float(stats.response_norm)
    optional = {
        f.name.replace("_", " "): getattr(stats, f.name)
        for f in fields(stats)
        if f.name in ("lower_residual", "linear_residual")
    }
    found |= {n: float(v) for n, v in optional.items() if isinstance(v, torch.Tensor)}
    return found

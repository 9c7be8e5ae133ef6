r"""The lower level where it stands: its curvature, and whether it is solved well enough.

With eigenvalues $\lambda_i$ of the lower Hessian and a residual $r = \nabla_y G$, the lower minimum is
about $|H^{-1} r|$ away. What the answer can bear is measured: one Newton step (or a few) goes to that
minimum, and the hypergradient is taken again there.
"""

import math
from collections.abc import Iterator

import torch

from bilevel.check.explaining.page import Diagnosis, Severity, graded
from bilevel.check.explaining.scene import Scene, angle, apart
from bilevel.check.explaining.terms import LOOK, WRONG, short
from bilevel.errors import Result

CURVATURE, NEGATIVE, FLAT = "curvature", "negative curvature", "flat directions"
UNSOLVED = "lower level"


def curvature(scene: Scene) -> Iterator[Diagnosis]:
    """The extreme eigenvalues of the lower Hessian, and what they mean for the solver."""
    found = scene.spectrum
    if found is None:
        if scene.oracles.lower:
            yield Diagnosis(CURVATURE, "look", None, f"not measured: {scene.second_order}")
        return
    if not math.isfinite(found.reach):
        yield Diagnosis(
            CURVATURE,
            "wrong",
            found.reach,
            "products with the lower Hessian are NaN or infinite",
            "look for a square root, a logarithm or a norm at 0 in `lower_loss`",
        )
        return
    if found.asymmetry > 1e3 * scene.rounding**0.5 and scene.problem.gives_lower_condition:
        yield Diagnosis(
            CURVATURE,
            "fine",
            found.asymmetry,
            f"the Jacobian of the lower condition is not symmetric (by {found.asymmetry:.1g}): "
            "`GMRES()` and `Cholesky()`, by LU, solve with it, conjugate gradients do not",
        )
        return
    if found.asymmetry > 1e3 * scene.rounding**0.5:
        yield Diagnosis(
            CURVATURE,
            "wrong",
            found.asymmetry,
            f"the lower Hessian is not symmetric (by {found.asymmetry:.1g}), so the lower gradient is "
            "not that of a function",
            "look for a `.detach()` in `lower_loss`; with a fixed point on purpose use `GMRES()`",
        )
        return
    tiny = 1e3 * scene.rounding * found.reach
    if found.smallest < -max(tiny, 1e-7 * found.reach):
        yield _negative(scene)
    elif found.smallest <= tiny:
        yield _flat(scene)
    else:
        yield _positive(scene)


def _implicit(scene: Scene) -> bool:
    """Whether the solver solves a system with the Hessian."""
    solver = scene.solver
    return not solver.drops_response and solver.unrolled_steps() is None


def _negative(scene: Scene) -> Diagnosis:
    found = scene.spectrum
    assert found is not None
    damping = float(scene.options.get("damping") or 0.0)
    covered = damping > -found.smallest
    bad = _implicit(scene) and not covered
    change = (
        f"take lower steps until it is gone; if it stays (a saddle: move the lower variables off it), "
        f"add a penalty or `damping` above {-found.smallest:.2g}, or use `Unrolled`; `MINRES` and "
        "`GMRES` differentiate the stationary point as it is"
    )
    if not _implicit(scene):
        change = "nothing, for this solver; `Implicit` would need a minimum, or damping"
    return Diagnosis(
        NEGATIVE,
        "wrong" if bad else "look",
        found.smallest,
        f"the lower Hessian has eigenvalues from {found.smallest:.2g} to {found.largest:.2g}: the lower "
        "variables are at no minimum, and there is no best response to differentiate"
        + (f" (`damping={damping:g}` covers it)" if covered else ""),
        change,
    )


def _flat(scene: Scene) -> Diagnosis:
    found = scene.spectrum
    assert found is not None
    many = f"at least {found.flat}" if not found.certain else str(found.flat)
    damped = bool(scene.options.get("damping"))
    failed = scene.answer.result is not Result.SUCCESS or (
        scene.here is not None
        and not float(scene.here.stats.linear_residual or 0.0) < scene.rounding**0.25
    )
    bad = _implicit(scene) and not damped and failed
    return Diagnosis(
        FLAT,
        "wrong" if bad else "look",
        float(found.flat),
        f"the lower loss is flat along {many} of {found.size} directions (largest eigenvalue "
        f"{found.largest:.2g}): its minimum is not unique"
        + (", and the best response is not defined" if failed else ""),
        "make it unique: a small penalty in `lower_loss`, "
        f"`damping` of about {1e-3 * found.reach:.1g}, or `Unrolled`, whose answer depends on the start",
    )


def _positive(scene: Scene) -> Diagnosis:
    found = scene.spectrum
    assert found is not None
    condition = found.condition
    about = "" if found.certain else "about "
    said = (
        f"eigenvalues of the lower Hessian from {about}{found.smallest:.2g} to {found.largest:.2g}, "
        f"condition number {about}{condition:.2g}; plain gradient steps need a rate below "
        f"{2 / found.largest:.2g}"
    )
    lost = condition * scene.own_rounding
    if lost < LOOK:
        return Diagnosis(CURVATURE, "fine", condition, said)
    return Diagnosis(
        CURVATURE,
        "look",
        condition,
        f"{said}; in {_kind(scene.own_rounding)} a response is then right to {lost:.1g} only",
        f"use float64, or `damping` of about {1e-3 * found.largest:.1g}",
    )


def _kind(rounding: float) -> str:
    kinds = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    near = min(kinds, key=lambda kind: abs(torch.finfo(kind).eps - rounding))
    return str(near).removeprefix("torch.")


def lower_level(scene: Scene) -> Iterator[Diagnosis]:
    """Whether the lower residual is small enough for the answer."""
    if scene.spectrum is None or scene.solver.unrolled_steps() is not None:
        return
    with scene.twice():
        linear = scene.oracles.linearize_lower(scene.oracles.upper, scene.oracles.lower)
    residual = float(linear.gradient.norm())
    if scene.there is None or scene.here is None:
        yield Diagnosis(
            UNSOLVED,
            "look",
            residual,
            f"the norm of the lower gradient is {residual:.2g}, and neither Newton steps nor L-BFGS "
            "found a minimum nearby to compare with",
            "take more lower steps and ask again; a loss without a minimum needs a penalty",
        )
        return
    drops = scene.solver.drops_response
    with scene.at(scene.solution or {}):
        solved = scene.solved_by(scene.eager).grad if drops else scene.there.grad
    now = scene.answer.grad if drops else scene.here.grad
    error, cosine = apart(now, solved), angle(now, solved)
    severity: Severity = graded(error, LOOK, WRONG)
    if scene.negligible(now, solved):
        severity = "fine"
    if severity == "wrong" and drops:
        severity = "look"  # one step follows another, and no formula is misused
    bearable = residual * LOOK / error if error > 0 else residual
    if severity == "fine":
        meaning = (
            f"nearly solved: the hypergradient is within {short(error)} of that at the lower minimum "
            f"(norm of the lower gradient {residual:.1e})"
        )
        yield Diagnosis(UNSOLVED, severity, error, meaning)
        return
    yield Diagnosis(
        UNSOLVED,
        severity,
        error,
        f"not solved: the norm of the lower gradient is {residual:.2g}, and at the lower minimum the "
        f"hypergradient differs by {error:.2g} of its length (cosine {cosine:.2f})",
        f"take lower steps until that norm is below about {bearable:.1g} (`train(lower_steps=...)`), or "
        "use `Unrolled`",
    )

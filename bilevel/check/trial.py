"""`Trial`: one hypergradient, what is measured of the truth along with it, and what that says."""

import math
from typing import final

import torch
from torch import Tensor

from bilevel.check.causes import DIRECT, EXACT, EXCHANGED, IN_DOUBLE, SOLVED, Suspicion
from bilevel.check.certificate import Certificate
from bilevel.check.interval import Measured, Ranged, estimates
from bilevel.check.probing import Probe
from bilevel.check.witness import Stand, Witness, vector
from bilevel.solvers import Hypergradient
from bilevel.tree import Tree

_ACCURACY = 0.02  # of the tolerance: how well a derivative is resolved where it can be
_APART = 1e-4  # a guess that is nearer to the others than this is no new direction
_ZERO = 3.0  # uncertainties within which a derivative is taken for 0
_SEEN = 10.0  # and beyond which it is not
_SAME = 1e-3  # relative distance up to which two hypergradients are the same
_BLIND = 4  # variables without a hypergradient that are looked at one by one


def not_measured(witness: Witness, verdict: str) -> Certificate:
    """The certificate where nothing could be measured."""
    return Certificate(
        cosine=math.nan,
        interval=(-1.0, 1.0),
        norm_ratio=math.nan,
        norm_ratio_interval=(0.0, math.inf),
        relative_error=math.nan,
        relative_error_interval=(0.0, math.inf),
        verdict=verdict,
        passed=False,
        cause=verdict.partition(": ")[2] if verdict.startswith("suspect") else "",
        against=witness.against,
        precision="float64",
        noise=math.inf,
    )


@final
class Trial:
    """One hypergradient at one stand."""

    def __init__(
        self,
        witness: Witness,
        stand: Stand,
        grad: Tree,
        record: Hypergradient | None,
        seed: int,
        again: Tree | None,
    ) -> None:
        self._witness = witness
        self._settings = witness.truth
        self._stand = stand
        self._record = record
        self._answer = vector(grad, stand.site.points)
        self._stray = again is not None and _apart(self._answer, vector(again, stand.site.points))
        self._generator = torch.Generator().manual_seed(seed)
        accuracy = _ACCURACY * self._settings.tolerance
        self._probe = Probe(stand.site, accuracy, stand.error, self._generator)
        self._basis: list[Tensor] = []
        self._along: list[tuple[float, float]] = []
        self._random: list[Tensor] = []
        self._across: list[tuple[float, float]] = []
        self._complete = False
        self._guesses: dict[str, Tensor] = {}

    def certificate(self) -> Certificate:
        """Measure, and judge."""
        if not bool(self._answer.isfinite().all()):
            return not_measured(self._witness, "suspect: the hypergradient is not finite")
        size = float(self._answer.norm())
        self._probe.scale = size
        if size > 0:
            self._measure_along(self._answer)
        else:  # every truth lies across it
            self._basis.append(torch.zeros_like(self._answer))
            self._along.append((0.0, 0.0))
        if self._witness.rounded or self._stray:
            self._guess(IN_DOUBLE)
        self._measure_across()
        blind = self._blind()
        if blind or self._estimates()[2].high > self._settings.tolerance / 2:
            for name in (EXACT, DIRECT, SOLVED, *([EXCHANGED] if self._stray else [])):
                self._guess(name)
        return self._concluded(blind)

    def _measure_along(self, vector: Tensor) -> None:
        """Measure along what a vector adds to the basis."""
        left = vector.clone()
        for _ in range(2):  # once more for what rounding left
            for q in self._basis:
                left -= (q @ left) * q
        size = float(left.norm())
        if size <= _APART * float(vector.norm()) or self._complete:  # 0 among them
            return
        q = left / size
        self._basis.append(q)
        value, noise = self._probe.derivative(q, "guess")
        self._along.append((value, noise))
        self._across = [
            (a - value * float(q @ z), n + noise * abs(float(q @ z)))
            for (a, n), z in zip(self._across, self._random, strict=True)
        ]

    def _measure_across(self) -> None:
        """Along random directions across the basis; along all there are if they are few."""
        left = self._probe.size - sum(bool(q.any()) for q in self._basis)
        self._complete = left <= self._settings.num_directions
        count = left if self._complete else self._settings.num_directions
        for _ in range(count):
            z = torch.randn(self._probe.size, generator=self._generator, dtype=torch.float64)
            others = self._basis + (self._random if self._complete else [])
            for _ in range(2):
                for q in others:
                    z -= (q @ z) * q
            self._random.append(z / z.norm() if self._complete else z)
        self._across = [self._probe.derivative(z, "random") for z in self._random]

    def _guess(self, name: str) -> None:
        tree = self._stand.guess(name)
        if tree is None:
            return
        guess = vector(tree, self._stand.site.points)
        if bool(guess.isfinite().all()):
            self._guesses[name] = guess
            self._measure_along(guess)

    def _blind(self) -> str:
        """A variable whose hypergradient is exactly 0 though the truth there is not."""
        places = self._probe.variables()
        still = {n: s for n, s in places.items() if not bool(self._answer[s].any())}
        if len(still) == len(places):
            return ""
        for name, place in list(still.items())[:_BLIND]:
            z = torch.zeros_like(self._answer)
            length = place.stop - place.start
            z[place] = torch.randn(length, generator=self._generator, dtype=torch.float64)
            value, noise = self._probe.derivative(z, f"blind {name}")
            if abs(value) > _SEEN * noise:
                return name
        return ""

    def _measured(self) -> Measured:
        along, along_noise = torch.tensor(self._along, dtype=torch.float64).reshape(-1, 2).T
        across, across_noise = torch.tensor(self._across, dtype=torch.float64).reshape(-1, 2).T
        size = float(self._answer.norm())
        return Measured(size, along, along_noise, across, across_noise, self._complete)

    def _estimates(self) -> tuple[Ranged, Ranged, Ranged]:
        return estimates(self._measured(), self._settings.confidence, self._probe.bend)

    def _errors(self) -> dict[str, float]:
        """The relative errors of the guesses."""
        measured = self._measured()
        whole = self._complete
        basis = torch.stack(self._basis + (self._random if whole else []))
        truth = torch.cat([measured.along, measured.across]) if whole else measured.along
        rest = 0.0 if whole else measured.rest(self._settings.confidence)[0]
        errors = {}
        for name, guess in self._guesses.items():
            inside = basis @ guess
            outside = 0.0 if whole else float((guess - inside @ basis).norm())
            missed = math.hypot(float((inside - truth).norm()), rest, outside)
            size = max(math.hypot(float(truth.norm()), rest), self._probe.bend)
            errors[name] = missed / size if size > 0 else (math.inf if missed else 0.0)
        return errors

    def _suspicion(self, cosine: Ranged, ratio: Ranged, error: Ranged) -> Suspicion:
        record, site = self._record, self._stand.site
        residual = None if record is None else record.stats.lower_residual
        return Suspicion(
            solver=self._witness.solver,
            answer=self._answer,
            error=error.value,
            cosine=cosine.value,
            norm_ratio=ratio.value,
            tolerance=self._settings.tolerance,
            guesses=self._guesses,
            errors=self._errors(),
            rounded=self._witness.rounded,
            result=None if record is None else record.result,
            residual=None if residual is None else float(residual),
            stray=self._stray,
            buffers=self._stand.buffers_matter(),
            values=None if record is None else (float(record.value), site.center),
        )

    def _concluded(self, blind: str) -> Certificate:
        settings, measured = self._settings, self._measured()
        cosine, ratio, error = self._estimates()
        noise = measured.noise()
        truth = math.hypot(float(measured.along.norm()), measured.rest(settings.confidence)[0])
        still = self._still()
        zero = max(truth, measured.size) <= _ZERO * noise and not blind
        cause = ""
        if zero:
            cosine, ratio, error = (Ranged(v, v, v) for v in (1.0, 1.0, 0.0))
        passed = error.high <= settings.tolerance and not blind and not still
        doubtful = not passed and error.low <= settings.tolerance and not blind and not still
        if not math.isfinite(truth):
            passed, said = False, "inconclusive: the truth is not finite around this point"
        else:
            if not passed and not doubtful:
                cause = still or self._cause(blind, cosine, ratio, error)
            word = "certified" if passed else "inconclusive" if doubtful else "suspect"
            numbers = "both it and the truth are 0" if zero else _numbers(cosine, ratio)
            doubt = self._doubt(noise / truth) if doubtful else ""
            parts = [f"{numbers}, against {self._witness.against}", cause, doubt]
            said = f"{word}: {'; '.join(filter(None, parts))}"
        return Certificate(
            cosine=cosine.value,
            interval=cosine.interval,
            norm_ratio=ratio.value,
            norm_ratio_interval=ratio.interval,
            relative_error=error.value,
            relative_error_interval=error.interval,
            verdict=said,
            passed=passed,
            cause=cause,
            against=self._witness.against,
            precision=self._stand.precision,
            noise=noise / truth if truth > 0 else 0.0,
            guesses=self._errors(),
            num_directions=len(self._along) + len(self._across),
            evaluations=self._probe.evaluations,
        )

    def _still(self) -> str:
        """A clause about variables that no loss depends on."""
        if self._record is None or self._witness.solver.drops_response:
            return ""
        names = [f"`{name}`" for name in self._record.stats.unreached]
        if not names:
            return ""
        listed = ", ".join(names[:_BLIND]) + (", ..." if len(names) > _BLIND else "")
        return (
            f"no loss depends on {listed}: look for a `.detach()` or `float(...)`, or a buffer that "
            "holds a copy"
        )

    def _cause(self, blind: str, cosine: Ranged, ratio: Ranged, error: Ranged) -> str:
        suspicion = self._suspicion(cosine, ratio, error)
        if blind and error.low <= self._settings.tolerance:
            return f"`{blind}` gets a hypergradient of exactly 0, and the truth there is not 0"
        cause = suspicion.cause()
        return f"{cause} (`{blind}` gets exactly 0)" if blind else cause

    def _doubt(self, noise: float) -> str:
        if noise > self._settings.tolerance / 3:
            return (
                f"the differences themselves are uncertain by {noise:.1g} of the truth: it is not "
                "smooth at any step, or rounding hides it"
            )
        return (
            f"the tolerance of {self._settings.tolerance:g} lies within the interval; use more "
            "`num_directions`"
        )


def _apart(one: Tensor, other: Tensor) -> bool:
    """Whether two hypergradients are not the same up to rounding; NaN is like nothing."""
    return not float((one - other).norm()) <= _SAME * max(float(one.norm()), float(other.norm()))


def _numbers(cosine: Ranged, ratio: Ranged) -> str:
    return (
        f"cosine {cosine.value:.3f} ({cosine.low:.3f} to {cosine.high:.3f}), norm ratio "
        f"{ratio.value:.3g} ({ratio.low:.3g} to {ratio.high:.3g})"
    )

"""Five numbers of a run, each with a sentence that says how good it is.

A sentence compares with what stands beside the number in the records: the steps that were asked for, the
real training images in place of samples, the mean image, a coin toss. Where that is missing, it says
less.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, final

from bilevel.methods.training.measures import stranger

_EQUAL = 0.02  # of two shares, and of two ratios: what a reader need not care about
_SHOWN = 5
_CLOCK = "the clock"

Results: TypeAlias = Mapping[str, float]


@final
@dataclass(frozen=True)
class Verdict:
    """A number and what it is worth.

    Attributes:
        label: what is measured.
        value: as text.
        sentence: what it is worth, compared with what; plain text.
    """

    label: str
    value: str
    sentence: str


@final
@dataclass(frozen=True)
class Length:
    """How far a training went.

    Attributes:
        taken: steps on record.
        asked: steps that were to be taken.
        seconds: time in steps; `None` if unknown.
        limit: the seconds after which the clock was to stop it, if any.
        by: what stopped it, if it is known.
    """

    taken: int
    asked: int
    seconds: float | None
    limit: float | None
    by: str | None

    @property
    def ended_early(self) -> bool:
        """Whether steps are missing."""
        return self.taken < self.asked

    @property
    def how_it_ended(self) -> str:
        """A sentence about the end."""
        if not self.ended_early:
            return f"All {self.asked:,} steps were taken."
        where = f"at step {self.taken:,} of {self.asked:,}"
        if self.by is not None:
            return f"Stopped by {self.by} {where}."
        return f"Its end is not on record; the last step that is: {self.taken:,} of {self.asked:,}."

    @property
    def by_clock(self) -> bool:
        """Whether its time was up."""
        return self.limit is not None and (self.by or "").startswith(_CLOCK)


def length_of(config: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> Length | None:
    """How far a training went; `None` where its configuration does not say what was asked.

    Args:
        config: the configuration of the run.
        metrics: its lines; the last is that of the last step.
    """
    training = config.get("training", {})
    asked, limit = training.get("num_steps"), training.get("max_seconds")
    if asked is None:
        return None
    stopped = config.get("stopped") or {}
    if not metrics:
        return Length(stopped.get("step", 0), asked, None, limit, stopped.get("by"))
    last, total = metrics[-1], metrics[-1]["seconds"]
    for step in set(config.get("resumed", ())):  # the clock of the metrics starts anew there
        before = [line["seconds"] for line in metrics if line["step"] <= step]
        total += before[-1] if before and step < last["step"] else 0.0
    by = stopped.get("by")
    # runs of earlier versions do not say; the clock of a line is rounded
    if by is None and limit is not None and last["seconds"] >= limit - 1e-4:
        by = f"{_CLOCK} (`max_seconds` {limit:g})"
    taken = max(last["step"], stopped.get("step", 0))
    return Length(taken, asked, total, limit, by)


def five_numbers(length: Length | None, results: Results) -> list[Verdict]:
    """At most five numbers, the most telling first: what is not on record is left out.

    Args:
        length: of the training, if it is on record.
        results: what `evaluate` returned.
    """
    found = [] if length is None else [_training(length, results)]
    for judge in _JUDGES:
        verdict = judge(results)
        if verdict is not None:
            found.append(verdict)
    return found[:_SHOWN]


def _training(length: Length, results: Results) -> Verdict:
    sentence = length.how_it_ended
    if length.seconds is not None:
        sentence += f" It took {_duration(length.seconds)}"
        speed = results.get("steps_per_second")
        sentence += "." if speed is None else f", {speed:.3g} steps per second."
    return Verdict("Steps", f"{length.taken:,} of {length.asked:,}", sentence)


def _duration(seconds: float) -> str:
    """Seconds in the unit that is easiest to read."""
    if seconds < 120:
        return f"{seconds:.0f} seconds" if seconds >= 10 else f"{seconds:.2g} seconds"
    minutes = round(seconds / 60)
    return f"{minutes} minutes" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def _frechet(results: Results) -> Verdict | None:
    value, best = results.get("frechet"), results.get("frechet_reference")
    if value is None:
        return None
    sentence = "Distance between samples and held-out images; low is good."
    if _all_finite(value, best) and best and best > 0:
        ratio = value / best
        if ratio <= 1 + _EQUAL:
            sentence = (
                "Samples are as close to held-out images as the training images themselves "
                f"({best:.3g})."
            )
        else:
            sentence = (
                f"{_times(ratio)} the distance that the training images themselves have to held-out "
                f"images ({best:.3g})."
            )
    return Verdict("Fréchet distance of samples", _digits(value), sentence)


def _coverage(results: Results) -> Verdict | None:
    value, best = results.get("coverage"), results.get("coverage_reference")
    if value is None:
        return None
    sentence = "Share of held-out images that have a sample near them; high is good."
    if _all_finite(value, best) and best is not None:
        if value >= best - _EQUAL:
            sentence = (
                "As many held-out images have a sample near them as have a training image near them "
                f"({best:.1%})."
            )
        else:
            sentence = (
                f"{value:.1%} of held-out images have a sample near them; {best:.1%} have a training "
                "image near them."
            )
    return Verdict("Coverage by samples", _percent(value), sentence)


def _reconstruction(results: Results) -> Verdict | None:
    value, flat, linear = (results.get(name) for name in ("rmse", "rmse_mean", "rmse_pca"))
    if value is None:
        return None
    sentences = []
    if _all_finite(value, flat) and flat:
        if value >= flat:
            sentences.append(f"No better than showing the mean image every time ({flat:.3g}).")
        else:
            sentences.append(f"{1 - value / flat:.0%} less than the mean image's ({flat:.3g}).")
    if _all_finite(value, linear) and linear is not None:
        less = "more" if linear > value else "less" if linear < value else "as much"
        sentences.append(f"Principal components, as many as latents, err {less} ({linear:.3g}).")
    return Verdict(
        "Error of reconstructions",
        _digits(value),
        " ".join(sentences) or "Of a pixel, where black and white are 2 apart; low is good.",
    )


def _energy(results: Results) -> Verdict | None:
    found = {name: value for name, value in results.items() if name.startswith("auroc_")}
    if not found:
        return None
    name = min(found, key=lambda name: found[name] if math.isfinite(found[name]) else -1.0)
    value, what = found[name], stranger(name)
    among = "" if len(found) == 1 else f" This is the hardest of {len(found)} kinds of images."
    if not math.isfinite(value):
        return Verdict("Outliers told by energy", _digits(value), "It could not be computed.")
    if abs(value - 0.5) < _EQUAL:
        sentence = f"A coin toss: the energy does not tell a real image from {what}."
    elif value < 0.5:
        sentence = (
            f"Worse than a coin toss (0.5): {_cut(value):.1%} of the time a real image has lower "
            f"energy than {what}."
        )
    else:
        sentence = (
            f"{_cut(value):.1%} of the time a real image has lower energy than {what}; a coin toss "
            "would be 50%."
        )
    return Verdict("Outliers told by energy", f"{_cut(value):.3f}", sentence + among)


def _rarest(results: Results) -> Verdict | None:
    value, best = (
        results.get(name) for name in ("smallest_class_share", "smallest_class_share_reference")
    )
    if value is None:
        return None
    beside = "" if best is None else f"; of training images {best:.1%}"
    return Verdict(
        "Rarest class among samples",
        _percent(value),
        f"{_percent(value)} of samples are judged to be of the class that is seen least{beside}.",
    )


_JUDGES: tuple[Callable[[Results], Verdict | None], ...] = (
    _frechet,
    _coverage,
    _reconstruction,
    _energy,
    _rarest,
)


def _all_finite(*values: float | None) -> bool:
    return all(value is not None and math.isfinite(value) for value in values)


def _digits(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else "not a number"


def _percent(value: float) -> str:
    return f"{value:.1%}" if math.isfinite(value) else "not a number"


def _cut(value: float) -> float:
    """A share to three digits that reads 1 only where it is."""
    return min(round(value, 3), 0.999) if value < 1 else value


def _times(ratio: float) -> str:
    digits = 2 if ratio < 2 else 1 if ratio < 10 else 0
    return f"{ratio:,.{digits}f} times"

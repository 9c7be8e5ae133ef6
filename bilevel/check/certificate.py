"""`Certificate`: how far a hypergradient is from the truth, and how sure that is."""

from dataclasses import dataclass, field
from typing import final

from bilevel.cards import Card, digits, plural
from bilevel.check.interval import Interval


@final
@dataclass(frozen=True)
class Certificate:
    """How a hypergradient compares with the truth of a whole procedure; see `certify`.

    Attributes:
        cosine: cosine of the angle between hypergradient and truth, 1 where both are 0.
        interval: the interval of the cosine.
        norm_ratio: norm of the hypergradient over that of the truth.
        norm_ratio_interval: its interval.
        relative_error: |hypergradient - truth| / |truth|.
        relative_error_interval: its interval.
        verdict: one sentence that begins with "certified", "suspect" or "inconclusive", says against
            what, and names the likely cause of a difference.
        passed: whether it is certified: the whole interval of the relative error is within the
            tolerance.
        cause: the likely cause of a difference, a clause; empty where there is none.
        against: what was taken for the truth.
        precision: the type the truth was computed in.
        noise: uncertainty of the differences, relative to the truth.
        guesses: relative errors of other hypergradients that the truth was compared with, by name.
        num_directions: directions that were measured.
        evaluations: how many times the truth was evaluated for that.
        seconds: what it took.
        hypergradient_seconds: what the hypergradient itself took, `None` if it was given.
        share: certificates' share of the time of the training loop so far; `None` outside `train`.
    """

    cosine: float
    interval: Interval
    norm_ratio: float
    norm_ratio_interval: Interval
    relative_error: float
    relative_error_interval: Interval
    verdict: str
    passed: bool
    cause: str
    against: str
    precision: str
    noise: float
    guesses: dict[str, float] = field(default_factory=dict)
    num_directions: int = 0
    evaluations: int = 0
    seconds: float = 0.0
    hypergradient_seconds: float | None = None
    share: float | None = None

    @property
    def outcome(self) -> str:
        """The verdict's first word: "certified", "suspect" or "inconclusive"."""
        return self.verdict.partition(":")[0]

    def numbers(self) -> dict[str, float]:
        """Cosine, norm ratio, relative error and what they cost, as plain numbers for a log."""
        found = {
            "cosine": self.cosine,
            "norm_ratio": self.norm_ratio,
            "relative_error": self.relative_error,
            "seconds": round(self.seconds, 4),
        }
        if self.share is not None:
            found["share"] = round(self.share, 4)
        return {f"certificate.{name}": value for name, value in found.items()}

    def __str__(self) -> str:
        return self.verdict

    def __repr__(self) -> str:
        return str(self._card())

    def _repr_html_(self) -> str:
        return self._card().html()

    def _card(self) -> Card:
        rows = [
            ("cosine", _within(self.cosine, self.interval)),
            ("norm ratio", _within(self.norm_ratio, self.norm_ratio_interval)),
            ("relative error", _within(self.relative_error, self.relative_error_interval)),
            ("against", f"{self.against}, in {self.precision}"),
            *[(f"guess: {n}", f"relative error {e:.2g}") for n, e in self.guesses.items()],
            ("cost", self._cost()),
        ]
        return Card(f"Certificate: {self.verdict}", rows)

    def _cost(self) -> str:
        counted = f"{plural(self.num_directions, 'direction')}, {self.evaluations:,} evaluations"
        cost = f"{digits(self.seconds)} s ({counted})"
        if self.hypergradient_seconds:
            times = self.seconds / self.hypergradient_seconds
            cost += f", {digits(times)} times the hypergradient"
        if self.share is not None:
            cost += f", {self.share:.1%} of the loop's time so far"
        return cost


def _within(value: float, interval: Interval) -> str:
    return f"{value:.4g} ({interval[0]:.4g} to {interval[1]:.4g})"

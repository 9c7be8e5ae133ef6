"""`Explanation`: what was found about a solver on a problem, as one page for a person."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, final

from bilevel.cards import Card, plural

Severity = Literal["fine", "look", "wrong"]
_WIDTH = 100
_LINES = 45  # of a page
_ORDER: dict[Severity, int] = {"wrong": 0, "look": 1, "fine": 2}


@final
@dataclass(frozen=True)
class Diagnosis:
    """One thing that was looked at.

    Attributes:
        topic: what was looked at, in two or three words.
        severity: "fine"; "look" where it is for you to judge; "wrong" where the answer is not what it
            is taken for.
        measured: the number the severity was decided by, `None` where nothing could be measured.
        meaning: what was found, one sentence.
        change: what to do about it, one sentence; empty where nothing is to be done.
    """

    topic: str
    severity: Severity
    measured: float | None
    meaning: str
    change: str = ""

    def __str__(self) -> str:
        return f"{self.topic}: {self.meaning}" + (f". {_capital(self.change)}" * bool(self.change))

    def lines(self) -> list[str]:
        """The diagnosis as lines of a page."""
        first = f"{self.severity if self.severity == 'fine' else self.severity.upper():5}  "
        text = textwrap.wrap(
            f"{self.topic}: {self.meaning}",
            _WIDTH,
            initial_indent=first,
            subsequent_indent=" " * len(first),
        )
        if not self.change:
            return text
        arrow = " " * len(first) + "-> "
        return text + textwrap.wrap(
            self.change, _WIDTH, initial_indent=arrow, subsequent_indent=" " * len(arrow)
        )


@final
@dataclass(frozen=True)
class Explanation:
    """What a solver computes on a problem, what is wrong with it and what to change.

    Print it: it is one page of text. A notebook shows it as a table.

    Attributes:
        problem: name of the problem.
        solver: the solver with all its settings.
        findings: what was looked at, the worst first, what causes other things before them.
        numbers: what was measured on the way, by name.
        seconds: how long it took.
        cost: the same in hypergradients of this solver.
    """

    problem: str
    solver: str
    findings: Sequence[Diagnosis]
    numbers: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    cost: float = 0.0

    @property
    def top(self) -> Diagnosis:
        """The finding to begin with."""
        return self.findings[0]

    @property
    def wrong(self) -> list[Diagnosis]:
        """The findings that make the answer another one than it is taken for."""
        return [finding for finding in self.findings if finding.severity == "wrong"]

    def about(self, topic: str) -> Diagnosis | None:
        """The worst finding about a topic, `None` if it was not looked at."""
        return next((finding for finding in self.findings if finding.topic == topic), None)

    def __str__(self) -> str:
        heading = textwrap.wrap(self._title(), _WIDTH, subsequent_indent="  ")
        numbers = textwrap.wrap(
            "; ".join(f"{name} {value:.3g}" for name, value in self.numbers.items()),
            _WIDTH,
            initial_indent="       ",
            subsequent_indent="       ",
        )
        foot = [f"Took {self.seconds:.1f} s, as long as {self.cost:.0f} hypergradients."]
        room = _LINES - len(heading) - len(numbers) - len(foot)
        return "\n".join([*heading, *self._body(room), *numbers, *foot])

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        rows = [
            (
                f"{found.severity}: {found.topic}",
                found.meaning + (f". {_capital(found.change)}" * bool(found.change)),
            )
            for found in self.findings
        ]
        rows += [(name, f"{value:.3g}") for name, value in self.numbers.items()]
        rows.append(("cost", f"{self.seconds:.1f} s, {self.cost:.0f} hypergradients"))
        return Card(self._title(), rows).html()

    def _title(self) -> str:
        wrong = len(self.wrong)
        look = sum(finding.severity == "look" for finding in self.findings)
        said = [f"{wrong} wrong"] * bool(wrong) + [f"{look} to look at"] * bool(look)
        return f"{self.solver} on {self.problem}: {', '.join(said) or 'nothing wrong was found'}"

    def _body(self, room: int) -> list[str]:
        """The findings, the last ones by their topics alone where the page is full."""
        shown: list[str] = []
        for place, finding in enumerate(self.findings):
            lines = finding.lines()
            last = place == len(self.findings) - 1
            if place and len(shown) + len(lines) + (not last) > room:
                left = self.findings[place:]
                names = ", ".join(dict.fromkeys(f.topic for f in left))
                return [*shown, f"...    {plural(len(left), 'more finding')}: {names}"[:_WIDTH]]
            shown += lines
        return shown


def ranked(findings: Sequence[Diagnosis]) -> tuple[Diagnosis, ...]:
    """The worst first; among equals, in the order in which they were looked at."""
    return tuple(sorted(findings, key=lambda finding: _ORDER[finding.severity]))


def graded(error: float, look: float, wrong: float) -> Severity:
    """The severity of a number that should be small; NaN is wrong."""
    if error < look:
        return "fine"
    return "look" if error < wrong else "wrong"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]

"""`Comparison`: solvers side by side, as text, as a table of a notebook, a data frame and a figure."""

import math
import textwrap
from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Any, final

from bilevel.arguments import explained_methods
from bilevel.cards import Card, as_plain, table_as_html
from bilevel.check.interval import Interval
from bilevel.extras import data_frame
from bilevel.solvers import Solver

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

CLOSE = 0.01  # a relative error that the verdict takes for close
_WIDTH = 100  # columns of the text
_HEAD = ("solver", "cosine", "relative error", "time", "first call", "memory", "products")


@final
@dataclass(frozen=True)
class SolverRow:
    """One solver of a comparison. What is not known is `None`.

    Attributes:
        name: what it is called.
        solver: the solver.
        cosine: cosine of the angle between its hypergradient and the truth.
        cosine_interval: the interval it lies in, at 95 % confidence.
        norm_ratio: norm of the hypergradient over that of the truth.
        relative_error: |hypergradient - truth| / |truth|.
        relative_error_interval: its interval.
        seconds: of one call, the median of the rounds.
        first_seconds: of the first call, in which a `Compiled` solver compiles.
        peak_bytes: the most that torch holds at a time during one call, beyond what was there
            before: temporary tensors and what autograd keeps among it.
        products: Hessian-vector products, or differentiated lower steps, of one call.
        reason: why there is no hypergradient, or what is wrong with it; empty if all went well.
    """

    name: str
    solver: Solver
    cosine: float | None = None
    cosine_interval: Interval | None = None
    norm_ratio: float | None = None
    relative_error: float | None = None
    relative_error_interval: Interval | None = None
    seconds: float | None = None
    first_seconds: float | None = None
    peak_bytes: int | None = None
    products: int | None = None
    reason: str = ""

    def plain(self) -> dict[str, Any]:
        """The row as plain values, the ends of intervals as `..._low` and `..._high`."""
        line: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name.endswith("_interval"):
                low, high = value or (None, None)
                name = field.name.removesuffix("_interval")
                line |= {f"{name}_low": low, f"{name}_high": high}
            else:
                line[field.name] = repr(value) if field.name == "solver" else value
        return line


@final
@explained_methods("plot", "to_frame")
@dataclass(frozen=True)
class Comparison:
    """What `compare` found.

    Attributes:
        rows: one for each solver, in the order in which they were given.
        problem: name of the problem's class.
        truth: what the hypergradients were compared with, in words, or why that is not known.
    """

    rows: tuple[SolverRow, ...]
    problem: str
    truth: str

    @property
    def verdict(self) -> str:
        """The quickest solver within 1 % of the truth, in a sentence."""
        known = [r for r in self.rows if r.relative_error is not None and r.seconds is not None]
        if not known:
            return "No solver can be recommended: none has an answer that was compared."
        close = [r for r in known if (r.relative_error_interval or (0, math.inf))[1] <= CLOSE]
        if not close:
            best = min(known, key=lambda r: r.relative_error or 0.0)
            return (
                f"No solver is surely within {CLOSE:.0%} of the truth; the nearest is `{best.name}`, "
                f"relative error {best.relative_error:.1e}."
            )
        quickest = min(close, key=lambda r: r.seconds or 0.0)
        return (
            f"The quickest within {CLOSE:.0%} of the truth is `{quickest.name}`: "
            f"{_time(quickest.seconds)} a call."
        )

    def __getitem__(self, name: str) -> SolverRow:
        found = {row.name: row for row in self.rows}
        if name not in found:
            raise KeyError(f"there is no solver `{name}` here, but {', '.join(found)}")
        return found[name]

    def to_frame(self) -> "DataFrame":
        """One row for each solver, with everything that `SolverRow` holds; intervals as two columns.

        Raises:
            ImportError: if pandas is not installed.
        """
        return data_frame([row.plain() for row in self.rows])

    def plot(self) -> "Figure":
        """Relative error against time, and the memory of each solver.

        Returns:
            A figure of matplotlib: a notebook shows it, `.savefig("solvers.png")` writes it.

        Raises:
            ImportError: if matplotlib is not installed.
        """
        from bilevel.check.drawing import draw_comparison

        return draw_comparison(self.rows)

    def __str__(self) -> str:
        lines = [self._title(), "", as_plain(_HEAD, self._lines(shortest=True)), ""]
        for note in (*self._notes(), self.verdict):
            lines += textwrap.wrap(note, _WIDTH, subsequent_indent="  ", break_on_hyphens=False)
        return "\n".join(lines)

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        picture = table_as_html(_HEAD, self._lines(shortest=False))
        notes = [tuple(note.split(": ", 1)) for note in self._notes()]
        rows = [(name, said) for name, said in notes]
        return Card(self._title(), [*rows, ("verdict", self.verdict)], picture).html()

    def _title(self) -> str:
        title = f"{self.problem} against {self.truth}"
        return "\n".join(textwrap.wrap(title, _WIDTH, subsequent_indent="  "))

    def _notes(self) -> list[str]:
        return [f"{row.name}: {row.reason}" for row in self.rows if row.reason]

    def _lines(self, *, shortest: bool) -> list[list[str]]:
        lines = [[row.name + (" !" if row.reason else ""), *_numbers(row)] for row in self.rows]
        if shortest:
            others = [max(map(len, cells)) for cells in list(zip(_HEAD, *lines, strict=True))[1:]]
            most = _WIDTH - sum(others) - 2 * len(others)
            for line in lines:
                if len(line[0]) > most:
                    line[0] = f"{line[0][: most - 5]}...{line[0][-2:]}"
        return lines


def _numbers(row: SolverRow) -> list[str]:
    return [
        _within(row.cosine, row.cosine_interval, ".4f"),
        _error(row.relative_error, row.relative_error_interval),
        _time(row.seconds),
        _time(row.first_seconds),
        memory_in_words(row.peak_bytes),
        "" if row.products is None else str(row.products),
    ]


def _error(value: float | None, interval: Interval | None) -> str:
    """The relative error; where it cannot be told from 0, what it is below."""
    if value is not None and interval is not None and value <= interval[1] - value:
        return f"< {interval[1]:.0e}" if interval[1] else "0"
    return _within(value, interval, ".1e")


def _within(value: float | None, interval: Interval | None, how: str) -> str:
    """A number, and how far its interval reaches if that is more than its digits show."""
    if value is None or interval is None:
        return ""
    off = max(interval[1] - value, value - interval[0])
    if off < (5e-4 if how == ".4f" else 0.05 * abs(value)):
        return f"{value:{how}}"
    return f"{value:.2f} ± {off:.1g}" if how == ".4f" else f"{value:.1e} ± {off:.0e}"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return _three(seconds, (1.0, "s"), (1e-3, "ms"), (1e-6, "us"))


def memory_in_words(count: int | None) -> str:
    """As in `1.20 MB`; empty for what is not known."""
    return "" if count is None else _three(count, (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B"))


def _three(value: float, *units: tuple[float, str]) -> str:
    """A number of three digits in the largest of some units that it reaches."""
    size, unit = next((u for u in units if value >= u[0]), units[-1])
    scaled = value / size
    return f"{scaled:.{2 if scaled < 10 else 1 if scaled < 100 else 0}f} {unit}"


def short_name(thing: Any) -> str:
    """A frozen record in few words: its settings that are not the usual ones.

    Example:
        >>> from bilevel import ConjugateGradient, Implicit, Unrolled
        >>> short_name(Implicit(ConjugateGradient(20))), short_name(Unrolled(5, truncate=2))
        ('Implicit(ConjugateGradient(20))', 'Unrolled(5, truncate=2)')
    """
    given = []
    for place, field in enumerate(_fields(thing)):
        value = getattr(thing, field.name)
        usual = field.default_factory() if callable(field.default_factory) else field.default
        if value != usual:
            said = short_name(value) if _fields(value) else repr(value)
            said = said if len(said) <= _LONG else "..."
            given.append(said if place == 0 else f"{field.name}={said}")
    return f"{type(thing).__name__}({', '.join(given)})"


_LONG = 48  # characters of a setting


def _fields(thing: Any) -> tuple[Any, ...]:
    """The settings of a record; none of anything else."""
    known = fields(thing) if is_dataclass(thing) and not isinstance(thing, type) else ()
    return tuple(f for f in known if f.init)

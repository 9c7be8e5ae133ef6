"""Tables of a suite, made from its records: mean and spread over seeds, ceilings, time."""

import html
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

CellRecord = Mapping[str, Any]


@final
@dataclass(frozen=True)
class Row:
    """A method on a model and a data set, over its seeds.

    Attributes:
        method: short name.
        seeds: how many finished.
        known: how the likelihood is known.
        value: mean test log-likelihood in nats over the seeds; `None` if none finished.
        spread: standard deviation over the seeds; `None` with one.
        standard_error: root mean square over the seeds, of an annealed estimate.
        lower: mean of the bounds from below.
        upper: mean of the bounds from above.
        steps: of one training, mean.
        seconds: of one training without its first step; mean, evaluation excluded.
        startup_seconds: of the first step: compilation, if there is any; mean.
        steps_per_second: without the first step; mean.
        failures: why the others did not finish.
    """

    method: str
    seeds: int
    known: str
    value: float | None
    spread: float | None
    standard_error: float | None
    lower: float | None
    upper: float | None
    steps: float | None
    seconds: float | None
    startup_seconds: float | None
    steps_per_second: float | None
    failures: tuple[str, ...]

    @property
    def variance(self) -> float:
        """Square of the standard error of `value`: over the seeds, and of annealed estimates."""
        parts = (self.spread or 0.0, self.standard_error or 0.0)
        return sum(part**2 for part in parts) / max(1, self.seeds)


@final
@dataclass(frozen=True)
class Group:
    """All that was done on one data set with one model.

    Attributes:
        data: short name of the data.
        model: short name of the model.
        rows: one per method, in the order of the records.
        independent: the test log-likelihood of independent columns, which a model must beat; `None` if
            unknown (records of old runs).
        ceiling: the negative entropy of the data, no model can be above it; `None` if unknown.
        exact: the mean of exact maximum likelihood, no other way to train this model should be far
            above it; `None` if it was not run.
        device: what all of it ran on.
        at_once: how many cells shared the machine, at most; of more than one, times are no speeds.
    """

    data: str
    model: str
    rows: tuple[Row, ...]
    independent: float | None
    ceiling: float | None
    exact: float | None
    device: str
    at_once: int

    @property
    def title(self) -> str:
        """Data and model."""
        return f"{self.data}, {self.model}"

    @property
    def best(self) -> frozenset[str]:
        """The method of the highest likelihood, and those that seeds do not tell from it."""
        known = [(row, row.value) for row in self.rows if row.value is not None]
        if len(known) < 2:
            return frozenset()
        top, highest = max(known, key=lambda pair: pair[1])
        return frozenset(
            row.method
            for row, value in known
            if highest - value <= 2 * (top.variance + row.variance) ** 0.5
        )


def groups(records: Iterable[CellRecord], order: Sequence[str] = ()) -> list[Group]:
    """The records as tables.

    Args:
        records: of `records.jsonl`.
        order: names of all cells in the order of the configuration; others come last.
    """
    place = {name: index for index, name in enumerate(order)}
    ordered = sorted(records, key=lambda record: place.get(record["cell"], len(place)))
    found: dict[tuple[str, str], dict[str, list[CellRecord]]] = {}
    for record in ordered:
        methods = found.setdefault((record["data"]["name"], record["model"]["name"]), {})
        methods.setdefault(record["method"]["name"], []).append(record)
    return [_group(*names, methods) for names, methods in found.items()]


def _group(data: str, model: str, methods: Mapping[str, list[CellRecord]]) -> Group:
    everything = [record for members in methods.values() for record in members]
    exact = [
        record["test"]["value"]
        for record in everything
        if record["method"]["method"] == "MaximumLikelihood" and record["status"] == "finished"
    ]
    devices = [_device(record) for record in everything]
    return Group(
        data,
        model,
        tuple(_row(name, members) for name, members in methods.items()),
        next((r["independent"] for r in everything if r.get("independent") is not None), None),
        everything[0]["ceiling"],
        statistics.mean(exact) if exact else None,
        "; ".join(dict.fromkeys(devices)),
        max(record.get("jobs", 1) for record in everything),
    )


def _device(record: CellRecord) -> str:
    several = f", {record['jobs']} cells at a time" if record.get("jobs", 1) > 1 else ""
    return f"{record['device']}, threads: {record['threads']}{several}"


def _row(method: str, records: Sequence[CellRecord]) -> Row:
    done = [record for record in records if record["status"] == "finished"]
    tests = [record["test"] for record in done]

    def mean(values: Iterable[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return statistics.mean(known) if known else None

    values = [test["value"] for test in tests]
    squares = mean(None if (e := test["standard_error"]) is None else e**2 for test in tests)
    return Row(
        method,
        len(done),
        ", ".join(dict.fromkeys(test["known"] for test in tests)),
        mean(values),
        statistics.stdev(values) if len(values) > 1 else None,
        None if squares is None else squares**0.5,
        mean(test["lower"] for test in tests),
        mean(test["upper"] for test in tests),
        mean(record["steps"] for record in done),
        mean(record["seconds"] for record in done),
        mean(record["startup_seconds"] for record in done),
        mean(record["steps_per_second"] for record in done),
        tuple(record["reason"] for record in records if record["status"] == "failed"),
    )


@final
@dataclass(frozen=True)
class _Column:
    title: str
    meaning: str
    text: Callable[[Row, Group], str]
    shown: Callable[[Row, Group], bool] = lambda row, group: True


def _decimals(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}".replace("-", "\N{MINUS SIGN}")


def _count(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def _value(row: Row, group: Group) -> str:
    if row.value is None:
        return "failed"
    return _decimals(row.value) + (f" ± {row.spread:.3f}" if row.spread is not None else "")


def _below(row: Row, group: Group) -> str:
    both = row.value is not None and group.exact is not None
    return _decimals(group.exact - row.value) if both else ""  # type: ignore[operator]


def _bounds(row: Row, group: Group) -> str:
    ends = [_decimals(end) or "?" for end in (row.lower, row.upper)]
    return " to ".join(ends) if _has_bounds(row, group) else ""


def _has_bounds(row: Row, group: Group) -> bool:
    return row.lower is not None or row.upper is not None


_COLUMNS = (
    _Column("method", "", lambda row, group: row.method),
    _Column(
        "test log-likelihood",
        "nats per row, mean over the seeds; ± is the standard deviation over the seeds. Marked: the "
        "highest, and those less than two standard errors below it, of seeds and annealed estimates; "
        "with one seed it is not known how much is chance",
        _value,
    ),
    _Column(
        "below exact ML",
        "how far below exact maximum likelihood trained alike; negative: above",
        _below,
        lambda row, group: group.exact is not None,
    ),
    _Column("known as", "how the likelihood is known", lambda row, group: row.known),
    _Column(
        "standard error",
        "of an annealed estimate of log Z",
        lambda row, group: _decimals(row.standard_error),
        lambda row, group: row.standard_error is not None,
    ),
    _Column(
        "between",
        "bounds from chains in both directions, three standard errors wide",
        _bounds,
        _has_bounds,
    ),
    _Column("seeds", "trainings that finished", lambda row, group: str(row.seeds)),
    _Column("steps", "of the upper level", lambda row, group: _count(row.steps)),
    _Column(
        "seconds",
        "of one training, without evaluation and without the first step; of cells that were trained at "
        "the same time (above the table) these say nothing about speed",
        lambda row, group: _count(row.seconds),
    ),
    _Column(
        "first step",
        "its seconds: compilation, where it is switched on",
        lambda row, group: _count(row.startup_seconds),
    ),
    _Column("steps/s", "without the first step", lambda row, group: _count(row.steps_per_second)),
)


def table(group: Group) -> tuple[list[str], list[list[str]]]:
    """The head and the lines of a table, as text: the independent model, the ceiling, the methods."""
    columns = [c for c in _COLUMNS if any(c.shown(row, group) for row in group.rows)]
    lines = [[column.text(row, group) for column in columns] for row in group.rows]
    known = (
        ("independent columns", group.independent),
        ("negative entropy of the data", group.ceiling),
    )
    top = [
        [name, _decimals(value)] + [""] * (len(columns) - 2)
        for name, value in known
        if value is not None
    ]
    lines = top + lines
    return [column.title for column in columns], lines


def meanings(found: Iterable[Group]) -> dict[str, str]:
    """What the columns of these tables say."""
    shown = {title for group in found for title in table(group)[0]}
    return {c.title: c.meaning for c in _COLUMNS if c.title in shown and c.meaning}


def failures(group: Group) -> list[str]:
    """A sentence per training that failed."""
    return [f"{row.method}: {reason}" for row in group.rows for reason in row.failures]


def markdown(found: Sequence[Group]) -> str:
    """All tables as Markdown."""
    parts = []
    for group in found:
        head, lines = table(group)
        lines = [[line[0], _marked(group, line, "**"), *line[2:]] for line in lines]
        rows = [head, ["---"] + ["---:"] * (len(head) - 1), *lines]
        drawn = "\n".join("| " + " | ".join(row) + " |" for row in rows)
        failed = "".join(f"\nFailed: {sentence}\n" for sentence in failures(group))
        parts.append(f"**{group.title}** ({group.device})\n\n{drawn}\n{failed}")
    return "\n".join(parts)


def _marked(group: Group, line: Sequence[str], mark: str) -> str:
    """The likelihood in a line, between marks if it is among the best."""
    return f"{mark}{line[1]}{mark}" if line[0] in group.best else line[1]


def as_html(group: Group) -> str:
    """One table as HTML, and what failed."""
    head, lines = table(group)
    top = "".join(f'<th scope="col">{html.escape(title)}</th>' for title in head)
    body = "".join(
        f'<tr><th scope="row" class="run">{html.escape(line[0])}</th>'
        + "".join(
            f'<td class="number">{_strong(html.escape(text), k == 0 and line[0] in group.best)}</td>'
            for k, text in enumerate(line[1:])
        )
        + "</tr>"
        for line in lines
    )
    failed = "".join(f"<p>Failed: {html.escape(text)}</p>" for text in failures(group))
    return (
        f'<div class="wide" role="region" tabindex="0" aria-label="{html.escape(group.title)}">'
        f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"
        f"{failed}{_about_times(group)}"
    )


def _about_times(group: Group) -> str:
    if group.at_once == 1:
        return ""
    return (
        f"<p>Times were taken with {group.at_once} cells at once on one machine: they are no measure of "
        "speed.</p>"
    )


def _strong(text: str, best: bool) -> str:
    return f"<strong>{text}</strong>" if best else text


_SHORT = ("method", "test log-likelihood", "below exact ML", "known as", "seeds", "seconds")


def for_terminal(group: Group) -> tuple[list[str], list[list[str]]]:
    """The head and the lines of a table that fits a terminal; a star marks the best."""
    head, lines = table(group)
    kept = [k for k, title in enumerate(head) if title in _SHORT]
    starred = [
        [line[0], line[1] + (" *" if line[0] in group.best else "  "), *line[2:]] for line in lines
    ]
    return [head[k] for k in kept], [[line[k] for k in kept] for line in starred]

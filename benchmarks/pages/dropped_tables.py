"""The tables of `benchmarks.dropped_term`, from its records."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import mean, median

from benchmarks.measuring.records import Record
from benchmarks.pages.dropped_records import SOLVERS, by_problem, per_seed, title
from benchmarks.pages.markdown import table, where

QUANTITIES = {
    "ratio": "dropped / kept",
    "angle_cosine": "cosine between them",
    "kept_along": "kept along exact",
    "whole_along": "both along exact",
}
TENSORS = ("weight", "latent_bias", "visible_bias", "log_scale")
Rows = dict[str, list[str]]


def dropped_table(path: Path) -> str:
    """Final likelihoods, times, and what the probe saw along the run of `Alternating`."""
    found = {title(solvers): solvers for solvers in by_problem(path).values()}
    some = {name: next(iter(solvers.values())) for name, solvers in found.items()}
    known = [name for name, one in some.items() if one["case"].startswith("tables")]
    along = {name: solvers["Alternating"] for name, solvers in found.items()}

    def by_solver(cell: Callable[[Record | None], str], names: Iterable[str]) -> Rows:
        return {name: [cell(found[name].get(solver)) for solver in SOLVERS] for name in names}

    final = by_solver(likelihood, found)
    return "\n".join(
        [
            where(next(iter(some.values()))),
            *grid(
                "Exact log-likelihood at the end: mean (smallest to largest) of three seeds.",
                ("steps", "ceiling", *SOLVERS),
                {
                    name: [str(one["steps"]), ceiling(one), *final[name]]
                    for name, one in some.items()
                },
            ),
            *grid(
                "Where the ceiling is reached: the first of 15 looks within 0.01 nats of it, and "
                "seconds.",
                SOLVERS,
                by_solver(reached, known),
            ),
            *grid(
                "Milliseconds of the processor per upper step, its K lower steps included (tables: "
                "eager, three seeds together; the others: compiled).",
                SOLVERS,
                by_solver(milliseconds, found),
            ),
            *grid(
                "What the probe saw along the run of `Alternating`: medians over seeds and over the "
                "looks from the square root of the number of steps on.",
                tuple(QUANTITIES.values()),
                {name: [probed(one, q) for q in QUANTITIES] for name, one in along.items()},
            ),
            *grid(
                "The norm of the dropped term relative to the whole gradient, tensor by tensor "
                "(likewise).",
                TENSORS,
                {
                    name: [probed(one, "shares", f"model.{tensor}") for tensor in TENSORS]
                    for name, one in along.items()
                    if "shares" in one["runs"][0][0]["probe"][0]
                },
            ),
        ]
    )


def grid(caption: str, columns: Sequence[str], rows: Rows) -> list[str]:
    """A table of problems with its caption; nothing if it has no rows."""
    if not rows:
        return []
    cells = ([name, *row] for name, row in rows.items())
    return ["", caption, "", *table(("problem", *columns), cells)]


def ceiling(record: Record) -> str:
    """The largest log-likelihood, if it is known."""
    return "-" if record["ceiling"] is None else f"{record['ceiling']:.2f}"


def likelihood(record: Record | None) -> str:
    """Mean and range of the last log-likelihood over the seeds."""
    if record is None:
        return "-"
    if record["diverged"]:
        return f"NaN at step {record['diverged']['step']}"
    last = [curve[-1][2] for curve in per_seed(record, "log_likelihood")]
    return f"{mean(last):.2f} ({min(last):.2f} to {max(last):.2f})"


def reached(record: Record | None, within: float = 0.01) -> str:
    """The first look at which the mean over seeds is near the ceiling, and the seconds until then."""
    if record is None or record["diverged"]:
        return "-"
    curves = per_seed(record, "log_likelihood")
    for look in zip(*curves, strict=True):
        if mean(value for *_, value in look) >= record["ceiling"] - within:
            return f"{look[0][0]} ({look[0][1]:.1f} s)"
    return "not yet"


def milliseconds(record: Record | None) -> str:
    """Of one upper step with its lower steps."""
    if record is None or record["diverged"]:
        return "-"
    return f"{1e3 * mean(p[-1]['seconds'] / p[-1]['step'] for p in record['runs']):.2f}"


def probed(record: Record, *names: str) -> str:
    """The median over seeds and over the looks in the second half of the logarithmic scale."""
    values = []
    for curve in per_seed(record, "probe"):
        for step, _, probe in curve:
            if step**2 >= record["steps"]:
                for name in names:
                    probe = probe[name]
                values.append(probe)
    known = [value for value in values if value is not None]
    return f"{median(known):.2f}" if known else "-"

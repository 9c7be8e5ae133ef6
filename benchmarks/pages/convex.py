"""The table of `benchmarks.convex` and of `benchmarks.convex_jax`, from their newest records."""

from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.measuring.records import Record, newest
from benchmarks.pages.markdown import formatted

LEVELS = (1e-3, 1e-6, 1e-9)
COLUMNS = (
    ("solver", "{solver}"),
    ("step size", "{step_size:g}"),
    ("ratio", "{ratio:g}"),
    ("seeds", "{seeds}"),
    ("calls to 1e-3", "{calls[0]}"),
    ("to 1e-6", "{calls[1]}"),
    ("to 1e-9", "{calls[2]}"),
    ("error at the end", "{error:.1e}"),
    ("worst seed", "{worst:.1e}"),
    ("ms a step", "{ms:.2f}"),
)
BESIDE = (
    ("solver", "{solver}"),
    ("ours", "{how}"),
    ("steps to 1e-9: ours", "{ours_steps}"),
    ("theirs", "{their_steps}"),
    ("calls, ours / theirs", "{calls}"),
    ("error at the end: ours", "{ours_error:.1e}"),
    ("theirs", "{their_error:.1e}"),
    ("ms a step: ours", "{ours_ms:.2f}"),
    ("theirs", "{their_ms:.2f}"),
    ("time, ours / theirs", "{time:.2f}"),
    ("apart on all samples", "{difference:.0e}"),
)


def runs(path: Path) -> dict[str, list[Record]]:
    """The newest records of every solver's best setting: those with the most calls."""
    names = ("solver", "seed", "step_size", "ratio", "calls")
    found = newest(path, lambda r: tuple(r[name] for name in names)).values()
    most = max(r["calls"] for r in found)
    by_solver: dict[str, list[Record]] = {}
    for record in found:
        if record["calls"] == most:
            by_solver.setdefault(record["solver"], []).append(record)
    return by_solver


def reached(record: Record, level: float) -> float:
    """The oracle calls after which the error is below a level and stays there; infinite for never."""
    calls = float("inf")
    for _, at, _, error in reversed(record["points"]):
        if not error < level:
            break
        calls = at
    return calls


def row(solver: str, records: list[Record]) -> dict[str, Any]:
    """One solver's line."""
    errors = [r["points"][-1][3] for r in records]
    calls = [median(reached(r, level) for r in records) for level in LEVELS]
    per_step = [1e3 * r["points"][-1][2] / r["points"][-1][0] for r in records]
    return {
        "solver": solver,
        "step_size": records[0]["step_size"],
        "ratio": records[0]["ratio"],
        "seeds": len(records),
        "calls": ["-" if c == float("inf") else f"{c:,.0f}" for c in calls],
        "goal": calls[-1],
        "error": median(errors),
        "worst": max(errors),
        "ms": median(per_step),
    }


def convex_table(path: Path) -> str:
    """Calls to reach an error, the error at the end, time."""
    found = runs(path)
    rows = sorted((row(*item) for item in found.items()), key=lambda r: (r["goal"], r["error"]))
    one = max((r for records in found.values() for r in records), key=lambda r: str(r["time"]))
    floor = median(r["floor"] for records in found.values() for r in records)
    return "\n".join(
        [
            f"{one['calls']:,} oracle calls, medians over the seeds; the solution in single precision "
            f"has {floor:.1e}; one thread, {one['device']}, torch {one['versions']['torch']}, commit "
            f"{one['commit']}",
            "",
            *formatted(COLUMNS, rows, left=(0,)),
        ]
    )


def beside(record: Record) -> dict[str, Any]:
    """One line of the comparison with JAX: until both errors are below the goal, or to the end."""
    found: dict[str, Any] = {
        "solver": record["solver"],
        "how": "compiled" if record["compile"] else "eager",
        "difference": record["difference"],
    }
    steps, seconds = {}, {}
    for side, name in (("ours", "ours"), ("theirs", "their")):
        curve = record["curves"][side]
        below = [point for point in curve if point[2] < record["goal"]]
        last = below[0] if below else curve[-1]
        steps[side], seconds[side] = last[0], last[1]
        found |= {
            f"{name}_steps": f"{last[0]:,}" if below else "-",
            f"{name}_error": curve[-1][2],
            f"{name}_ms": 1e3 * curve[-1][1] / curve[-1][0],
        }
    reached = "-" not in (found["ours_steps"], found["their_steps"])
    found["calls"] = f"{steps['ours'] / steps['theirs']:.2f}" if reached else "-"
    return {**found, "time": seconds["ours"] / seconds["theirs"]}


def convex_jax_table(path: Path) -> str:
    """Our solvers beside those of benchmark_bilevel, in turns."""
    found = newest(path, lambda r: (r["solver"], r["compile"]))
    one = next(iter(found.values()))
    versions = ", ".join(f"{name} {number}" for name, number in one["jax_versions"].items())
    return "\n".join(
        [
            f"Matrices for samples, single precision, one thread of one core, processor seconds; torch "
            f"{one['versions']['torch']}, {versions}; {one['device']}, commit {one['commit']}",
            "",
            *formatted(BESIDE, map(beside, found.values()), left=(0, 1)),
        ]
    )

"""What `benchmarks.dropped_term` recorded, by problem and solver."""

from pathlib import Path
from typing import Any, TypeAlias

from benchmarks.measuring.records import Record, newest

REFERENCE = "no lower level"
SOLVERS = ("Alternating", "Unrolled(1)", "Unrolled(5)", "Unrolled(20)", "Implicit", REFERENCE)
ORDER = (
    "tables-kl-1",
    "tables-kl-10",
    "tables-symmetric-1",
    "tables-symmetric-10",
    "limited-kl-1",
    "limited-kl-10",
    "limited-symmetric-1",
    "limited-symmetric-10",
    "rbm-kl",
    "rbm-symmetric",
    "bism-checkerboard-exact",
    "bism-checkerboard-sampled",
    "bism-moons-exact",
)

BySolver: TypeAlias = dict[str, Record]


def by_problem(path: Path) -> dict[str, BySolver]:
    """The newest record of every problem and solver, of the problems with all that a page shows."""
    found: dict[str, BySolver] = {}
    for (case, solver), record in newest(path, lambda r: (r["case"], r["solver"])).items():
        found.setdefault(case, {})[solver] = record
    return {name: found[name] for name in ORDER if "Alternating" in found.get(name, {})}


def per_seed(record: Record, field: str) -> list[list[tuple[int, float, Any]]]:
    """(step, seconds, value) of each seed, wherever it was trained."""
    return [
        [(p["step"], p["seconds"], p[field][seed]) for p in points]
        for points in record["runs"]
        for seed in range(len(points[0][field]))
    ]


def title(solvers: BySolver) -> str:
    """What the problem is called in a table."""
    text: str = next(iter(solvers.values()))["title"]
    return text

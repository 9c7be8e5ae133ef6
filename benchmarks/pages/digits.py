"""The tables of `benchmarks.digits`, from its newest record."""

from pathlib import Path

from benchmarks.measuring.records import read
from benchmarks.pages.markdown import table, where


def digits_table(path: Path) -> str:
    """Steps per second, and the quality that each seed reached."""
    record = read(path)[-1]
    rates = [(name, f"{rate:.1f}") for name, rate in record["steps_per_second"].items()]
    lines = [
        f"{where(record)}, commit {record['commit']}",
        "",
        *table(("a step of", "steps per second"), rates),
    ]
    runs = record["runs"]
    if runs:
        names = list(runs[0])
        cells = [[f"{run[name]:.4g}" for name in names] for run in runs]
        lines += ["", *table(names, cells, left=())]
    return "\n".join(lines)

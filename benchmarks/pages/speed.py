"""The table of `benchmarks.learner_speed`, from its records."""

from pathlib import Path

from benchmarks.measuring.records import newest
from benchmarks.pages.markdown import table, where

COLUMNS = ("learner", "plain loop", "library", "compiled", "compiled / plain", "compiling")


def speed_table(path: Path) -> str:
    """Steps per second of every learner, each learner's newest record."""
    found = newest(path, lambda record: record["name"])
    some = list(found.values())[-1]
    loads = [record["load"] for record in found.values()]
    rows = [
        (
            name,
            f"{n['plain']:.4g}",
            f"{n['eager']:.4g}",
            f"{n['compiled']:.4g}",
            f"{n['compiled'] / n['plain']:.1f}",
            f"{n['compile_seconds']:.0f}",
            f"{n['difference']:.0e}",
        )
        for name, n in found.items()
    ]
    lines = [
        f"{where(some)}, batches of 100, float32. Steps per second of the processor, median of "
        f"{some['rounds']} turns; load average {min(loads):.1f} to {max(loads):.1f}. *Compiling* in "
        "seconds of the processor, without any cache. *Difference*: of the parameters after three "
        "steps with the same noise.",
        "",
        *table((*COLUMNS, "difference"), rows),
    ]
    return "\n".join(lines)

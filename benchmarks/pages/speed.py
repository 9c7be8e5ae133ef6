"""The table of `benchmarks.learner_speed`, from its records."""

from pathlib import Path

from benchmarks.measuring.records import newest
from benchmarks.pages.markdown import formatted, where

COLUMNS = (
    ("learner", "{name}"),
    ("plain loop", "{plain:.4g}"),
    ("library", "{eager:.4g}"),
    ("compiled", "{compiled:.4g}"),
    ("compiled / plain", "{gain:.1f}"),
    ("compiling", "{compile_seconds:.0f}"),
    ("difference", "{difference:.0e}"),
)


def speed_table(path: Path) -> str:
    """Steps per second of every learner, each learner's newest record."""
    found = list(newest(path, lambda record: record["name"]).values())
    loads = [record["load"] for record in found]
    lines = [
        f"{where(found[-1])}, batches of 100, float32. Steps per second of the processor, median of "
        f"{found[-1]['rounds']} turns; load average {min(loads):.1f} to {max(loads):.1f}. "
        "*Compiling* in seconds of the processor, without any cache. *Difference*: of the parameters "
        "after three steps with the same noise.",
        "",
        *formatted(COLUMNS, [{**n, "gain": n["compiled"] / n["plain"]} for n in found]),
    ]
    return "\n".join(lines)

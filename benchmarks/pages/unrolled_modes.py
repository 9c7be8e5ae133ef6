"""The tables of `benchmarks.unrolled_modes`, from its newest records."""

from pathlib import Path
from typing import Any

from benchmarks.measuring.records import newest
from benchmarks.pages.markdown import formatted, where

MODES = (
    ("mode", "{name}"),
    ("ms a step", "{ms:.1f}"),
    ("reverse = 1", "{ratio:.2f}"),
    ("peak MiB", "{peak:.1f}"),
    ("of reverse", "{share}"),
)


def unrolled_modes_table(path: Path) -> str:
    """Time and memory of the modes, and what products cost."""
    records = newest(path, lambda record: (record["steps"], record.get("forward", False)))
    steps = sorted(count for count, forward in records if count and not forward)
    first = records[steps[0], False]
    loads = [record["load"] for record in records.values()]
    lines = [
        f"{where(first)}, float32, commit {first['commit']}; the middle MLP through SGD with momentum. "
        f"Seconds of the processor, medians of {first['rounds']} rounds in turns; load average "
        f"{min(loads):.1f} to {max(loads):.1f}. *Peak*: all that torch's allocator holds.",
    ]
    for count in steps:
        numbers = records[count, False]["numbers"]
        lines += [
            "",
            f"{count} steps:",
            "",
            *formatted(MODES, list(map(_shared(numbers), numbers))),
        ]
    products = records[0, False]["numbers"]
    told = ", ".join(f"{n['name']} {n['ms']:.1f} ms" for n in products)
    peaks = [
        f"{n['peak_bytes'] / 2**20:.2f} MiB at {count} steps"
        for (count, forward), record in sorted(records.items())
        if forward
        for n in record["numbers"]
    ]
    lines += ["", f"One product with both second derivatives: {told}.", ""]
    lines += [f"Forward mode, one upper variable and 65,536 weights: {', '.join(peaks)}."]
    return "\n".join(lines)


def _shared(numbers: list[dict[str, Any]]) -> Any:
    """A row with its peak as a share of reverse mode's."""
    whole = next(n["peak_bytes"] for n in numbers if n["name"] == "reverse")

    def row(number: dict[str, Any]) -> dict[str, Any]:
        peak = number["peak_bytes"]
        return {**number, "peak": peak / 2**20, "share": f"1 / {whole / peak:.1f}"}

    return row

"""The table of `benchmarks.toy_starts`, from the newest record of each case."""

from pathlib import Path

from benchmarks.measuring.records import newest
from benchmarks.pages.markdown import formatted, where

COLUMNS = (
    ("solver", "{solver}"),
    ("derivative of F in x", "{derivative}"),
    ("mean steps", "{steps:.1f}"),
    ("longest", "{most}"),
    ("mean distance of y to the lower solution", "{residual:.4f}"),
    ("where x ends (starts)", "{places}"),
)


def toy_table(path: Path) -> str:
    """Steps of each solver with the true derivative, and with the released one."""
    records = list(newest(path, lambda r: (r["solver"], r["released"])).values())
    rows = [
        {
            **record,
            "derivative": "as released" if record["released"] else "true",
            "places": ", ".join(f"{x} ({n})" for x, n in record["ends"].items()),
        }
        for record in records
    ]
    last = records[-1]
    lines = [
        f"{last['starts']} starts; {where(last)}, commit {last['commit']}",
        "",
        *formatted(COLUMNS, rows, left=(0, 1, 5)),
    ]
    return "\n".join(lines)

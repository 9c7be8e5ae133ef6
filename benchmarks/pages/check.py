"""The table of `benchmarks.check_seeds`, from its newest record."""

from pathlib import Path

from benchmarks.measuring.records import read
from benchmarks.pages.markdown import formatted, where

VERDICTS = ("agrees", "inconclusive", "disagrees")
COLUMNS = (
    ("answers", "{answers}"),
    ("kind", "{name}"),
    *((verdict, f"{{{verdict}}}") for verdict in VERDICTS),
    ("seconds a check", "{seconds:.2f}"),
)


def seeds_table(path: Path) -> str:
    """What the check said of right answers and of mistakes, over the seeds."""
    record = read(path)[-1]
    none = dict.fromkeys(VERDICTS, 0)
    trials = [
        {**none, **trial, "answers": "right" if trial["right"] else "wrong"}
        for trial in record["trials"]
    ]
    lines = [
        f"{record['seeds']} seeds; {where(record)}, commit {record['commit']}",
        "",
        *formatted(COLUMNS, trials, left=(0, 1)),
    ]
    return "\n".join(lines)

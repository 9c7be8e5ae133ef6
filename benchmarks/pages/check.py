"""The table of `benchmarks.check_seeds`, from its newest record."""

from pathlib import Path

from benchmarks.measuring.records import read
from benchmarks.pages.markdown import table, where

VERDICTS = ("agrees", "inconclusive", "disagrees")


def seeds_table(path: Path) -> str:
    """What the check said of right answers and of mistakes, over the seeds."""
    record = read(path)[-1]
    rows = [
        (
            "right" if trial["right"] else "wrong",
            trial["name"],
            *(str(trial.get(verdict, 0)) for verdict in VERDICTS),
            f"{trial['seconds']:.2f}",
        )
        for trial in record["trials"]
    ]
    lines = [
        f"{record['seeds']} seeds; {where(record)}, commit {record['commit']}",
        "",
        *table(("answers", "kind", *VERDICTS, "seconds a check"), rows, left=(0, 1)),
    ]
    return "\n".join(lines)

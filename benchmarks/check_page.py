"""Markdown tables of `benchmarks.check_seeds` and `benchmarks.small_tables`, from their records."""

import json
from pathlib import Path
from typing import Any


def _newest(path: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8").splitlines()[-1])
    return record


def _head(record: dict[str, Any]) -> str:
    return (
        f"torch {record['versions']['torch']}; {record['device']}, {record['threads']} thread(s), "
        f"commit {record['commit']}"
    )


def seeds_table(path: Path) -> str:
    """What the check said of right answers and of mistakes, over the seeds of the newest record."""
    record = _newest(path)
    lines = [
        f"{record['seeds']} seeds; {_head(record)}",
        "",
        "| answers | kind | agrees | inconclusive | disagrees | seconds a check |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for trial in record["trials"]:
        counts = " | ".join(
            str(trial.get(word, 0)) for word in ("agrees", "inconclusive", "disagrees")
        )
        what = "right" if trial["right"] else "wrong"
        lines.append(f"| {what} | {trial['name']} | {counts} | {trial['seconds']:.2f} |")
    return "\n".join(lines)


def small_tables_table(path: Path) -> str:
    """Test log-likelihoods of default settings beside independent columns, each set's newest."""
    record = _newest(path)
    every = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rows = {row["set"]: row for one in every for row in one["sets"]}
    lines = [
        f"{record['seconds']:g} seconds a method, {record['hidden']} hidden units; {_head(record)}",
        "",
        "| set | columns | independent | AdvIL | steps | GeneralBiDVL | steps |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows.values():
        numbers = " | ".join(
            f"{row[name]:.2f} | {row[f'{name} steps']}" for name in ("AdvIL", "GeneralBiDVL")
        )
        lines.append(f"| {row['set']} | {row['columns']} | {row['independent']:.2f} | {numbers} |")
    return "\n".join(lines)

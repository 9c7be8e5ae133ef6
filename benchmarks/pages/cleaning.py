"""The table of `benchmarks.hyper_cleaning`, beside what was published."""

import statistics
from collections.abc import Iterable
from pathlib import Path

from benchmarks.measuring.records import Record, newest
from benchmarks.pages.markdown import table, where

# accuracy and F1 of MLS-Bench's run of the code released with V-PBGD, on the published lengths
PUBLISHED = {
    ("linear", "RHG"): ("84.6", "89.5"),
    ("linear", "G-PBGD"): ("89.8", "80.6"),
    ("mlp", "G-PBGD"): ("92.4", ""),
}
HEADS = (
    "network",
    "solver",
    "accuracy",
    "F1",
    "seeds",
    "upper steps",
    "published steps",
    "seconds",
    "peak MiB",
    "published accuracy",
    "published F1",
)
_NOTES = (
    "Accuracy on 10,000 test items and F1 score of the items with x >= 0 for the clean ones, both in "
    "percent; mean and, of several seeds, the lowest and highest; all items kept is an F1 of 66.7. "
    "Seconds are those of one core.\n\n"
    "The labels follow the released code: half are drawn anew from all ten classes, so that 45 % "
    "are wrong, and all those drawn anew count as wrong. "
    "These trainings are far shorter than the published ones, and their weights move by Adam where the "
    "released code takes SGD (RHG has its SGD), so that the two pairs of columns are no like for like. "
    "The MLP took too few steps to learn anything: its rows say what a step costs. "
    "Published numbers: as reported by MLS-Bench, which runs the released code on three seeds. "
    "*Clean items alone* trains on the 5,000 clean items of the upper level and ignores the others; "
    "*no cleaning* trains on the noisy ones with equal weights."
)


def cleaning_table(path: Path) -> str:
    """A row for each solver and network, over the seeds."""
    records = list(newest(path, lambda r: (r["data"], r["network"], r["name"], r["seed"])).values())
    groups: dict[tuple[str, str, str], list[Record]] = {}
    for record in records:
        groups.setdefault((record["data"], record["network"], record["name"]), []).append(record)
    rows = [_row(network, name, found) for (_, network, name), found in groups.items()]
    commits = ", ".join(sorted({str(record["commit"]) for record in records}))
    about = f"{records[-1]['data']}; {where(records[-1])}, commit {commits}"
    return "\n".join([about, "", *table(HEADS, rows, left=(0, 1)), "", _NOTES])


def _row(network: str, name: str, found: list[Record]) -> list[str]:
    published = PUBLISHED.get((network, name), ("", ""))
    peaks = [r["peak_bytes"] for r in found if r.get("peak_bytes") is not None]
    there = found[-1].get("published_steps")
    return [
        network,
        name,
        _spread(r["accuracy"] for r in found),
        _spread(r["f1"] for r in found if "f1" in r),
        str(len(found)),
        f"{found[-1]['steps']:,}",
        "" if there is None else f"{there:,}",
        f"{statistics.mean(r['seconds'] for r in found):.1f}",
        f"{max(peaks) / 2**20:.0f}" if peaks else "",
        *published,
    ]


def _spread(numbers: Iterable[float]) -> str:
    """The mean, and the range of several numbers."""
    values = list(numbers)
    if not values:
        return ""
    ends = f" ({min(values):.1f} to {max(values):.1f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{ends}"

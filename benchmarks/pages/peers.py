"""The table of `benchmarks.peers`, from its newest record."""

from pathlib import Path

from benchmarks.measuring.records import read
from benchmarks.pages.markdown import formatted

COLUMNS = (
    ("case", "{case}"),
    ("MLP", "{size}"),
    ("", "{name}"),
    ("ms", "{ms:.2f}"),
    ("by hand = 1", "{ratio:.2f}"),
    ("saved MiB", "{saved}"),
    ("units", "{units}"),
    ("multiple", "{multiple:.2f}"),
    ("difference", "{difference:.0e}"),
)


def peers_table(path: Path) -> str:
    """What a hypergradient costs each competitor."""
    record = read(path)[-1]
    config = record["config"]
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    numbers = [{**n, "saved": mebibytes(n["saved_bytes"])} for n in record["numbers"]]
    lines = [
        f"{versions}; {record['device']}, {record['threads']} thread(s), {config['dtype']}, median of "
        f"{config['repeats']}, commit {record['commit']}",
        "",
        *formatted(COLUMNS, numbers, left=(0, 1, 2)),
    ]
    return "\n".join(lines)


def mebibytes(count: int | None) -> str:
    return "-" if count is None else f"{count / 2**20:.2f}"

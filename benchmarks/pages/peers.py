"""The table of `benchmarks.peers`, from its newest record."""

from pathlib import Path

from benchmarks.measuring.records import read
from benchmarks.pages.markdown import table


def peers_table(path: Path) -> str:
    """What a hypergradient costs each competitor."""
    record = read(path)[-1]
    config = record["config"]
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    columns = ("case", "MLP", "", "ms", "by hand = 1", "saved MiB", "units", "multiple")
    rows = [
        (
            n["case"],
            n["size"],
            n["name"],
            f"{n['ms']:.2f}",
            f"{n['ratio']:.2f}",
            "-" if n["saved_bytes"] is None else f"{n['saved_bytes'] / 2**20:.2f}",
            str(n["units"]),
            f"{n['multiple']:.2f}",
            f"{n['difference']:.0e}",
        )
        for n in record["numbers"]
    ]
    lines = [
        f"{versions}; {record['device']}, {record['threads']} thread(s), {config['dtype']}, median of "
        f"{config['repeats']}, commit {record['commit']}",
        "",
        *table((*columns, "difference"), rows, left=(0, 1, 2)),
    ]
    return "\n".join(lines)

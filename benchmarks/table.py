"""Tables generated from records; nothing in them is typed.

    python -m benchmarks.table

prints them and writes them to `benchmarks/results/tables.md`, which the documentation shows.
"""

import json
from pathlib import Path

from benchmarks.check_page import seeds_table, small_tables_table
from benchmarks.dropped_page import dropped_table
from benchmarks.image_page import image_speed_table, images_table
from benchmarks.likelihood_page import ais_table, reverse_table, suite_table
from benchmarks.speed_page import speed_table

RESULTS = Path(__file__).resolve().parent / "results"


def peers_table(path: Path) -> str:
    """The newest record of `benchmarks.peers` as a Markdown table."""
    record = json.loads(path.read_text(encoding="utf-8").splitlines()[-1])
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    lines = [
        f"{versions}; {record['device']}, {record['threads']} thread(s), "
        f"{record['config']['dtype']}, median of {record['config']['repeats']}, "
        f"commit {record['commit']}",
        "",
        "| case | MLP | | ms | by hand = 1 | saved MiB | units | multiple | difference |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for n in record["numbers"]:
        saved = "-" if n["saved_bytes"] is None else f"{n['saved_bytes'] / 2**20:.2f}"
        lines.append(
            f"| {n['case']} | {n['size']} | {n['name']} | {n['ms']:.2f} | {n['ratio']:.2f} | {saved} "
            f"| {n['units']} | {n['multiple']:.2f} | {n['difference']:.0e} |"
        )
    return "\n".join(lines)


def digits_table(path: Path) -> str:
    """The newest record of `benchmarks.digits` as Markdown tables."""
    record = json.loads(path.read_text(encoding="utf-8").splitlines()[-1])
    rates = record["steps_per_second"]
    lines = [
        f"torch {record['versions']['torch']}; {record['device']}, {record['threads']} thread(s), "
        f"commit {record['commit']}",
        "",
        "| a step of | steps per second |",
        "| --- | ---: |",
        *(f"| {name} | {rate:.1f} |" for name, rate in rates.items()),
    ]
    if record["runs"]:
        names = list(record["runs"][0])
        lines += [
            "",
            "| " + " | ".join(names) + " |",
            "| " + " | ".join("---:" for _ in names) + " |",
        ]
        for run in record["runs"]:
            lines.append("| " + " | ".join(f"{run[name]:.4g}" for name in names) + " |")
    return "\n".join(lines)


def everything() -> str:
    """All tables, newest records only."""
    found = []
    for table, name in ((digits_table, "digits"), (peers_table, "peers")):
        path = RESULTS / f"{name}.jsonl"
        if path.exists():
            found.append(f"## {name.capitalize()}\n\n{table(path)}\n")
    for title, table, name in (
        ("What the dropped term is worth", dropped_table, "dropped_term"),
        ("Steps per second of the learners", speed_table, "learner_speed"),
        ("A step on images", image_speed_table, "image_speed"),
        ("Image models", images_table, "images"),
        ("Annealed importance sampling", ais_table, "ais"),
        ("The reverse KL of a machine", reverse_table, "reverse_kl"),
        ("The check of hypergradients over many seeds", seeds_table, "check_seeds"),
        ("Default settings on small tables", small_tables_table, "small_tables"),
        ("Checkerboard", suite_table, "checkerboard"),
        ("Digits and an RBM", suite_table, "digits_rbm"),
    ):
        path = RESULTS / (name if table is suite_table else f"{name}.jsonl")
        if path.exists():  # a page of the documentation shows what is between the marks
            start, end = (f"<!-- --8<-- [{mark}:{name}] -->" for mark in ("start", "end"))
            found.append(f"## {title}\n\n{start}\n{table(path)}\n{end}\n")
    return "\n".join(found)


if __name__ == "__main__":
    text = everything()
    (RESULTS / "tables.md").write_text(text, encoding="utf-8")
    print(text)

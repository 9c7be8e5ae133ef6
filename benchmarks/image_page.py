"""The tables of `benchmarks.image_speed` and `benchmarks.images`, from their records."""

import json
from pathlib import Path
from typing import Any


def image_speed_table(path: Path) -> str:
    """The newest record of each device and batch size as Markdown tables."""
    lines = path.read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    newest = {(r["device_kind"], r["batch"]): r for r in records}
    return "\n\n".join(_speed(record) for record in newest.values())


def _speed(record: dict[str, Any]) -> str:
    where = record["gpu"] or f"{record['device']}, {record['threads']} threads"
    operations, peak = record["operations"], record["peak_tflops"]
    of_peak = " of peak" if peak else ""
    head = ["step of", "ms", "speed-up", "TFLOP/s", *([of_peak.strip()] if peak else [])]
    table = [
        f"torch {record['versions']['torch']}; {where}; batch {record['batch']}, "
        f"{operations / 1e9:.0f} GFLOP in our step; median of {record['rounds']} rounds, "
        f"commit {record['commit']}; variables differ by {record['difference']:.0e} after a step",
        "",
        "| " + " | ".join(head) + " |",
        "| --- " + "| ---: " * (len(head) - 1) + "|",
    ]
    for n in record["numbers"]:
        rate = operations / n["ms"] * 1e3
        cells = [n["name"], f"{n['ms']:.4g}", f"{n['speedup']:.2f}", f"{rate / 1e12:.3g}"]
        cells += [f"{rate / 1e12 / peak:.0%}"] if peak else []
        table.append("| " + " | ".join(cells) + " |")
    return "\n".join(table)

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


_COLUMNS = {
    "frechet": "Fréchet",
    "kid": "KID",
    "density": "density",
    "coverage": "coverage",
    "smallest_class_share": "rarest class",
    "rmse": "RMSE",
    "auroc_uniform": "AUROC noise",
    "auroc_constant": "constant",
}


def images_table(path: Path) -> str:
    """The newest record of every preset, one Markdown table for each data set and feature space."""
    lines = path.read_text(encoding="utf-8").splitlines()
    newest = {record["preset"]: record for record in map(json.loads, lines)}
    spaces: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in newest.values():
        spaces.setdefault((record["data"], record["features"]), []).append(record)
    return "\n\n".join(_compared(*space, records) for space, records in spaces.items())


def _compared(data: str, features: str, records: list[dict[str, Any]]) -> str:
    results = [record["results"] for record in records]
    known = {name for numbers in results for name in numbers}
    columns = {name: label for name, label in _COLUMNS.items() if name in known}
    others = sorted(n for n in known if n.startswith("auroc_") and n not in _COLUMNS)
    columns |= {name: name.removeprefix("auroc_") for name in others}
    some = records[0]
    real = next((numbers["frechet_reference"] for numbers in results if numbers), float("nan"))
    table = [
        f"{data}; features: {features}. torch {some['versions']['torch']}, "
        f"{some['gpu'] or some['device']}, {some['threads']} thread(s) each; "
        f"{some['samples'] or 'up to 10,000'} samples and images of each set. Training images in the "
        f"place of samples: Fréchet {real:.3g}.",
        "",
        "| preset | steps | seconds | " + " | ".join(columns.values()) + " |",
        "| --- | ---: | ---: " + "| ---: " * len(columns) + "|",
    ]
    for record, numbers in zip(records, results, strict=True):
        if record.get("diverged") is not None:
            empty = "| ".join(["", *(" " for _ in columns)])
            table.append(f"| {record['preset']} | diverged at {record['diverged']:,} | {empty}|")
            continue
        cells = [f"{numbers[name]:.3g}" if name in numbers else "-" for name in columns]
        line = f"| {record['preset']} | {record['steps']:,} | {record['seconds']:.0f} | "
        table.append(line + " | ".join(cells) + " |")
    return "\n".join(table)

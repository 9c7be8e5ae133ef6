"""The tables of `benchmarks.image_speed` and `benchmarks.images`, from their records."""

from pathlib import Path

from benchmarks.measuring.records import Record, newest
from benchmarks.pages.markdown import formatted, row, table


def image_speed_table(path: Path) -> str:
    """The newest record of each device and batch size as Markdown tables."""
    found = newest(path, lambda record: (record["device_kind"], record["batch"]))
    return "\n\n".join(map(_speed, found.values()))


def _speed(record: Record) -> str:
    device = record["gpu"] or f"{record['device']}, {record['threads']} threads"
    operations, peak = record["operations"], record["peak_tflops"]
    numbers = [{**n, "rate": operations / n["ms"] * 1e3 / 1e12} for n in record["numbers"]]
    columns = [
        ("step of", "{name}"),
        ("ms", "{ms:.4g}"),
        ("speed-up", "{speedup:.2f}"),
        ("TFLOP/s", "{rate:.3g}"),
    ]
    if any(n.get("first") for n in numbers):
        columns.append(("first step, s", "{start}"))
        numbers = [{**n, "start": f"{n['first']:.0f}" if n.get("first") else ""} for n in numbers]
    if peak:
        columns.append(("of peak", "{share:.0%}"))
        numbers = [{**n, "share": n["rate"] / peak} for n in numbers]
    lines = [
        f"torch {record['versions']['torch']}; {device}; batch {record['batch']}, "
        f"{operations / 1e9:.0f} GFLOP in our step; median of {record['rounds']} rounds, "
        f"commit {record['commit']}; variables differ by {record['difference']:.0e} after a step",
        "",
        *formatted(columns, numbers),
    ]
    missing = [f"- {name}: {why}" for name, why in record.get("not_done", {}).items()]
    if missing:
        lines += ["", "Not timed:", "", *missing]
    if goal := record.get("goal"):
        best = min(numbers, key=lambda n: n["ms"])
        met = best["ms"] <= goal["ms"] and best["speedup"] >= goal["speedup"]
        lines += [
            "",
            f"Goal: at most {goal['ms']:g} ms and {goal['speedup']:g} x as fast as the first; "
            f"{'met by' if met else 'not met, nearest is'} {best['name']}.",
        ]
    return "\n".join(lines)


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
    spaces: dict[tuple[str, str], list[Record]] = {}
    for record in newest(path, lambda record: record["preset"]).values():
        spaces.setdefault((record["data"], record["features"]), []).append(record)
    return "\n\n".join(_compared(*space, records) for space, records in spaces.items())


def _compared(data: str, features: str, records: list[Record]) -> str:
    results = [record["results"] for record in records]
    known = {name for numbers in results for name in numbers}
    columns = {name: label for name, label in _COLUMNS.items() if name in known}
    others = sorted(n for n in known if n.startswith("auroc_") and n not in _COLUMNS)
    columns |= {name: name.removeprefix("auroc_") for name in others}
    some = records[0]
    real = next((numbers["frechet_reference"] for numbers in results if numbers), float("nan"))
    lines = [
        f"{data}; features: {features}. torch {some['versions']['torch']}, "
        f"{some['gpu'] or some['device']}, {some['threads']} thread(s) each; "
        f"{some['samples'] or 'up to 10,000'} samples and images of each set. Training images in the "
        f"place of samples: Fréchet {real:.3g}.",
        "",
        *table(("preset", "steps", "seconds", *columns.values()), []),
    ]
    return "\n".join([*lines, *(_line(record, columns) for record in records)])


def _line(record: Record, columns: dict[str, str]) -> str:
    if record.get("diverged") is not None:
        return f"| {record['preset']} | diverged at {record['diverged']:,} | |" + "  |" * len(
            columns
        )
    numbers = record["results"]
    cells = [f"{numbers[name]:.3g}" if name in numbers else "-" for name in columns]
    return row([record["preset"], f"{record['steps']:,}", f"{record['seconds']:.0f}", *cells])

"""The table of `benchmarks.learner_speed`, from its records."""

import json
from pathlib import Path


def speed_table(path: Path) -> str:
    """The newest record of every learner of `benchmarks.learner_speed` as a Markdown table."""
    lines = path.read_text(encoding="utf-8").splitlines()
    found = {record["name"]: record for record in map(json.loads, lines)}
    some = list(found.values())[-1]
    loads = [record["load"] for record in found.values()]
    table = [
        f"torch {some['versions']['torch']}; {some['device']}, {some['threads']} thread(s), batches of "
        f"100, float32. Steps per second of the processor, median of {some['rounds']} turns; load "
        f"average {min(loads):.1f} to {max(loads):.1f}. *Compiling* in seconds of the processor, "
        "without any cache. *Difference*: of the parameters after three steps with the same noise.",
        "",
        "| learner | plain loop | library | compiled | compiled / plain | compiling | difference |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, n in found.items():
        table.append(
            f"| {name} | {n['plain']:.4g} | {n['eager']:.4g} | {n['compiled']:.4g} "
            f"| {n['compiled'] / n['plain']:.1f} | {n['compile_seconds']:.0f} "
            f"| {n['difference']:.0e} |"
        )
    return "\n".join(table)

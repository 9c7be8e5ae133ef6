"""Tables generated from records; nothing in them is typed."""

import json
import sys
from pathlib import Path


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


if __name__ == "__main__":
    default = Path(__file__).resolve().parent / "results" / "peers.jsonl"
    print(peers_table(Path(sys.argv[1]) if len(sys.argv) > 1 else default))

"""The tables of `benchmarks.certificate`, from the newest record of each kind."""

from pathlib import Path

from benchmarks.measuring.records import newest
from benchmarks.pages.markdown import formatted, where

_WORDS = ("certified", "suspect", "inconclusive")
_COUNTED = (
    ("trials", "{trials}"),
    *((word, f"{{{word}}}") for word in _WORDS),
    ("wrong", "{wrong}"),
    ("seconds", "{seconds:.2f}"),
)
_BIG = (
    ("lower steps", "{name}"),
    ("cosine", "{cosine:.4f}"),
    ("interval", "{low:.4f} to {high:.4f}"),
    ("in float64", "{true:.4f}"),
    ("norm ratio", "{norm_ratio:.3f}"),
    ("in float64", "{true_ratio:.3f}"),
    ("verdict", "{outcome}"),
    ("seconds", "{seconds:.0f}"),
    ("a hypergradient", "{hypergradient:.1f}"),
)


def certificate_table(path: Path) -> str:
    """What certificates said of mistakes, of right answers, and of a transformer in bfloat16."""
    lines = []
    for kind, record in newest(path, lambda found: found["kind"]).items():
        if kind == "transformer":
            parameters = record["rows"][0]["parameters"]
            lines += [
                f"A transformer of {parameters:,} parameters, in bfloat16; {where(record)}",
                "",
                *formatted(_BIG, record["rows"], left=(0,)),
                "",
            ]
            continue
        what = {"mistakes": "mistake", "table": "solver"}[kind]
        columns = ((what, "{name}"), *_COUNTED)
        lines += [
            f"{kind.capitalize()}: {record['seeds']} seeds; {where(record)}, commit {record['commit']}",
            "",
            *formatted(columns, record["rows"], left=(0,)),
            "",
        ]
    return "\n".join(lines).rstrip()

"""The figures of `benchmarks.dropped_term`, from its records.

    python -m benchmarks.dropped_page [--into FOLDER]

draws `dropped_term.png` (likelihoods) and `dropped_term_probe.png` in `docs/images/` and prints the
tables.
"""

import argparse
from pathlib import Path

from benchmarks.measuring.records import RESULTS
from benchmarks.pages.dropped_figures import draw_likelihoods, draw_probe
from benchmarks.pages.dropped_records import by_problem
from benchmarks.pages.dropped_tables import dropped_table

IMAGES = RESULTS.parent.parent / "docs" / "images"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--into", type=Path, default=IMAGES, metavar="FOLDER")
    into = parser.parse_args().into
    path = RESULTS / "dropped_term.jsonl"
    found = by_problem(path)
    into.mkdir(parents=True, exist_ok=True)
    draw_likelihoods(found, into / "dropped_term.png")
    draw_probe(found, into / "dropped_term_probe.png")
    print(dropped_table(path))


if __name__ == "__main__":
    main()

"""Tables generated from records; nothing in them is typed.

    python -m benchmarks.table

prints them and writes them to `benchmarks/results/tables.md`, which the documentation shows.
"""

from collections.abc import Callable
from pathlib import Path

from benchmarks.measuring.records import RESULTS
from benchmarks.pages.certificate import certificate_table
from benchmarks.pages.check import seeds_table
from benchmarks.pages.cleaning import cleaning_table
from benchmarks.pages.compiled import compiled_table
from benchmarks.pages.convex import convex_jax_table, convex_table
from benchmarks.pages.digits import digits_table
from benchmarks.pages.dropped_tables import dropped_table
from benchmarks.pages.images import image_speed_table, images_table
from benchmarks.pages.likelihood import ais_table, reverse_table, small_tables_table, suite_table
from benchmarks.pages.peers import peers_table
from benchmarks.pages.speed import speed_table
from benchmarks.pages.toy import toy_table
from benchmarks.pages.unrolled_modes import unrolled_modes_table

PAGES: dict[str, tuple[str, Callable[[Path], str]]] = {  # by the file or folder of the records
    "digits.jsonl": ("Digits", digits_table),
    "peers.jsonl": ("Peers", peers_table),
    "compiled_speed.jsonl": ("Compiled hypergradients", compiled_table),
    "unrolled_modes.jsonl": ("Modes of unrolling", unrolled_modes_table),
    "dropped_term.jsonl": ("What the dropped term is worth", dropped_table),
    "learner_speed.jsonl": ("Steps per second of the learners", speed_table),
    "image_speed.jsonl": ("A step on images", image_speed_table),
    "images.jsonl": ("Image models", images_table),
    "ais.jsonl": ("Annealed importance sampling", ais_table),
    "reverse_kl.jsonl": ("The reverse KL of a machine", reverse_table),
    "check_seeds.jsonl": ("The check of hypergradients over many seeds", seeds_table),
    "certificate.jsonl": ("Certificates over many seeds, and of a transformer", certificate_table),
    "toy_starts.jsonl": ("The toy of penalty methods from a thousand starts", toy_table),
    "hyper_cleaning.jsonl": ("Hyper-cleaning of MNIST", cleaning_table),
    "convex.jsonl": ("Stochastic solvers on quadratics", convex_table),
    "convex_jax.jsonl": ("Beside the solvers of benchmark_bilevel", convex_jax_table),
    "small_tables.jsonl": ("Default settings on small tables", small_tables_table),
    "checkerboard": ("Checkerboard", suite_table),
    "digits_rbm": ("Digits and an RBM", suite_table),
}
UNMARKED = {"digits", "peers", "compiled_speed"}  # shown on no page by themselves


def everything() -> str:
    """All tables, newest records only."""
    found = []
    for file, (title, page) in PAGES.items():
        path = RESULTS / file
        if not path.exists():
            continue
        text = page(path)
        if path.stem not in UNMARKED:  # a page of the documentation shows what is between the marks
            start, end = (f"<!-- --8<-- [{mark}:{path.stem}] -->" for mark in ("start", "end"))
            text = f"{start}\n{text}\n{end}"
        found.append(f"## {title}\n\n{text}\n")
    return "\n".join(found)


def main() -> None:
    text = everything()
    (RESULTS / "tables.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()

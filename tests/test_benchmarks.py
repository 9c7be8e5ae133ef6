"""The published tables are those of the committed records."""

from benchmarks.measuring.records import RESULTS
from benchmarks.table import everything


def test_tables_are_generated_from_the_records() -> None:
    assert (RESULTS / "tables.md").read_text(encoding="utf-8") == everything()

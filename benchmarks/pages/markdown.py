"""Markdown tables, and the line above one that says where its numbers are from."""

from collections.abc import Container, Iterable, Sequence
from typing import Any


def table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], *, left: Container[int] = (0,)
) -> list[str]:
    """The lines of a table.

    Args:
        columns: the heads.
        rows: the cells of each row.
        left: columns that are set to the left; the others are numbers.
    """
    rule = ["---" if index in left else "---:" for index in range(len(columns))]
    return [row(columns), row(rule), *map(row, rows)]


def row(cells: Iterable[str]) -> str:
    """One line of a table."""
    return "|".join(["", *(f" {cell} " if cell else " " for cell in cells), ""])


def where(record: dict[str, Any]) -> str:
    """The version of torch, the device and the threads of a record."""
    return f"torch {record['versions']['torch']}; {record['device']}, {record['threads']} thread(s)"

"""Markdown tables, and the line above one that says where its numbers are from."""

from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any


def table(
    heads: Sequence[str], rows: Iterable[Sequence[str]], *, left: Container[int] = (0,)
) -> list[str]:
    """The lines of a table.

    Args:
        heads: of the columns.
        rows: the cells of each row.
        left: columns that are set to the left; the others are numbers.
    """
    rule = ["---" if index in left else "---:" for index in range(len(heads))]
    return [row(heads), row(rule), *map(row, rows)]


def formatted(
    columns: Sequence[tuple[str, str]],
    numbers: Iterable[Mapping[str, Any]],
    *,
    left: Container[int] = (0,),
) -> list[str]:
    """The lines of a table, a row for each dict of numbers.

    Args:
        columns: pairs of a head and the format of its cells, such as `("seconds", "{seconds:.2f}")`.
        numbers: what the formats name.
        left: columns that are set to the left.
    """
    heads, cells = zip(*columns, strict=True)
    return table(heads, ([cell.format_map(n) for cell in cells] for n in numbers), left=left)


def row(cells: Iterable[str]) -> str:
    """One line of a table."""
    return "|".join(["", *(f" {cell} " if cell else " " for cell in cells), ""])


def where(record: Mapping[str, Any]) -> str:
    """The version of torch, the device and the threads of a record."""
    return f"torch {record['versions']['torch']}; {record['device']}, {record['threads']} thread(s)"

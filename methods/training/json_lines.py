"""Records on disk: JSON documents and JSON lines, checked as they come in.

What is written carries a checksum, so that a number that changed on the disk is noticed. Files of
earlier versions have none and are read as they are.
"""

import json
import logging
import zlib
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, final

from pydantic import BaseModel, Field, ValidationError

from bilevel.files import append_text, read_text, write_text

CHECKSUM = "checksum"
_MODEL = TypeVar("_MODEL", bound=BaseModel)
_log = logging.getLogger("bilevel")


@final
class Record(BaseModel, extra="allow"):
    """Plain values of which nothing is known."""


@final
class Line(BaseModel, extra="allow", strict=True):
    """A line of metrics or of evaluations: numbers by name, and how a hypergradient ended."""

    __pydantic_extra__: dict[str, float] = Field(init=False)

    step: int = Field(ge=0)
    seconds: float = Field(0.0, ge=0, allow_inf_nan=False)
    result: str | None = None


def write_document(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON document and its checksum.

    Args:
        path: the file; replaced whole or not at all.
        content: plain values.
    """
    sealed = {**content, CHECKSUM: _sum(content)}
    write_text(path, json.dumps(sealed, indent=2) + "\n")


def read_document(path: Path, kind: type[BaseModel]) -> dict[str, Any]:
    """A JSON document as plain values, after its checksum and the types of its fields were verified.

    Args:
        path: the file.
        kind: its fields.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming what is wrong with it.
    """
    text = read_text(path)
    try:
        content = _parsed(text)
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}, not a record: {{...}}")
        known = content.pop(CHECKSUM, None)
        if known is not None and known != _sum(content):
            raise ValueError(
                "its checksum does not fit its content; it was damaged, or edited: then take the line "
                f"`{CHECKSUM}` out"
            )
        check_fields(kind, content)
    except ValueError as error:
        raise ValueError(f"`{path}` cannot be used: {error}") from None
    return content


def write_lines(path: Path, records: Iterable[Mapping[str, Any]], free: Iterable[str] = ()) -> None:
    """Replace a file of JSON lines, each with its checksum."""
    write_text(path, "".join(_line(record, free) for record in records))


def append_line(path: Path, record: Mapping[str, Any], free: Iterable[str] = ()) -> None:
    """Add a line to a file of JSON lines; if the disk is full the file is as it was."""
    append_text(path, _line(record, free))


def read_lines(path: Path, kind: type[BaseModel], free: Iterable[str] = ()) -> list[dict[str, Any]]:
    """JSON lines as plain values; a last one that was cut off by a crash is left out, with a note.

    Args:
        path: the file; without it there are no lines.
        kind: the fields of a line.
        free: names that the checksums leave out.

    Raises:
        ValueError: naming the line that is damaged.
    """
    if not path.exists():
        return []
    text = read_text(path)
    lines = text.splitlines()
    found: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            found.append(_checked_line(line, kind, free))
        except ValueError as error:
            if number == len(lines) and not text.endswith("\n"):
                note(f"the last line of `{path}` was cut off and is left out")
                break
            raise ValueError(
                f"line {number} of `{path}` is damaged: {error}; restore the file from a copy, or "
                "take the line out"
            ) from None
    return found


def refuse_repeated(path: Path, keys: Iterable[Any], what: str) -> None:
    """Refuse a file that records a thing twice, or steps out of order.

    Raises:
        ValueError: naming both lines.
    """
    lines: dict[Any, int] = {}
    for number, key in enumerate(keys, start=1):
        if key in lines:
            raise ValueError(
                f"lines {lines[key]} and {number} of `{path}` both record {what} {key}; take one out"
            )
        if lines and isinstance(key, int) and key < max(lines):
            raise ValueError(
                f"line {number} of `{path}` records {what} {key} after {what} {max(lines)}; restore "
                "the order of the lines"
            )
        lines[key] = number


def check_fields(kind: type[_MODEL], content: Mapping[str, Any]) -> _MODEL:
    """Plain values as a model.

    Raises:
        ValueError: naming the first fields that do not fit, and what was got.
    """
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        faults = [
            f"`{'.'.join(map(str, e['loc']))}`: {e['msg'].lower()}, got {_short(e['input'])}"
            for e in error.errors()
        ]
        raise ValueError("; ".join(faults[:3])) from None


@cache  # the same file is read several times by one command
def note(text: str) -> None:
    """Log a message that is no error, once."""
    _log.warning("note: %s", text)


def _line(record: Mapping[str, Any], free: Iterable[str]) -> str:
    return json.dumps({**record, CHECKSUM: _sum(record, free)}) + "\n"


def _checked_line(line: str, kind: type[BaseModel], free: Iterable[str]) -> dict[str, Any]:
    record = _parsed(line)
    if not isinstance(record, dict):
        raise ValueError(f"it holds a {type(record).__name__}, not a record: {{...}}")
    known = record.pop(CHECKSUM, None)
    if known is not None and known != _sum(record, free):
        raise ValueError("its checksum does not fit its content")
    check_fields(kind, record)
    return record


def _parsed(text: str) -> Any:
    """JSON, in which no name comes twice.

    Raises:
        ValueError: if it is none.
    """
    try:
        return json.loads(text, object_pairs_hook=_distinct)
    except json.JSONDecodeError as error:
        raise ValueError(f"it is no JSON: {error}") from None
    except RecursionError:
        raise ValueError("it is no JSON of ours: it is nested too deeply") from None


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"`{twice}` is in it twice")
    return found


def _sum(content: Mapping[str, Any], free: Iterable[str] = ()) -> str:
    """CRC-32 of the content without the free names, whatever the order of its names."""
    kept = {name: value for name, value in content.items() if name not in set(free)}
    kept = json.loads(json.dumps(kept))  # as it will be read: names are strings
    text = json.dumps(kept, sort_keys=True, separators=(",", ":"))
    return f"{zlib.crc32(text.encode()):08x}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."

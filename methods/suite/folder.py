"""`SuiteFolder`: where a suite is - its configuration, its records, its cells."""

import math
import os
from pathlib import Path
from typing import Any, final

from bilevel.files import sweep
from bilevel.methods.suite.config import Cell, SuiteConfig, parse_config
from bilevel.methods.training.json_lines import (
    Record,
    append_line,
    note,
    read_document,
    read_lines,
    refuse_repeated,
    write_document,
    write_lines,
)
from bilevel.methods.training.schemas import CellLine


@final
class SuiteFolder:
    """A folder with `suite.json`, `records.jsonl`, a run folder per cell and the report.

    Args:
        folder: where the suite is, or will be.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)

    @property
    def config_path(self) -> Path:
        """The configuration, every short name spelled out."""
        return self.folder / "suite.json"

    @property
    def records_path(self) -> Path:
        """One JSON object per finished or failed cell."""
        return self.folder / "records.jsonl"

    @property
    def exists(self) -> bool:
        """Whether the folder holds a suite."""
        return self.config_path.exists()

    def cell_folder(self, cell: Cell) -> Path:
        """The run folder of a cell."""
        return self.folder.joinpath("cells", *cell.parts)

    def config(self) -> SuiteConfig:
        """The configuration.

        Raises:
            FileNotFoundError: if the folder holds no suite.
        """
        if not self.exists:
            raise FileNotFoundError(f"`{self.folder}` holds no suite: there is no `suite.json`")
        content = read_document(self.config_path, Record)
        return parse_config(content, str(self.config_path))

    def claim(self, config: SuiteConfig) -> None:
        """Make sure that what is here belongs to this configuration; write it if nothing is here.

        Other seeds are no other configuration: they are other cells.

        Raises:
            ValueError: if it differs, naming every difference.
        """
        if self.exists:
            old, new = _flat(self.config()), _flat(config)
            differing = [name for name in {**old, **new} if old.get(name) != new.get(name)]
            if differing:
                shown = "; ".join(
                    f"`{name}` was {old.get(name, 'missing')}, is {new.get(name, 'missing')}"
                    for name in differing[:5]
                )
                more = f"; and {len(differing) - 5} more" if len(differing) > 5 else ""
                raise ValueError(
                    f"`{self.folder}` holds another suite: {shown}{more}. Name another folder with "
                    "`--out`, or change the configuration back"
                )
        records = self.records()
        self.folder.mkdir(parents=True, exist_ok=True)
        sweep(self.folder)
        write_document(self.config_path, config.model_dump(mode="json"))
        # without a line that was cut off, or the next one would be appended to it
        if self.records_path.exists():
            write_lines(self.records_path, records)

    def records(self) -> list[dict[str, Any]]:
        """What is finished or failed, in the order in which it ended.

        Raises:
            ValueError: if a line is damaged, or a cell is there twice.
        """
        records = read_lines(self.records_path, CellLine)
        recorded = [record["cell"] for record in records]
        refuse_repeated(self.records_path, recorded, "the cell")
        home = self.folder / "cells"
        trained = {path.parent.relative_to(home).as_posix() for path in home.glob("*/*/*/*/model")}
        if lost := sorted(trained.difference(recorded)):
            note(
                f"`{self.records_path}` lacks {len(lost)} cells that were trained, the first "
                f"`{lost[0]}`; `bilevel bench` judges them again"
            )
        return records

    def append(self, record: dict[str, Any]) -> None:
        """Add a record; if the disk is full the file is as it was."""
        append_line(self.records_path, record)


def _flat(config: SuiteConfig) -> dict[str, str]:
    """All settings but the seeds, by their place: `blocks.0.methods.2.solver.kind`."""
    found: dict[str, str] = {}

    def visit(value: Any, place: str) -> None:
        if isinstance(value, dict) and value:
            for name, entry in value.items():
                if name != "seeds":
                    visit(entry, f"{place}.{name}" if place else name)
        elif isinstance(value, list) and any(isinstance(entry, dict) for entry in value):
            for index, entry in enumerate(value):
                visit(entry, f"{place}.{index}")
        else:
            found[place] = repr(value)

    visit(config.model_dump(mode="json"), "")
    return found


def finite(value: Any) -> Any:
    """The value with `None` for numbers that JSON cannot hold.

    Example:
        >>> finite({"a": [1.0, math.inf]})
        {'a': [1.0, None]}
    """
    if isinstance(value, dict):
        return {name: finite(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

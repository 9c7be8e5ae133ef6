"""`History`: what a training recorded, how a step becomes a line of it, and lines as data frames."""

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, final

from bilevel import Result, Solver, Step
from bilevel.arguments import explained_methods
from bilevel.cards import Card, curves, digits, numbers_by_name, plural
from bilevel.extras import data_frame
from bilevel.methods.training.curves import draw_panels, evaluation_panels, loss_panels
from bilevel.methods.training.run import Run
from bilevel.refusals import path_of, shown

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame


@final
@explained_methods("plot", "to_frame")
@dataclass(frozen=True)
class History:
    """What training recorded.

    Attributes:
        records: one dict of plain numbers per `log_every` steps.
        steps: upper steps taken in this call.
        seconds: training time of this call.
        evaluations: one dict of plain numbers per `evaluate_every` steps.
        solver: how the hypergradient was computed.
        total: upper steps of the run so far, those before it was resumed included.
        stopped: what ended it early and at which step, a sentence; `None` if it went to its end.
    """

    records: list[dict[str, Any]] = field(default_factory=list)
    steps: int = 0
    seconds: float = 0.0
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    solver: Solver | None = None
    total: int = 0
    stopped: str | None = None

    @property
    def steps_per_second(self) -> float:
        """Speed of this call, evaluation and callbacks excluded."""
        return self.steps / self.seconds if self.seconds else float("nan")

    @classmethod
    def load(cls, run: str | os.PathLike[str]) -> Self:
        """What is recorded in the folder of a run, also while it is still being trained.

        Raises:
            FileNotFoundError: if the folder holds no run.
            ValueError: if a line is damaged, naming it.
        """
        folder = Run(run)
        folder.config()  # refuses what is no run
        records, evaluations = folder.metrics(), folder.evaluations()
        last = max((*records, *evaluations), key=lambda line: line["step"], default={})
        taken = last.get("step", 0)
        return cls(records, taken, last.get("seconds", 0.0), evaluations, total=taken)

    def plot(self) -> "Figure":
        """Losses, norms and evaluations against the step, a panel for each kind of number.

        Returns:
            A figure of matplotlib: a notebook shows it, `.savefig("curves.png")` writes it.

        Raises:
            ValueError: if nothing was recorded.
            ImportError: if matplotlib is not installed.
        """
        panels = [*loss_panels(self.records), *evaluation_panels(self.evaluations)]
        return draw_panels(self._lines(), panels)

    def to_frame(self) -> "DataFrame":
        """One row for each recorded step, with what training and evaluations say of it.

        Raises:
            ImportError: if pandas is not installed.
        """
        return data_frame(self._lines())

    def _lines(self) -> list[dict[str, Any]]:
        """Records and evaluations of the same step as one line."""
        lines: dict[int, dict[str, Any]] = {}
        for line in (*self.evaluations, *self.records):
            lines.setdefault(line["step"], {}).update(line)
        ordered = [lines[step] for step in sorted(lines)]
        return [{"step": line["step"], **line} for line in ordered]

    def __repr__(self) -> str:
        return str(self._card())

    def _repr_html_(self) -> str:
        losses = {
            name: [(line["step"], line[name]) for line in self.records if name in line]
            for name in ("upper_loss", "lower_loss")
        }
        return self._card(curves(losses)).html()

    def _card(self, picture: str = "") -> Card:
        speed = f", {digits(self.steps_per_second)} a second" if self.seconds else ""
        rows = [] if self.stopped is None else [("stopped", self.stopped)]
        rows += [] if self.solver is None else [("solver", repr(self.solver))]
        for said, lines in (("at step", self.records), ("evaluated at", self.evaluations)):
            if lines:
                found = {n: v for n, v in lines[-1].items() if n not in ("step", "seconds")}
                rows.append((f"{said} {lines[-1]['step']:,}", numbers_by_name(found)))
        rows.append(
            (
                "lines",
                f"{plural(len(self.records), 'record')} and {len(self.evaluations)} "
                "of evaluations; `.plot()` and `.to_frame()` show them",
            )
        )
        title = f"History: {plural(self.steps, 'step')} in {digits(self.seconds)} s{speed}"
        return Card(title, rows, picture)


def record(step: Step) -> dict[str, Any]:
    """A step as plain numbers (waits for the device), and how its hypergradient ended if not well."""
    result = step.hypergradient.result
    ended = {} if result is Result.SUCCESS else {"result": result.name.lower()}
    return {"step": step.number, **step.numbers(), **ended}


def load_records(*folders: str | os.PathLike[str]) -> "DataFrame":
    """What runs recorded as one data frame: a row for each run and recorded step.

    The column `run` names it: by its folder, by its place below the folder that was given, or by its
    path where two would have one name. The other columns are `step`, `seconds` and the numbers of
    training and of evaluations by name; what was not measured at a step is missing there.

    Args:
        *folders: folders of runs; or of many, such as that of a suite: all runs below are read.

    Raises:
        FileNotFoundError: if there is no run in a folder.
        ValueError: if no folder is given, or a line is damaged, naming it.
        TypeError: if a folder is no path.
        ImportError: if pandas is not installed.
    """
    if not folders:
        raise ValueError("there is nothing to read; give the folder of a run, or of several")
    for given in folders:
        if isinstance(given, list | tuple):
            raise TypeError(
                f"each folder is an argument of its own, got {shown(given)}: write "
                "`load_records(*folders)`"
            )
    lines = []
    for name, run in _runs([path_of("folders", folder) for folder in folders]):
        lines += [{"run": name, **line} for line in History.load(run)._lines()]
    return data_frame(lines)


def _runs(folders: Iterable[Path]) -> list[tuple[str, Path]]:
    """The folders where they are runs, else the runs below them; each with a name of its own."""
    found: list[tuple[str, Path]] = []
    for folder in folders:
        if Run(folder).exists:
            found.append((folder.resolve().name, folder))
            continue
        below = sorted(path.parent for path in folder.rglob("config.json"))
        if not below:
            raise FileNotFoundError(f"`{folder}` holds no run, and there is none below it")
        found += [(run.relative_to(folder).as_posix(), run) for run in below]
    names = [name for name, _ in found]
    return [(n if names.count(n) == 1 else run.as_posix(), run) for n, run in found]

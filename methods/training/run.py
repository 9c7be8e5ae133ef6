"""`Run`: the folder of one training run - config, metrics, checkpoints, pictures, report."""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import bilevel
from bilevel.checkpoint import glance
from bilevel.files import replacing, sweep
from bilevel.methods.training.json_lines import (
    Line,
    append_line,
    note,
    read_document,
    read_lines,
    refuse_repeated,
    write_document,
    write_lines,
)
from bilevel.methods.training.origin import origin
from bilevel.methods.training.schemas import Best, Config
from bilevel.refusals import path_of

_CLOCK = ("seconds",)  # differs from run to run: the checksums of two equal runs are equal
_LENGTH = ("num_steps", "max_seconds")  # a run may be made longer


@final
class Run:
    """A folder with the configuration, metrics, evaluations, checkpoints, the best and the last model.

    Every file is replaced whole or appended to, so that a process killed at any moment leaves a
    folder that can be resumed.

    Args:
        folder: where the run is, or will be.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = path_of("run", folder)
        self._newest: int | None = None  # step of the newest checkpoint

    @property
    def config_path(self) -> Path:
        """The configuration, plain JSON."""
        return self.folder / "config.json"

    @property
    def metrics_path(self) -> Path:
        """One JSON object per line."""
        return self.folder / "metrics.jsonl"

    @property
    def evaluations_path(self) -> Path:
        """One JSON object per evaluation during training."""
        return self.folder / "evaluations.jsonl"

    @property
    def checkpoint_path(self) -> Path:
        """The newest checkpoint; those before it stand beside it as `step-<number>.pt`."""
        return self.folder / "checkpoints" / "last.pt"

    @property
    def best_path(self) -> Path:
        """The best model that an evaluation met, as `save` writes it, and `best.json`."""
        return self.folder / "best"

    @property
    def model_path(self) -> Path:
        """The trained model, as `save` writes it."""
        return self.folder / "model"

    @property
    def exists(self) -> bool:
        """Whether the folder already holds a run."""
        return self.config_path.exists() or self.metrics_path.exists()

    def claim(self, *, resume: bool, overwrite: bool) -> None:
        """Make sure that this folder may be written.

        Raises:
            FileExistsError: if it holds a run and neither `resume` nor `overwrite` is set.
            FileNotFoundError: if there is nothing to resume.
        """
        if resume:
            if not self.checkpoint_path.exists():
                raise FileNotFoundError(
                    f"there is no run to resume in `{self.folder}`: `{self.checkpoint_path.name}` is "
                    "missing; start it without `resume`"
                )
        elif other := next((p for p in (self.folder, *self.folder.parents) if p.is_file()), None):
            raise FileExistsError(f"`{other}` is a file, so no run can be in `{self.folder}`")
        elif self.exists and not overwrite:
            raise FileExistsError(
                f"`{self.folder}` already holds a run; choose another folder, continue it with "
                "`resume=True` or replace it with `overwrite=True`"
            )

    def begin(self, config: dict[str, Any]) -> None:
        """Start a new run here: write the configuration, drop what an overwritten run left."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._tidy()
        stale = (self.metrics_path, self.evaluations_path, self.checkpoint_path)
        for file in (*stale, *self._earlier()):
            file.unlink(missing_ok=True)
        for folder in (self.best_path, *self._beside_best()):
            shutil.rmtree(folder, ignore_errors=True)
        write_document(self.config_path, {**config, **origin()})

    def config(self) -> dict[str, Any]:
        """The configuration of the run.

        Raises:
            FileNotFoundError: if the folder holds no run.
            ValueError: if the file is damaged, naming what is wrong.
        """
        if not self.config_path.exists():
            raise FileNotFoundError(f"`{self.folder}` holds no run: there is no `config.json`")
        return read_document(self.config_path, Config)

    def prolong(self, training: dict[str, Any]) -> None:
        """Record that a run goes on: after which step, to what length, and that it is not stopped."""
        config = self.config()
        config.pop("stopped", None)
        config["training"] |= {name: training[name] for name in _LENGTH}
        if self._newest is not None:
            config["resumed"] = [*config.get("resumed", []), self._newest]
        write_document(self.config_path, config)

    def stop(self, step: int, by: str) -> None:
        """Record that the training ended before its last step.

        Args:
            step: the last one taken.
            by: what ended it, such as "the clock" or "Ctrl-C".
        """
        config = self.config()
        steps = config["training"]["num_steps"]
        stopped = {"step": step, "num_steps": steps, "by": by}
        write_document(self.config_path, {**config, "stopped": stopped})

    def stopped(self) -> str | None:
        """What ended the training early and at which of how many steps; `None` if it went to its end.

        Of one that was killed, or still runs, the step of the newest checkpoint is told.

        Raises:
            ValueError: if the configuration is damaged.
        """
        config = self.config()
        if (stopped := config.get("stopped")) is not None:
            return sentence(stopped["by"], stopped["step"], stopped["num_steps"])
        steps = config.get("training", {}).get("num_steps")
        if steps is None or not self.checkpoint_path.is_file():
            return None
        try:
            step = int(glance(self.checkpoint_path)["step"])
        except bilevel.CheckpointError:  # nobody who only looks needs it
            return None
        if step >= steps:
            return None
        return f"not ended; the newest checkpoint is that of step {step:,} of {steps:,}"

    def append(self, record: dict[str, Any]) -> None:
        """Add a line of metrics."""
        append_line(self.metrics_path, record, _CLOCK)

    def append_evaluation(self, record: dict[str, Any]) -> None:
        """Add a line of evaluations."""
        append_line(self.evaluations_path, record, _CLOCK)

    def metrics(self) -> list[dict[str, Any]]:
        """All lines of metrics; one that a crash cut off is left out, and missing ones are noted.

        Raises:
            ValueError: if a line is damaged or there twice.
        """
        records = _records(self.metrics_path)
        if not records and self.model_path.exists():
            note(f"`{self.metrics_path}` is missing or empty: nothing is known of the training")
        if records and (missing := self._missing({record["step"] for record in records})):
            note(
                f"`{self.metrics_path}` lacks {len(missing)} of its lines, the first that of step "
                f"{missing[0]}"
            )
        return records

    def _missing(self, there: set[int]) -> list[int]:
        """The steps whose lines should be among the metrics and are not."""
        if not self.config_path.exists():
            return []
        training, last = self.config().get("training", {}), max(there)
        if self.checkpoint_path.is_file():
            last = max(last, int(glance(self.checkpoint_path)["step"]))
        every = training.get("log_every", last)
        due = set(range(every, last + 1, every))
        if last == training.get("num_steps"):
            due.add(last)
        return sorted(due - there)

    def evaluations(self) -> list[dict[str, Any]]:
        """All lines of evaluations; one that a crash cut off is left out, with a note.

        Raises:
            ValueError: if a line is damaged or there twice.
        """
        return _records(self.evaluations_path)

    def rewind(self, step: int) -> None:
        """Forget what was recorded after `step`, that of the newest checkpoint.

        The resumed run records it again. A line of a step at which a run that goes on would have
        written none, because it was stopped there, is forgotten too. The best model stays: it is one
        that was measured.
        """
        self._newest = step
        self._tidy()
        for path in self._earlier():
            if _step_of(path) >= step:  # a second name that a crash left, or of another past
                path.unlink()
        config = self.config() if self.config_path.exists() else {}
        every = config.get("training", {}).get("log_every", 1)
        for path, regular in ((self.metrics_path, every), (self.evaluations_path, 1)):
            if path.exists():
                kept = [r for r in _records(path) if r["step"] <= step and r["step"] % regular == 0]
                write_lines(path, kept, _CLOCK)

    def _tidy(self) -> None:
        """Remove temporary files of a process that was killed."""
        for folder in (self.folder, self.checkpoint_path.parent, self.model_path, self.best_path):
            sweep(folder)

    # ------------------------------------------------------------------ checkpoints

    def checkpoint(self, state: bilevel.State, keep: int = 1) -> None:
        """Write the newest checkpoint, and of those before it keep `keep - 1`.

        `last.pt` is there at every moment: the file it was gets a second name, and the new one, once
        it is whole on the disk, takes the first over.

        Args:
            state: the state of the run.
            keep: number of checkpoints on disk.

        Raises:
            CheckpointError: if a variable is not finite; no checkpoint is lost then.
        """
        if keep > 1 and self._newest is not None and self.checkpoint_path.exists():
            name = self.checkpoint_path.with_name(f"step-{self._newest:08}.pt")
            if not name.exists():
                _second_name(self.checkpoint_path, name)
        state.save(self.checkpoint_path)
        self._newest = state.step
        earlier = self._earlier()
        for path in earlier[: max(0, len(earlier) - (keep - 1))]:
            path.unlink()

    def _earlier(self) -> list[Path]:
        """The checkpoints before the newest, in order."""
        return sorted(self.checkpoint_path.parent.glob("step-*.pt"))

    # ------------------------------------------------------------------ the best model

    def keep_best(self, save: Callable[[Path], None], record: dict[str, Any], rule: str) -> None:
        """Replace the best model: weights and record together, or neither.

        Args:
            save: writes the model into a folder.
            record: the evaluation that made it the best.
            rule: by which it is the best, in words.
        """
        self._mend_best()
        fresh, old = self._beside_best()
        save(fresh)
        content = {"step": record["step"], "rule": rule, "evaluation": record}
        write_document(fresh / "best.json", content)
        if self.best_path.exists():
            os.replace(self.best_path, old)
        os.replace(fresh, self.best_path)
        shutil.rmtree(old, ignore_errors=True)

    def best(self) -> dict[str, Any] | None:
        """The evaluation of the best model, `None` as long as there is none.

        Raises:
            ValueError: if what says how good it was is damaged or missing.
        """
        self._mend_best()
        path = self.best_path / "best.json"
        if not self.best_path.exists():
            return None
        if not path.exists():
            raise ValueError(
                f"`{self.best_path}` has no `best.json`, so how good the model in it was is unknown; "
                "restore it, or remove the folder"
            )
        record: dict[str, Any] = read_document(path, Best)["evaluation"]
        return record

    def _beside_best(self) -> tuple[Path, Path]:
        """Where the next best model is written, and where the one before waits to be removed."""
        return self.folder / ".best.new", self.folder / ".best.old"

    def _mend_best(self) -> None:
        """Finish or undo a replacement that was cut short."""
        fresh, old = self._beside_best()
        if old.exists() and not self.best_path.exists():
            os.replace(old, self.best_path)
        for left in (fresh, old):
            shutil.rmtree(left, ignore_errors=True)


@final
@dataclass(frozen=True)
class Destination:
    """Where a training is written, and whether it begins or goes on there.

    Attributes:
        run: the folder; nothing is written without.
        resume: go on from the newest checkpoint in it.
        overwrite: replace the run in it.
        notes: plain values to keep in the configuration.
    """

    run: str | os.PathLike[str] | None = None
    resume: bool = False
    overwrite: bool = False
    notes: dict[str, Any] | None = None

    @property
    def folder(self) -> Run | None:
        """The folder of the run, if there is to be one."""
        return None if self.run is None else Run(self.run)

    @property
    def taken(self) -> int:
        """Steps that the run has taken before it goes on: that of its newest checkpoint."""
        there = self.folder if self.resume else None
        if there is None or not there.checkpoint_path.is_file():
            return 0
        return int(glance(there.checkpoint_path)["step"])


def sentence(by: str, step: int, steps: int) -> str:
    """How a training that was stopped early is told of.

    Example:
        >>> sentence("the clock", 231, 2000)
        'stopped by the clock at step 231 of 2,000'
    """
    return f"stopped by {by} at step {step:,} of {steps:,}"


def _records(path: Path) -> list[dict[str, Any]]:
    records = read_lines(path, Line, _CLOCK)
    refuse_repeated(path, (record["step"] for record in records), "step")
    return records


def _step_of(path: Path) -> int:
    """The step in the name of an earlier checkpoint."""
    digits = path.stem.removeprefix("step-")
    return int(digits) if digits.isdigit() else -1


def _second_name(path: Path, name: Path) -> None:
    """The same file under another name too; a copy where the file system has no links."""
    try:
        os.link(path, name)
    except OSError:
        with replacing(name, path.stat().st_size) as copy, open(path, "rb") as file:
            shutil.copyfileobj(file, copy)

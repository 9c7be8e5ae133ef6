"""`Journal`: what a training writes down as it goes, in memory or in the folder of its run."""

import contextlib
import copy
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import torch

from bilevel import CheckpointError, Step
from bilevel.checkpoint import read_checkpoint
from bilevel.distributed import is_main
from bilevel.methods.training import best
from bilevel.methods.training.history import History, record
from bilevel.methods.training.logged import Logged
from bilevel.methods.training.progress import why_stopped
from bilevel.methods.training.run import Run, sentence
from bilevel.methods.training.settings import Training
from bilevel.methods.training.trainable import Evaluate, Trainable
from bilevel.refusals import shown


@final
class Journal:
    """The record of one training: metrics, evaluations, checkpoints, the best and the last model.

    With a folder, everything is written there and nothing is held in memory. Of several processes the
    first one writes.

    Args:
        model: what is trained.
        training: says what is due when.
        folder: of the run, if there is one.
        evaluate: measures a copy of the model every `evaluate_every` steps.
        logged: the loggers that are told.
    """

    def __init__(
        self,
        model: Trainable,
        training: Training,
        folder: Run | None,
        evaluate: Evaluate | None,
        logged: Logged,
    ) -> None:
        self.model = model
        self.training = training
        self.folder = folder
        self.evaluate = evaluate
        self.logged = logged
        self._records: list[dict[str, Any]] = []
        self._evaluations: list[dict[str, Any]] = []
        self._before = 0  # steps taken before this training went on
        self._last: Step | None = None

    def open(self, step: Step, *, resume: bool) -> None:
        """Take note of a step; where it is the first of a resumed run, forget what came after it."""
        if self._last is None:
            self._before = step.number - 1
            if self.folder is not None and resume and is_main():
                self.folder.rewind(self._before)
                self.folder.prolong(self.training.model_dump(mode="json"))
        self._last = step

    def write(self, step: Step, *, ended: bool) -> None:
        """Write down what is due after this step."""
        every = self.training.evaluate_every or 1
        asked = self.evaluate if is_main() and step.number % every == 0 else None
        looked = self.logged.due(step.number, ended=ended)
        side = _copy(self.model, step) if asked or looked else None
        measured = None if side is None or asked is None else _measured(side, step, asked)
        certified = step.certificate is not None
        due = ended or certified or step.number % self.training.log_every == 0
        line = record(step) if due else None
        if self.folder is not None:
            self._to_disk(self.folder, step, line, measured, ended)
        else:
            self._records += [line] if line is not None else []
            self._evaluations += [measured.record] if measured is not None else []
        if line is not None:
            self.logged.line(line)
        if measured is not None:
            self.logged.evaluation(measured.record)
        if looked and side is not None:
            self.logged.pictures(side, step.number)

    def diverged(self) -> None:
        """Record that no step came after the last, because a loss was not finite."""
        if self._last is not None and self.folder is not None and is_main():
            self.folder.stop(self._last.number, "divergence")

    def close(self) -> History:
        """Leave the model as it is to be used, save it, and tell what was recorded."""
        self.model.eval()
        if self.training.ema is not None:
            self.model.load_state_dict(_average(self._last, self.folder))
        if self.folder is not None and is_main():
            self.model.save(self.folder.model_path)
        records, evaluations = self._records, self._evaluations
        if self.folder is not None:
            records, evaluations = self.folder.metrics(), self.folder.evaluations()
        if self._last is None:  # a finished run was resumed
            return History(records, evaluations=evaluations, total=self.training.num_steps)
        number, seconds = self._last.number, self._last.seconds
        by = why_stopped(self._last, self.training)
        if by is not None and self.folder is not None and is_main():
            self.folder.stop(number, by)
        stopped = None if by is None else sentence(by, number, self.training.num_steps)
        taken = number - self._before
        return History(records, taken, seconds, evaluations, total=number, stopped=stopped)

    def _to_disk(
        self,
        folder: Run,
        step: Step,
        line: dict[str, Any] | None,
        measured: "_Measured | None",
        ended: bool,
    ) -> None:
        """Everything a step leaves on disk.

        The checkpoint comes last: whatever was recorded up to it is there when the run is resumed from
        it.
        """
        due = ended or step.number % self.training.checkpoint_every == 0
        if not is_main():
            if due:
                step.state.save(folder.checkpoint_path)  # takes part; the first process writes
            return
        if line is not None:
            folder.append(line)
        if measured is not None:
            folder.append_evaluation(measured.record)
            self._keep_best(folder, measured)
        if due:
            # variables that are not finite: the next step's losses say so better, if there is one
            with contextlib.nullcontext() if ended else contextlib.suppress(CheckpointError):
                folder.checkpoint(step.state, self.training.keep_checkpoints)

    def _keep_best(self, folder: Run, measured: "_Measured") -> None:
        rule = best.criterion_of(self.training.best, measured.record)
        if rule is None:
            warnings.warn(best.unknown(measured.record), stacklevel=2)
        elif rule.better(measured.record, folder.best()):
            folder.keep_best(measured.model.save, measured.record, str(rule))


@final
@dataclass(frozen=True)
class _Measured:
    """An evaluation, and the copy of the model that was evaluated."""

    model: Trainable
    record: dict[str, Any]


def _copy(model: Trainable, step: Step) -> Any:
    """A copy to look at; `None` if its weights are not finite, which the next losses will report."""
    side: Any = copy.deepcopy(model if step.state.average is None else step.state.average)
    if not all(bool(p.isfinite().all()) for p in side.parameters()):
        return None
    side.eval().in_data_units()
    return side


def _measured(model: Trainable, step: Step, evaluate: Evaluate) -> _Measured:
    """Evaluate a copy."""
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices):
            results = evaluate(model)
    except Exception as error:
        error.add_note(f"in the evaluation after step {step.number}")
        raise
    if not isinstance(results, Mapping):
        raise TypeError(
            '`evaluate` must return a dict of numbers by name, such as `{"my_number": 1.5}`, got '
            f"{shown(results)}"
        )
    numbers = {name: _number(name, value) for name, value in results.items()}
    return _Measured(model, {"step": step.number, "seconds": round(step.seconds, 4), **numbers})


def _number(name: Any, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            f"`evaluate` must return one number by each name, got {shown(value)} for {name!r}"
        ) from None


def _average(step: Step | None, folder: Run | None) -> dict[str, Any]:
    """The averaged weights; of a finished run that was resumed, those in its checkpoint."""
    if step is not None:
        assert step.state.average is not None
        return step.state.average.state_dict()
    assert folder is not None
    weights: dict[str, Any] = read_checkpoint(folder.checkpoint_path, "cpu")["average"]
    return weights

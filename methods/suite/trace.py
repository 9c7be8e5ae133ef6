"""`Trace`: the test log-likelihood at some steps of a training, and a clock that survives a restart."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, final

import numpy as np

from bilevel import Step
from bilevel.methods.training.json_lines import (
    append_line,
    read_lines,
    refuse_repeated,
    write_lines,
)
from bilevel.methods.training.schemas import TraceLine
from bilevel.methods.training.settings import Training

_FIRST = 1000  # the first evaluation comes after this fraction of all steps


@final
class Trace:
    """A callback of `fit` that evaluates at log-spaced steps and ends the training when its time is up.

    It writes a line at every evaluation and before every checkpoint, so that a resumed run finds the
    time that had passed at the step it goes on from. What the run took after that step before it was
    stopped is forgotten, like its steps.

    Args:
        path: file of JSON lines.
        training: of the run.
        points: how many evaluations.
        evaluate: the test log-likelihood of the model as it is.
    """

    def __init__(
        self, path: Path, training: Training, points: int, evaluate: Callable[[], float]
    ) -> None:
        self.path = path
        self.training = training
        self.steps = log_spaced(training.num_steps, points)
        self.evaluate = evaluate
        self._before: dict[str, Any] = {"seconds": 0.0, "startup_seconds": 0.0, "starts": 0}
        self._first: int | None = None
        self._startup = 0.0

    @property
    def started(self) -> bool:
        """Whether a step was taken since this object was made."""
        return self._first is not None

    def begin(self) -> None:
        """Start a new trace with the untrained model."""
        line = {"step": 0, **self._before, "log_likelihood": self.evaluate()}
        write_lines(self.path, [line])

    def __call__(self, step: Step) -> bool:
        """Evaluate, if it is time to.

        Returns:
            Whether the time is up.
        """
        if self._first is None:
            self._first = step.number - 1
            self._startup = step.seconds
            self._rewind(self._first)
        line: dict[str, Any] = {
            "step": step.number,
            "seconds": self._before["seconds"] + step.seconds - self._startup,
            "startup_seconds": self._before["startup_seconds"] + self._startup,
            "starts": self._before["starts"] + 1,
        }
        limit = self.training.max_seconds
        is_up = limit is not None and line["seconds"] >= limit
        if is_up or step.number in self.steps:
            line["log_likelihood"] = self.evaluate()
        if "log_likelihood" in line or step.number % self.training.checkpoint_every == 0:
            append_line(self.path, line)
        return is_up

    def _rewind(self, step: int) -> None:
        """Forget what came after the checkpoint at `step`."""
        kept = [line for line in self._lines() if line["step"] <= step]
        if kept[-1]["step"] != step:
            raise ValueError(
                f"`{self.path}` has no line of step {step}, that of the checkpoint, so the time that "
                "had passed is unknown; remove the cell's folder to train it anew"
            )
        write_lines(self.path, kept)
        self._before = kept[-1]

    def _lines(self) -> list[dict[str, Any]]:
        """What was written, from the untrained model on.

        Raises:
            ValueError: if a line is damaged, there twice or missing.
        """
        lines = read_lines(self.path, TraceLine)
        steps = [line["step"] for line in lines]
        refuse_repeated(self.path, steps, "step")
        evaluated = {line["step"] for line in lines if "log_likelihood" in line}
        due = {0, *(step for step in self.steps if lines and step <= steps[-1])}
        if due - evaluated:
            raise ValueError(
                f"`{self.path}` lacks the evaluation of step {min(due - evaluated)}; remove the cell's "
                "folder to train it anew"
            )
        return lines

    def summary(self) -> dict[str, Any]:
        """Steps, seconds and the trace, as plain values for a record.

        `startup_seconds` is the time of the first step after every start: compilation, if there is any.
        `seconds` and the trace leave it out.
        """
        lines = self._lines()
        last = lines[-1]
        steps, seconds = last["step"] - last["starts"], last["seconds"]
        return {
            "steps": last["step"],
            "seconds": round(last["seconds"], 3),
            "startup_seconds": round(last["startup_seconds"], 3),
            "steps_per_second": round(steps / seconds, 1) if seconds > 0 else None,
            "trace": [
                [line["step"], round(line["seconds"], 3), line["log_likelihood"]]
                for line in lines
                if "log_likelihood" in line
            ],
        }


def log_spaced(last: int, points: int) -> set[int]:
    """About that many steps up to the last, evenly spread on a logarithmic axis.

    Example:
        >>> sorted(log_spaced(1000, 4))
        [1, 10, 100, 1000]
    """
    spaced = np.geomspace(max(1, last / _FIRST), last, points)
    return {round(step) for step in spaced.tolist()}

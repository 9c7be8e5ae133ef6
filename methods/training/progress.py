"""Progress of a training: a bar on a terminal or in a notebook, plain lines elsewhere."""

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal, TypeAlias, final

from bilevel import Step
from bilevel.distributed import is_main
from bilevel.methods.training.display import EVERY, Display, Lines, Stages, bar, duration
from bilevel.methods.training.settings import Training
from bilevel.refusals import shown
from bilevel.reporting import Report, silent

Wish: TypeAlias = bool | Literal["auto"]
"""Whether progress is shown; "auto": where there is a bar for it, a terminal or a notebook."""

_SOONEST, _LATEST = 15.0, 120.0
# seconds between two lines: a quarter of the time spent, within these


@final
class Progress:
    """A callback that shows how training goes.

    It looks at the losses five times a second at most: each look waits for the device. The time left
    counts what steps take since this process began, its first one (which may compile) left out, and
    what the evaluations to come will take.

    Args:
        training: tells the number of steps and the time limit.
        first: steps taken before, when a run is resumed.
        lines: where there is no bar, print lines.

    Attributes:
        stage: a `Report` for what is done between steps, such as an evaluation.
    """

    def __init__(self, training: Training, first: int = 0, *, lines: bool = True) -> None:
        self.training = training
        self.first = first
        self.step = first
        self.lines = lines
        self.stage: Report = silent
        self._last: Step | None = None
        self._began = self._shown = time.monotonic()
        self._line: int | None = None
        self._start: tuple[int, float] | None = None  # number and seconds of the first step seen
        self._evaluations: list[float] = []  # seconds that each took
        self._found = ""
        self._bar: Display | None = None
        self._beside: Display | None = None  # where stages are shown

    def __enter__(self) -> "Progress":
        self._bar = self._beside = bar(transient=False)
        if self._bar is None and self.lines:
            self._beside = Lines(sys.stderr)
        if self._beside is not None:
            self.stage = Stages(self._beside)
        self.stage("preparing the first step" if self.training.compile else "first step", 0, 0)
        return self

    def __exit__(self, failure: object, *_: object) -> None:
        if self._bar is not None and self._last is not None:
            by = None if failure else why_stopped(self._last, self.training)
            spent = f"{duration(self._last.seconds)} spent"
            short = "" if by is None else f"stopped by {by.partition(' (')[0]}, "
            self._show(self._bar, self._last, short + spent)
        if self._beside is not None:
            self._beside.close(kept=self._last is not None)

    def __call__(self, step: Step) -> None:
        """Show this step, if it is time to."""
        self.step, self._last = step.number, step
        if self._start is None:
            self._start = (step.number, step.seconds)
            self._line = step.number - 1
            self._shown -= EVERY
            if self._bar is None:
                self.stage("", 0, 0)
        now, last = time.monotonic(), step.number == self.training.num_steps
        if self._bar is not None:
            if now - self._shown > EVERY or last:
                self._shown = now
                self._show(self._bar, step, self._left(step))
        elif self.lines and (self._due(step, now) or last):
            self._shown, self._line = now, step.number
            left = self._left(step)
            print(
                f"step {step.number:>6}/{self.training.num_steps}  {self._found}{_losses(step)}  "
                f"{duration(step.seconds)} spent" + (f", {left}" if left else ""),
                flush=True,
            )

    def evaluated(self, results: Mapping[str, float], seconds: float) -> None:
        """Take note of an evaluation and of the time it took: shown from now on."""
        self._evaluations.append(seconds)
        shown = [f"{k} {results[k]:.3g}" for k in ("frechet", "rmse") if k in results]
        self._found = f"[{' '.join(shown)} at {self.step}]  " if shown else ""
        if self._bar is None:
            self.stage("", 0, 0)

    def _show(self, place: Display, step: Step, left: str) -> None:
        place.show("", step.number, self.training.num_steps, self._found + _losses(step), left)

    def _due(self, step: Step, now: float) -> bool:
        """Whether a line is due: ten in a run, or some 40 in the first hour of a slow one."""
        assert self._line is not None
        pause = min(_LATEST, max(_SOONEST, (now - self._began) / 4))
        every = max(1, self.training.num_steps // 10)
        return step.number - self._line >= every or now - self._shown > pause

    def _left(self, step: Step) -> str:
        """The time left and the speed, in words."""
        assert self._start is not None
        first, before = self._start
        remaining = self.training.num_steps - step.number
        if step.number == first and remaining:
            return ""  # it compiles, and warms caches up
        pace = (step.seconds - before) / max(1, step.number - first)
        if self.training.max_seconds is not None and pace > 0:
            rest = max(0.0, self.training.max_seconds - step.seconds)
            remaining = min(remaining, round(rest / pace))
        left = remaining * pace
        if self.training.evaluate_every is not None and self._evaluations:
            every, each = self.training.evaluate_every, sum(self._evaluations)
            to_come = (step.number + remaining) // every - step.number // every
            left += to_come * each / len(self._evaluations)
        speed = f", {1 / pace:.3g} steps/s" if pace > 0 else ""
        return f"{duration(left)} left{speed}"


@contextmanager
def showing(wish: Wish, training: Training, first: int) -> Iterator[list[Progress]]:
    """The callbacks that show a training as its caller wishes: one or none.

    Args:
        wish: `fit`'s argument `progress`.
        training: its settings.
        first: steps taken before.

    Raises:
        ValueError: for another wish.
    """
    if wish not in (True, False, "auto"):
        raise ValueError(f'`progress` must be True, False or "auto", got {shown(wish)}')
    if wish is False or not is_main():
        yield []
        return
    with Progress(training, first, lines=wish is True) as progress:
        yield [progress]


def why_stopped(step: Step, training: Training) -> str | None:
    """What ended a training after this step: the clock or a callback; `None` if it went to its end."""
    if step.number >= training.num_steps:
        return None
    if training.max_seconds is not None and step.seconds >= training.max_seconds:
        return f"the clock (`max_seconds` {training.max_seconds:g})"
    return "a callback"


def _losses(step: Step) -> str:
    losses = {"upper": step.upper_loss, "lower": step.lower_loss}
    losses |= {name: step.logs[name] for name in ("reconstruction",) if name in step.logs}
    return "  ".join(f"{name} {float(v):.2f}" for name, v in losses.items() if v is not None)

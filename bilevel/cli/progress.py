"""Progress of a training: a live bar on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Mapping
from typing import Any, final

from bilevel import Step
from bilevel.methods import Training

_EVERY = 0.2  # seconds between two looks at the losses: each waits for the device
_SOONEST, _LATEST = (
    15.0,
    120.0,
)  # seconds between two lines: a quarter of the time spent, within these


@final
class Progress:
    """A callback that shows how training goes.

    The time left counts what steps take since this process began, its first one (which may compile)
    left out, and what the evaluations to come will take.

    Args:
        training: tells the number of steps and the time limit.
        first: steps taken before, when a run is resumed.
    """

    def __init__(self, training: Training, first: int = 0) -> None:
        self.training = training
        self.first = first
        self.step = first
        self._began = self._shown = time.monotonic()
        self._line: int | None = None
        self._start: tuple[int, float] | None = None  # number and seconds of the first step seen
        self._evaluations: list[float] = []  # seconds that each took
        self._found = ""
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> "Progress":
        self._bar = _rich_bar() if sys.stdout.isatty() else None
        if self._bar is not None:
            total = self.training.num_steps
            self._task = self._bar.add_task(
                "", total=total, completed=self.first, losses="", left=""
            )
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, step: Step) -> None:
        """Show this step, if it is time to."""
        self.step = step.number
        if self._start is None:
            self._start = (step.number, step.seconds)
            self._line = step.number - 1
        now, last = time.monotonic(), step.number == self.training.num_steps
        if self._bar is not None:
            if now - self._shown > _EVERY or last:
                self._shown = now
                text = self._found + _losses(step)
                self._bar.update(
                    self._task, completed=step.number, losses=text, left=self._left(step)
                )
        elif self._due(step, now) or last:
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


def _losses(step: Step) -> str:
    shown = {"upper": step.upper_loss, "lower": step.lower_loss}
    shown |= {name: step.logs[name] for name in ("reconstruction",) if name in step.logs}
    return "  ".join(f"{name} {float(v):.2f}" for name, v in shown.items() if v is not None)


def duration(seconds: float) -> str:
    """Seconds in words.

    Example:
        >>> duration(42.4), duration(61), duration(14_700)
        ('42 s', '1 min 01 s', '4 h 05 min')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def _rich_bar() -> Any:
    try:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as RichProgress
        from rich.table import Column
    except ImportError:
        print("(a live progress bar needs rich: pip install 'bilevel[report]')")
        return None
    columns = (
        BarColumn(bar_width=12),
        MofNCompleteColumn(table_column=Column(no_wrap=True, min_width=9)),
        TextColumn("{task.fields[losses]}", style="cyan", table_column=Column(no_wrap=True)),
        TextColumn("{task.fields[left]}", style="dim"),
    )
    return RichProgress(*columns)

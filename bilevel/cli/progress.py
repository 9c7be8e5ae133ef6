"""Progress of a training: a live bar on a terminal, plain lines elsewhere; and Ctrl-C."""

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from bilevel import Step
from bilevel.methods import Training

_EVERY = 0.2  # seconds between two looks at the losses: each waits for the device


class Progress:
    """A callback that shows how training goes.

    Args:
        training: tells the number of steps and the time limit.
        first: steps taken before, when a run is resumed.
    """

    def __init__(self, training: Training, first: int = 0) -> None:
        self.training = training
        self.first = first
        self.step = first
        self._shown = time.monotonic()
        self._line = first
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
        now, last = time.monotonic(), step.number == self.training.num_steps
        every = max(1, self.training.num_steps // 10)
        if self._bar is not None:
            if now - self._shown > _EVERY or last:
                self._shown = now
                left = _duration(self._left(step.seconds))
                self._bar.update(self._task, completed=step.number, losses=_losses(step), left=left)
        elif step.number - self._line >= every or now - self._shown > 15 or last:
            self._shown, self._line = now, step.number
            spent, left = _duration(step.seconds), _duration(self._left(step.seconds))
            print(
                f"step {step.number:>6}/{self.training.num_steps}  {_losses(step)}  "
                f"{spent} spent, {left} left",
                flush=True,
            )

    def _left(self, seconds: float) -> float:
        """Seconds until the last step or the time limit."""
        left = seconds / (self.step - self.first) * (self.training.num_steps - self.step)
        if self.training.max_seconds is not None:
            left = min(left, max(0.0, self.training.max_seconds - seconds))
        return left


class Stop:
    """A callback that ends training after the step in which Ctrl-C was pressed."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self, step: Step) -> bool:
        """Whether to stop."""
        return self.asked

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take the first Ctrl-C as a wish to stop; a second one interrupts at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.getsignal(signal.SIGINT)

        def ask(number: int, frame: FrameType | None) -> None:
            self.asked = True
            signal.signal(signal.SIGINT, before)
            print("\nstopping after this step; Ctrl-C again stops at once", file=sys.stderr)

        signal.signal(signal.SIGINT, ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


def _losses(step: Step) -> str:
    shown = {"upper": step.upper_loss, "lower": step.lower_loss}
    shown |= {name: step.logs[name] for name in ("reconstruction",) if name in step.logs}
    return "  ".join(f"{name} {float(v):.2f}" for name, v in shown.items() if v is not None)


def _duration(seconds: float) -> str:
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
        TextColumn("{task.fields[left]} left", style="dim"),
    )
    return RichProgress(*columns)

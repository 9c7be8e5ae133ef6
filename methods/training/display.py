"""Where it is shown how far a long work is: a bar on a terminal or in a notebook, lines elsewhere."""

import html
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, final

from bilevel.distributed import is_main
from bilevel.reporting import Report, silent

EVERY = 0.2  # seconds between two changes of a bar
_SOON = 2.0  # seconds after which a stage is named on a line
_SELDOM = 15.0  # seconds between two lines of a stage, at least; a quarter of its time later


class Display(ABC):
    """A place where one work at a time is shown."""

    @abstractmethod
    def show(self, what: str, done: int, total: int, text: str = "", left: str = "") -> None:
        """Show a work, in place of what was shown before.

        Args:
            what: its name.
            done: how much of it is done.
            total: how much there is, 0 if unknown.
            text: more about it.
            left: the time left, in words.
        """

    @abstractmethod
    def close(self, *, kept: bool = True) -> None:
        """Show nothing more.

        Args:
            kept: leave what was shown last.
        """


@final
class Bar(Display):
    """A live bar of rich.

    Args:
        stream: a terminal.
        transient: nothing is left of it at the end.

    Raises:
        ImportError: if rich is missing.
    """

    def __init__(self, stream: TextIO, *, transient: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, SpinnerColumn, TextColumn
        from rich.progress import Progress as RichProgress
        from rich.table import Column

        def column(field: str, **style: Any) -> TextColumn:
            kept = Column(no_wrap=True)
            return TextColumn(f"{{task.{field}}}", markup=False, table_column=kept, **style)

        self._bar = RichProgress(
            SpinnerColumn(),
            column("description"),
            BarColumn(bar_width=12),
            column("fields[count]"),
            column("fields[text]", style="cyan"),
            column("fields[left]", style="dim"),
            console=Console(file=stream),
            transient=transient,
            refresh_per_second=5,
            redirect_stdout=stream is sys.stdout,  # else it would go where the bar is
        )
        self._task: Any = None

    def show(self, what: str, done: int, total: int, text: str = "", left: str = "") -> None:
        count = f"{done:,}/{total:,}" if total else ""
        shown: dict[str, Any] = {"description": what, "count": count, "text": text, "left": left}
        if self._task is None:
            description = shown.pop("description")
            self._task = self._bar.add_task(description, total=total or None, **shown)
            self._bar.start()
        self._bar.update(self._task, total=total or float("inf"), completed=done, **shown)

    def close(self, *, kept: bool = True) -> None:
        if self._task is not None:
            self._bar.live.transient |= not kept
            self._bar.refresh()
            self._bar.stop()


@final
class Notebook(Display):
    """An output of a notebook's cell that changes in place."""

    def __init__(self) -> None:
        self._handle: Any = None

    def show(self, what: str, done: int, total: int, text: str = "", left: str = "") -> None:
        from IPython.display import display

        line = "  ".join(part for part in (_line(what, done, total, left), text) if part)
        bar = f'<progress value="{done}" max="{total}"></progress> ' if total else ""
        shown = {"text/plain": line, "text/html": f"{bar}<code>{html.escape(line)}</code>"}
        if self._handle is None:
            self._handle = display(shown, raw=True, display_id=True)
        else:
            self._handle.update(shown, raw=True)

    def close(self, *, kept: bool = True) -> None:
        if self._handle is not None and not kept:
            self._handle.update({"text/plain": ""}, raw=True)


@final
class Lines(Display):
    """A line for the work that is on when nothing was said for two seconds; now and then another one.

    A thread watches: a work that does not report is named too.

    Args:
        stream: where they go.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._line, self._what = "", ""
        self._began: dict[str, float] = {}  # when each work was first shown
        self._due: dict[str, float] = {}  # when the next line of each is
        self._said = 0.0
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def show(self, what: str, done: int, total: int, text: str = "", left: str = "") -> None:
        if what != self._what:
            now = time.monotonic()
            self._said = self._said if self._what else now  # nothing was going on
            self._due[what] = max(self._due.get(what, 0.0), self._said + _SOON)
            self._began.setdefault(what, now)
            self._what = what
        self._line = _line(what, done, total, left) if what else ""
        if self._thread is None and what:
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()

    def close(self, *, kept: bool = True) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(EVERY):
            now, what = time.monotonic(), self._what
            if self._line and now >= self._due[what]:
                pause = max(_SELDOM, (now - self._began[what]) / 4)
                self._said, self._due[what] = now, now + pause
                with suppress(OSError, ValueError):  # nobody reads any more
                    print(f"{self._line} ...", file=self._stream, flush=True)


@final
class Stages:
    """A `Report` that shows each stage and reckons the time left.

    Args:
        display: where.
    """

    def __init__(self, display: Display) -> None:
        self.display = display
        self.closed = False
        self._what, self._shown = "", 0.0
        self._starts: dict[str, tuple[int, float]] = {}  # how far each was at first, and when

    def __call__(self, what: str, done: int, total: int) -> None:
        """Show this stage, at most five times a second."""
        assert not self.closed, f"`{what}` is told to a display that is closed"
        now = time.monotonic()
        if what == self._what and now - self._shown < EVERY and done < total:
            return
        if what not in self._starts or done <= self._starts[what][0]:
            self._starts[what] = done, now
        self._what = what
        first, began = self._starts[what]
        self._shown = now
        taken, passed = done - first, now - began
        known = taken > 0 and passed > 1.0
        left = f"{duration((total - done) * passed / taken)} left" if known else ""
        self.display.show(what, done, total, left=left)


@contextmanager
def stages(*, lines: bool = True) -> Iterator[Report]:
    """A `Report` to hand to what takes long: it shows a bar on a terminal or in a notebook.

    Of several processes the first one shows it.

    Args:
        lines: elsewhere, say on the standard error what takes more than two seconds.

    Example:
        >>> from bilevel.reporting import tracked
        >>> with stages() as report:
        ...     sum(tracked([1, 2, 3], "adding", report))
        6
    """
    display = bar(transient=True) if is_main() else None
    if display is None and lines and is_main():
        display = Lines(sys.stderr)
    if display is None:
        yield silent
        return
    report = Stages(display)
    try:
        yield report
    finally:
        report.closed = True
        display.close()


def bar(*, transient: bool) -> Display | None:
    """The bar of a notebook or of a terminal, `None` where there is neither.

    Args:
        transient: nothing is left of it on a terminal. Such a bar may be on the standard error, where
            the standard output is no terminal.
    """
    if _in_notebook():
        return Notebook()
    streams = (sys.stdout, sys.stderr) if transient else (sys.stdout,)
    terminal = next((stream for stream in streams if stream.isatty()), None)
    if terminal is None:
        return None
    try:
        return Bar(terminal, transient=transient)
    except ImportError:
        if not transient:
            print("(a live progress bar needs rich: pip install 'bilevel[report]')")
        return None


def _in_notebook() -> bool:
    """Whether this runs in the kernel of a notebook, and not in IPython's terminal."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return getattr(shell, "kernel", None) is not None


def _line(what: str, done: int, total: int, left: str) -> str:
    """A work in a line."""
    parts = [f"{done:,} of {total:,}" if total else "", left]
    more = ", ".join(part for part in parts if part)
    return ": ".join(part for part in (what, more) if part)


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

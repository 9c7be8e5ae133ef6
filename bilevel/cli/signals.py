"""Signals that end a command: Ctrl-C, what clusters send (SIGTERM), and a closed terminal (SIGHUP)."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn, final

from bilevel import Step

_ENDING = [
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP")
    if name in vars(signal)  # SIGHUP is unknown to Windows
]
_ONE_REQUEST = 1.0  # seconds: `timeout` and shells send SIGTERM or SIGHUP twice at once


@final
class Interrupted(KeyboardInterrupt):
    """A signal other than Ctrl-C; `number` says which."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def status_of(stopped: KeyboardInterrupt) -> int:
    """The exit status after a signal: 130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP."""
    return 128 + int(getattr(stopped, "number", signal.SIGINT))


def named(number: int, *, by: bool = False) -> str:
    """What happened, in a word.

    Args:
        number: of the signal.
        by: its name alone.

    Example:
        >>> named(signal.SIGINT), named(signal.SIGTERM), named(signal.SIGINT, by=True)
        ('interrupted', 'stopped by SIGTERM', 'Ctrl-C')
    """
    if by:
        return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
    return "interrupted" if number == signal.SIGINT else f"stopped by {signal.Signals(number).name}"


@contextlib.contextmanager
def ending() -> Iterator[None]:
    """SIGTERM and SIGHUP end a command as Ctrl-C does: by an exception, so that it can clean up.

    A signal that is ignored when the command starts (`nohup`) stays ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    terminals = [number for number in (1, 2) if os.isatty(number)]

    def end(number: int, frame: FrameType | None) -> NoReturn:
        _leave(number, terminals)
        raise Interrupted(number)

    mine = [n for n in _ENDING if signal.getsignal(n) == signal.SIG_DFL]
    for number in mine:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in mine:
            signal.signal(number, signal.SIG_DFL)


@final
class Stop:
    """A callback that ends training after the step in which a signal came.

    Attributes:
        asked: the number of the signal, `None` as long as there was none.
    """

    def __init__(self) -> None:
        self.asked: int | None = None

    def __call__(self, step: Step) -> bool:
        """Whether to stop."""
        return self.asked is not None

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Take the first signal as a wish to stop; a second one ends at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        terminals = [number for number in (1, 2) if os.isatty(number)]
        before = {n: signal.getsignal(n) for n in _ENDING}
        heard = 0.0

        def ask(number: int, frame: FrameType | None) -> None:
            nonlocal heard
            again, heard = time.monotonic() - heard < _ONE_REQUEST, time.monotonic()
            if self.asked is None:
                self.asked = number
                _leave(number, terminals)
                _tell(f"\n{named(number)}: stopping after this step; Ctrl-C now stops at once\n")
            elif number == signal.SIGINT or not again:
                handler = before[number]
                if callable(handler):
                    handler(number, frame)
                raise Interrupted(number)

        # what `nohup` has ignored stays so; that a shell ignores Ctrl-C for what runs in the
        # background is no reason not to hear `kill -INT`
        mine = [n for n in _ENDING if n == signal.SIGINT or before[n] != signal.SIG_IGN]
        for number in mine:
            signal.signal(number, ask)
        try:
            yield
        finally:
            for number in mine:
                signal.signal(number, before[number])


def _leave(number: int, terminals: list[int]) -> None:
    """Write to nowhere what would go to a terminal that was closed: it would fail."""
    if number == getattr(signal, "SIGHUP", None) and terminals:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for descriptor in terminals:
            os.dup2(nowhere, descriptor)
        os.close(nowhere)


def _tell(text: str) -> None:
    """Print from a signal handler: `print` must not be entered twice."""
    with contextlib.suppress(OSError):
        os.write(2, text.encode())

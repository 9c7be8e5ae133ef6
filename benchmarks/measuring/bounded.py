"""The first call of something that may take for ever, or may not do what it is named after."""

import contextlib
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, final


@final
class LateError(BaseException):
    """The time is over; not an `Exception`, which the code that is called may take for its own."""


@final
@dataclass(frozen=True)
class First:
    """How a first call went.

    Attributes:
        seconds: what it took.
        why_not: what kept it from being done, `None` if it is done.
    """

    seconds: float
    why_not: str | None = None


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise `LateError` in what runs inside when the time is over; where Python can, so maybe later."""

    def late(*_: Any) -> None:
        raise LateError

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def first_call(run: Callable[[], Any], seconds: float) -> First:
    """Call once; a warning that steps run as without `compile` means that it is not done."""
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", r".*as without `compile`", RuntimeWarning)
        try:
            with at_most(seconds):
                run()
        except LateError:
            return First(time.perf_counter() - start, f"not done within {seconds:.0f} s")
        except RuntimeWarning as warning:
            return First(time.perf_counter() - start, str(warning))
    return First(time.perf_counter() - start)

"""Work that may take for ever, in a process of its own that can be ended."""

import multiprocessing
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, final


@final
class NotDoneError(RuntimeError):
    """What was asked for was not done; the message says why."""


def bounded(function: Callable[..., Any], *arguments: Any, seconds: float) -> Any:
    """What the function returns, computed in a new process.

    Args:
        function: a function of a module.
        arguments: plain values.
        seconds: most time it may take; then it is ended.

    Raises:
        NotDoneError: if it takes longer, fails, or warns that steps run as without `compile`.
    """
    context = multiprocessing.get_context("spawn")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sending, function, arguments))
    process.start()
    sending.close()
    try:
        if not receiving.poll(seconds):
            raise NotDoneError(f"not done within {seconds:.0f} s")
        done, answer = receiving.recv()
    except EOFError:
        raise NotDoneError("the process ended") from None
    finally:
        process.terminate()
        process.join()
    if not done:
        raise NotDoneError(answer)
    return answer


def _send(sending: Connection, function: Callable[..., Any], arguments: Any) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", r".*as without `compile`", RuntimeWarning)
        try:
            answer = True, function(*arguments)
        except Exception as error:
            answer = False, f"{type(error).__name__}: {error}"
    sending.send(answer)

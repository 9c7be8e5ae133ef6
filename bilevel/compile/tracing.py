"""Whether a step is being traced: then nothing may branch on a tensor's value."""

import contextlib
from collections.abc import Callable, Iterator

from torch import Tensor

_active = False


def is_tracing() -> bool:
    """Whether a step is being traced into a graph, which is the same for all values."""
    return _active


@contextlib.contextmanager
def traced() -> Iterator[None]:
    """Mark what runs inside as traced."""
    global _active
    _active = True
    try:
        yield
    finally:
        _active = False


def known(condition: Callable[[], Tensor]) -> bool:
    """Whether a condition on values holds, where looking costs nothing.

    On an accelerator a look would wait for the device, and a graph is the same for all values: there
    nothing is known.

    Args:
        condition: returns a truth value on a processor or another device.
    """
    if _active:
        return False
    found = condition()  # on an accelerator it is queued, and not read
    return found.device.type == "cpu" and bool(found)


def why_not_compiled(error: Exception) -> str:
    """Why something is not compiled, in a few words."""
    said = (str(error).strip() or type(error).__name__).splitlines()[0]
    if "tracing tensor" in said:  # torch's words for it are about its own insides
        return "it looks at the value of a tensor (`if`, `.item()`, a solver that watches itself)"
    return said

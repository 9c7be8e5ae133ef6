"""Whether a step is being traced: then nothing may branch on a tensor's value."""

import contextlib
from collections.abc import Iterator

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

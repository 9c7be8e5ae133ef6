"""The global generators of torch, NumPy and Python, which data draw from while they are read."""

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch


def global_states() -> dict[str, Any]:
    """Where the global generators of torch, NumPy and Python are, in this process."""
    numpy: Any = np.random.get_state(legacy=False)["state"]  # noqa: NPY002 (the one that others draw from)
    return {
        "torch's": bytes(torch.get_rng_state().numpy()),
        "NumPy's": [v.tobytes() if isinstance(v, np.ndarray) else v for v in numpy.values()],
        "Python's": random.getstate(),
    }


@contextlib.contextmanager
def reseeded(seed: int | None, *numbers: int) -> Iterator[None]:
    """Let the global generators of this process start from numbers inside, and go on as before after.

    Args:
        seed: of the stream; `None` leaves the generators alone.
        *numbers: which batch it is, say.
    """
    if seed is None:
        yield
        return
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    start = hash((seed, *numbers)) % 2**62  # of integers: the same on every machine
    torch.default_generator.manual_seed(start)
    np.random.seed(start % 2**32)  # noqa: NPY002
    random.seed(start)
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        random.setstate(states[2])


def drawn_from(before: dict[str, Any]) -> str | None:
    """Whose global generator moved since `before`."""
    now = global_states()
    return next((name for name in now if now[name] != before[name]), None)

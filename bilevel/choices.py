"""How steps are made into graphs: recorded as they run, or compiled; chosen once, for one device."""

from typing import Any, Literal, TypeAlias

import numpy as np
import torch

from bilevel.distributed import world_size
from bilevel.refusals import one_of, shown

Choice: TypeAlias = bool | Literal["record", "inductor"]
"""What a user may ask for; `True` leaves the choice to the device."""

How: TypeAlias = Literal["record", "inductor"]

HOWS: tuple[How, ...] = ("record", "inductor")

SAID: dict[How, str] = {
    "record": "steps are recorded as CUDA graphs",
    "inductor": "steps are compiled by inductor",
}
"""The choice in words."""


def check_choice(compile: Any) -> None:
    """Refuse what is no choice.

    Raises:
        TypeError: for what is neither a truth value nor a text.
        ValueError: for another text.
    """
    if isinstance(compile, str):
        one_of("compile", compile, HOWS)
    elif not isinstance(compile, (bool, np.bool_)):
        raise TypeError(
            f'`compile` must be `True`, `False`, "record" or "inductor", got {shown(compile)}'
        )


def how_made(compile: Choice, device: torch.device) -> How | None:
    """How the steps on a device are made into graphs.

    A CUDA graph is recorded in a second and leaves nothing but the kernels; on a processor the kernels
    themselves are what takes long, and inductor fuses them.

    Args:
        compile: what was asked for.
        device: where the steps run.

    Returns:
        "record", "inductor", or `None` for steps that run as they are.

    Raises:
        ValueError: if recording is asked for on a device that has no CUDA graphs.
    """
    check_choice(compile)
    if not isinstance(compile, str):
        alone = world_size() == 1  # a CUDA graph holds no exchange between processes
        usual: How = "record" if device.type == "cuda" and alone else "inductor"
        return usual if compile else None
    if compile == "record" and device.type != "cuda":
        raise ValueError(
            f'`compile="record"` makes CUDA graphs, but the problem is on the device `{device}`; move '
            'it to a CUDA device, or give `compile="inductor"`'
        )
    return compile

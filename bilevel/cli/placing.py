"""`--device`: the option of all commands that train, and the device it names."""

import argparse

import torch

from bilevel.cli.options import UsageError
from bilevel.devices import usable_device


def add_device(group: argparse._ActionsContainer, default: str) -> None:
    """Offer `--device`.

    Args:
        group: of options.
        default: what is taken without, in words.
    """
    group.add_argument(
        "--device",
        type=str.lower,
        metavar="cpu|cuda|cuda:N|mps",
        help=f"(default: {default}; of several GPUs cuda:1 is the second; mps is Apple's)",
    )


def device_of(name: str | None) -> str:
    """A device that is there; the fastest by default.

    Raises:
        UsageError: if it is not there.
    """
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = usable_device(name, "`--device`")
    except ValueError as error:
        raise UsageError(str(error)) from None
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # what asks for "the" GPU means this one
    return str(device)

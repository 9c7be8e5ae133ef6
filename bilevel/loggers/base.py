"""`Logger`: what a training tells to whoever keeps its numbers and pictures."""

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from torch import Tensor

from bilevel.refusals import shown


class Logger(Protocol):
    """Any object with these four methods; `TensorBoard` and `WandB` are two.

    Pass it to `fit(loggers=[...])`, or call it in a loop over `train`.
    """

    def begin(self, configuration: Mapping[str, Any], taken: int) -> None:
        """Take note of a training before its first step.

        Args:
            configuration: all settings as plain values.
            taken: steps taken before, if it is resumed; what was logged after them is logged again.
        """

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Keep numbers of a step, by name."""

    def images(self, step: int, name: str, images: Tensor) -> None:
        """Keep images of a step.

        Args:
            step: its number.
            name: what they are.
            images: in [0, 1], shape (n, 1 or 3, height, width), on the processor.
        """

    def close(self) -> None:
        """Write what is not written yet: the training has ended."""


def check_loggers(loggers: Iterable[Any]) -> list[Logger]:
    """The loggers as a list.

    Raises:
        TypeError: naming what is none.
    """
    if not isinstance(loggers, Iterable):
        raise TypeError(
            f"`loggers` must be a list of loggers, got {shown(loggers)}; use `[logger]`"
        )
    found = list(loggers)
    for logger in found:
        for name in ("begin", "scalars", "images", "close"):
            if isinstance(logger, type) or not callable(getattr(logger, name, None)):
                raise TypeError(
                    f"`loggers` holds {shown(logger)}, which is no logger: it needs the methods "
                    "`begin`, `scalars`, `images` and `close`; give an instance, such as "
                    "`bilevel.loggers.TensorBoard(folder)`"
                )
    return found

"""Loggers by what they are called on the command line."""

from collections.abc import Callable, Sequence
from pathlib import Path

from bilevel.loggers import Logger, TensorBoard, WandB
from bilevel.refusals import one_of

LOGGERS: dict[str, Callable[[Path], Logger]] = {
    "tensorboard": lambda folder: TensorBoard(folder / "tensorboard"),
    "wandb": lambda folder: WandB(folder, name=folder.name),
}


def loggers_of(names: Sequence[str], folder: Path) -> list[Logger]:
    """The loggers of a run; nothing is written yet.

    Args:
        names: of `LOGGERS`.
        folder: that of the run.

    Raises:
        ValueError: for a name there is not.
        ImportError: if a package is missing, naming the extra.
    """
    for name in names:
        one_of("log_to", name, LOGGERS)
    return [LOGGERS[name](folder) for name in names]

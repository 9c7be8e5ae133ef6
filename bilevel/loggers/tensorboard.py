"""`TensorBoard`: event files that `tensorboard --logdir FOLDER` shows."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

from torch import Tensor

from bilevel.loggers.base import Logger


@final
class TensorBoard(Logger):
    """A logger that writes event files with `torch.utils.tensorboard`.

    Nothing is written before the first call. A training takes the place of what was logged in this
    folder before: a resumed one of what came after the step at which it goes on, a new one of all.

    Args:
        folder: where to.

    Raises:
        ImportError: if the package tensorboard is missing.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ImportError(
                "logs for TensorBoard need the package tensorboard; install it with "
                "`pip install 'bilevel[tensorboard]'`"
            ) from None
        self.folder = Path(folder)
        self._make: Any = SummaryWriter
        self._writer: Any = None
        self._purge: int | None = None

    def begin(self, configuration: Mapping[str, Any], taken: int) -> None:
        self._purge = taken + 1
        text = json.dumps(configuration, indent=2, default=str)
        self._open().add_text("configuration", f"```json\n{text}\n```", taken)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._open().add_scalar(name, value, step)
        self._open().flush()

    def images(self, step: int, name: str, images: Tensor) -> None:
        self._open().add_images(name, images, step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _open(self) -> Any:
        if self._writer is None:
            self._writer = self._make(os.fspath(self.folder), purge_step=self._purge)
            self._purge = None
        return self._writer

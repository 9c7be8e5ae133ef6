"""`WandB`: a run of Weights & Biases, online or offline."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from bilevel.files import read_text, write_text
from bilevel.loggers.base import Logger

_COLUMNS = 8


@final
class WandB(Logger):
    """A logger that sends everything to Weights & Biases.

    Nothing is written or sent before the first call. Without a network, `mode="offline"` (or the
    environment variable `WANDB_MODE=offline`) keeps it in the folder for `wandb sync`.

    Args:
        folder: the package writes into its sub-folder `wandb`. There lies the run's id too, by which a
            resumed training goes on in the same run.
        **options: of `wandb.init`, such as `project`, `name`, `mode`.

    Raises:
        ImportError: if the package wandb is missing.
    """

    def __init__(self, folder: str | os.PathLike[str], **options: Any) -> None:
        try:
            import wandb
        except ImportError:
            raise ImportError(
                "logs for Weights & Biases need the package wandb; install it with "
                "`pip install 'bilevel[wandb]'`"
            ) from None
        self.folder = Path(folder)
        self.options = {"project": "bilevel", **options}
        self._wandb: Any = wandb
        self._run: Any = None

    def begin(self, configuration: Mapping[str, Any], taken: int) -> None:
        path = self.folder / "wandb" / "id.txt"
        known = {"id": read_text(path).strip()} if taken and path.is_file() else {}
        self._open(config=dict(configuration), resume="allow", **known)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, self._run.id)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._open().log(dict(values), step=step)

    def images(self, step: int, name: str, images: Tensor) -> None:
        pixels = _side_by_side(images).mul(255).round().byte().numpy()
        grey = pixels.shape[2] == 1
        picture = self._wandb.Image(pixels[:, :, 0] if grey else pixels)
        self._open().log({name: picture}, step=step)

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()
            self._run = None

    def _open(self, **more: Any) -> Any:
        if self._run is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._run = self._wandb.init(dir=os.fspath(self.folder), **{**self.options, **more})
        return self._run


def _side_by_side(images: Tensor) -> Tensor:
    """One picture, eight images in a row: (height, width, channels)."""
    n, channels, height, width = images.shape
    filled = torch.cat([images, images.new_zeros(-n % _COLUMNS, channels, height, width)])
    rows: Tensor = filled.unflatten(0, (-1, _COLUMNS)).permute(0, 3, 1, 4, 2)
    return rows.reshape(-1, _COLUMNS * width, channels)

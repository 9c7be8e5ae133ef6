"""`Logged`: what a training tells its loggers, and when."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, final

import torch
from torch import Tensor

from bilevel.distributed import is_main
from bilevel.loggers.base import Logger
from bilevel.methods.training.settings import Training
from bilevel.methods.training.trainable import Trainable

_IMAGES = 32  # of each kind
_LOOKS = 10  # at samples in a training, where `evaluate_every` does not say how often


@final
class Logged:
    """Loggers of a training: every line of its record, evaluations, samples and reconstructions.

    Samples are drawn from a copy of the model with a generator of their own, so that training is the
    same to the bit with and without loggers. Of several processes the first one logs.

    Args:
        loggers: who is told.
        training: says when what is due.
        rows: some of the data, as the networks take them, to be reconstructed.
    """

    def __init__(self, loggers: Sequence[Logger], training: Training, rows: Tensor) -> None:
        self.loggers = list(loggers) if is_main() else []
        self.training = training
        self.rows = rows[:_IMAGES]

    def begin(self, configuration: Mapping[str, Any], taken: int) -> None:
        """Say what is going to be trained."""
        for logger in self.loggers:
            logger.begin(configuration, taken)

    def line(self, record: Mapping[str, Any]) -> None:
        """Log a line of the record of the training."""
        self._scalars(record, "")

    def evaluation(self, record: Mapping[str, Any]) -> None:
        """Log what an evaluation found."""
        self._scalars(record, "evaluation/")

    def due(self, step: int, *, ended: bool) -> bool:
        """Whether pictures are due after a step."""
        every = self.training.evaluate_every or max(1, self.training.num_steps // _LOOKS)
        return bool(self.loggers) and (ended or step % every == 0)

    def pictures(self, model: Trainable, step: int) -> None:
        """Log samples and reconstructions of a copy of the model, if its visibles are images."""
        shape = model.visible_shape
        if not self.loggers or shape is None or len(shape) != 3 or shape[0] not in (1, 3):
            return
        generator = torch.Generator(model.device).manual_seed(self.training.seed)
        devices = [model.device] if model.device.type == "cuda" else []
        # a model refuses what it has no way to do
        with torch.random.fork_rng(devices):
            with suppress(NotImplementedError):
                self._images(model, step, "samples", model.sample(_IMAGES, generator))
            if not self.training.standardise:  # the rows are not in the units of the copy
                with suppress(NotImplementedError):
                    pairs = [self.rows.cpu(), model.reconstruct(self.rows).cpu()]
                    shown = torch.stack(pairs, 1).flatten(0, 1)
                    self._images(model, step, "reconstructions", shown)

    def close(self) -> None:
        """Tell that the training has ended."""
        for logger in self.loggers:
            logger.close()

    def _scalars(self, record: Mapping[str, Any], where: str) -> None:
        values = {
            where + name: value
            for name, value in record.items()
            if name != "step" and isinstance(value, int | float)
        }
        for logger in self.loggers:
            logger.scalars(record["step"], values)

    def _images(self, model: Trainable, step: int, name: str, images: Tensor) -> None:
        low, high = model.visible_range or (-1.0, 1.0)
        shown = ((images.detach().float().cpu() - low) / (high - low)).clamp(0, 1)
        for logger in self.loggers:
            logger.images(step, name, shown)

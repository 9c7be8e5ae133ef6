"""Loggers: where the numbers and pictures of a training go while it runs."""

from bilevel.loggers.base import Logger
from bilevel.loggers.tensorboard import TensorBoard
from bilevel.loggers.wandb import WandB

__all__ = ["Logger", "TensorBoard", "WandB"]

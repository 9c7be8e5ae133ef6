"""Evaluation of a model as it stands, training mode and buffers left as they were."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import nn

from bilevel.distributed import alone
from bilevel.refusals import one_of
from bilevel.sync_batch_norm import BatchNorm

Statistics = Literal["running", "batch"]


@contextmanager
def evaluating(model: nn.Module, statistics: Statistics) -> Iterator[None]:
    """No gradients, dropout off, batch norm by `statistics`.

    Args:
        model: the model.
        statistics: of batch norm: "running" averages, or those of the "batch" at hand.

    Raises:
        ValueError: for other statistics.
    """
    one_of("statistics", statistics, ("running", "batch"))
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(b, b.clone()) for b in model.buffers()] if statistics == "batch" else []
    for module, _ in modes:
        module.training = statistics == "batch" and isinstance(module, BatchNorm)
    try:
        with torch.no_grad(), alone():
            yield
    finally:
        for module, training in modes:
            module.training = training
        for buffer, before in buffers:
            buffer.copy_(before)

"""The optimizers of the learners: Adam in fused kernels."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from bilevel.methods.training.settings import Training


def trainable(module: nn.Module) -> list[nn.Parameter]:
    """The parameters of a module that require grad."""
    return [p for p in module.parameters() if p.requires_grad]


def adam(
    groups: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
    training: Training,
    rate: float,
    decay: float,
) -> torch.optim.Adam:
    """Adam with the decay rates of `training`.

    Args:
        groups: parameters, or groups of them with settings of their own.
        training: the settings.
        rate: learning rate.
        decay: weight decay.
    """
    return torch.optim.Adam(groups, lr=rate, weight_decay=decay, betas=training.betas, fused=True)

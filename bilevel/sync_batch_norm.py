"""`SyncBatchNorm`: batch norm whose statistics are those of all ranks' rows together.

Torch's own class of that name works on CUDA alone and has no second derivative. This one is composed of
means, so that it runs wherever `torch.distributed` does, and every derivative of it is right. Each call
exchanges two vectors of one number per channel, and two more on the way back.
"""

from typing import Any, cast, final

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from bilevel.distributed import mean_over_ranks, world_size

__all__ = ["BatchNorm", "SyncBatchNorm", "synchronise_batch_norm"]
# `BatchNorm` is the base of every batch norm: torch's own in one to three dimensions, its synchronised
# and its lazy ones, `SyncBatchNorm` here, and whatever is derived from them.


@final
class SyncBatchNorm(BatchNorm):
    """Batch norm over the rows of all ranks; see `synchronise_batch_norm`."""

    def forward(self, input: Tensor) -> Tensor:
        """The input, normalised by channel: shape (n, channels, ...)."""
        if world_size() == 1 or not (self.training or self.running_mean is None):
            return BatchNorm.forward(self, input)
        rest = [dim for dim in range(input.ndim) if dim != 1]
        shape = [1, -1, *[1] * (input.ndim - 2)]
        x = input if input.dtype == torch.double else input.float()  # not in half precision
        (mean,) = mean_over_ranks([x.mean(rest)])
        centred = x - mean.view(shape)
        (variance,) = mean_over_ranks([centred.square().mean(rest)])
        if self.training and self.running_mean is not None:
            count = input.numel() // input.shape[1] * world_size()
            self._track(mean.detach(), variance.detach() * count / (count - 1))
        y = centred * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            y = y * self.weight.view(shape) + self.bias.view(shape)
        return y.to(input.dtype)

    def _track(self, mean: Tensor, variance: Tensor) -> None:
        seen = cast(Tensor, self.num_batches_tracked).add_(1)
        share = seen.to(mean.dtype).reciprocal() if self.momentum is None else self.momentum
        cast(Tensor, self.running_mean).lerp_(mean, cast(Any, share))
        cast(Tensor, self.running_var).lerp_(variance, cast(Any, share))

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(
                f"batch norm takes inputs of shape (n, channels, ...), got {input.shape}"
            )


def synchronise_batch_norm(module: nn.Module) -> None:
    """Put `SyncBatchNorm` in the place of every batch norm inside `module`, with the same tensors.

    Names in the `state_dict` stay as they are, and so do the parameters that an optimizer holds.
    """
    for name, child in module.named_children():
        if isinstance(child, BatchNorm) and not isinstance(child, SyncBatchNorm):
            setattr(module, name, _synchronised(child))
        else:
            synchronise_batch_norm(child)


def _synchronised(plain: BatchNorm) -> SyncBatchNorm:
    new = SyncBatchNorm(
        plain.num_features, plain.eps, plain.momentum, plain.affine, plain.track_running_stats
    )
    new.train(plain.training)
    for name, parameter in plain.named_parameters(recurse=False):
        new.register_parameter(name, parameter)
    for name, buffer in plain.named_buffers(recurse=False):
        new.register_buffer(name, buffer)
    return new

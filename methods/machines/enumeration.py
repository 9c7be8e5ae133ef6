r"""Sums over every state of binary units, $\log \sum_{x \in \{0,1\}^n} e^{w(x)}$, in bounded memory."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import softplus
from torch.utils.checkpoint import checkpoint

MAX_UNITS = 25
"""Units that are still enumerated: 2^25 states, some minutes."""

CHUNK = 2**22
"""Numbers one intermediate tensor of an enumeration may hold: 32 MB in float64."""


def log_one_plus_exp(x: Tensor) -> Tensor:
    r"""$\log(1 + e^x)$ to the last bit: torch's own switches to x at 20, an error of 2e-9."""
    return softplus(x, threshold=40.0)


def states(units: int, start: int, stop: int, like: Tensor) -> Tensor:
    """States number `start` to `stop` of {0,1}^units, shape (stop - start, units).

    Unit i is binary digit i of a state's number. Device and dtype are those of `like`.

    Example:
        >>> states(2, 0, 4, torch.zeros(()))
        tensor([[0., 0.],
                [1., 0.],
                [0., 1.],
                [1., 1.]])
    """
    numbers = torch.arange(start, stop, device=like.device)
    digits = torch.arange(units, device=like.device)
    return ((numbers[:, None] >> digits) & 1).to(like.dtype)


def log_sum_over_states(
    log_weight: Callable[[Tensor], Tensor],
    units: int,
    width: int,
    like: Tensor,
    *,
    chunk: int = CHUNK,
) -> Tensor:
    r"""$\log \sum_{x \in \{0,1\}^n} e^{w(x)}$, differentiable any number of times.

    What does not fit in one chunk is summed chunk by chunk, and each chunk is computed again by the
    backward pass: memory is bounded for the value and its gradient. (A gradient kept with
    `create_graph=True` keeps everything.) More than one chunk cannot be differentiated by the
    transforms of `torch.func`, which take no checkpoints; `torch.autograd.grad` can.

    Args:
        log_weight: w, from states of shape (S, units) to (..., S).
        units: n.
        width: numbers the largest intermediate of `log_weight` holds per state.
        like: a tensor of the device and dtype to compute on.
        chunk: numbers one intermediate may hold; at least one state is taken at a time.

    Returns:
        Shape (...): the shape of w's values without their last dimension.
    """
    total = 2**units
    size = min(total, 2 ** max(0, (chunk // width).bit_length() - 1))

    def part(start: int) -> Tensor:
        return log_weight(states(units, start, start + size, like)).logsumexp(-1)

    if size == total:
        return part(0)
    if not torch.is_grad_enabled():
        parts = [part(start) for start in range(0, total, size)]
    else:
        parts = [
            checkpoint(part, start, use_reentrant=False, preserve_rng_state=False)
            for start in range(0, total, size)
        ]
    return torch.stack(parts, dim=-1).logsumexp(-1)

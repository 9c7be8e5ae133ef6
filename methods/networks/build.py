"""Networks with the weights of a seed, in the layout in which convolutions are faster."""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import nn

from bilevel.refusals import SEEDS, whole

Network = TypeVar("Network", bound=nn.Module)


def build(make: Callable[[], Network], seed: int) -> Network:
    """The network that `make` makes, in channels-last memory.

    Args:
        make: makes it.
        seed: of the initial weights; torch's global generator is left as it was.

    Example:
        >>> first, again = (build(lambda: nn.Linear(2, 1), seed=0) for _ in range(2))
        >>> torch.equal(first.weight, again.weight)
        True
    """
    seed = whole("seed", seed, *SEEDS)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = make()
    cast(Any, network).to(memory_format=torch.channels_last)
    return network

"""`Chance`: where the random numbers of a chain come from, drawn as it goes or before it starts.

A graph cannot draw from a generator. What a chain makes of its numbers is deterministic, so a chain
whose numbers were drawn before, in the same order, is the same chain.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple, final

import torch
from torch import Tensor


@final
class Begun(NamedTuple):
    """A minibatch and the random numbers for what is to be made of it, in order."""

    data: Tensor
    numbers: list[Tensor]


class Chance(ABC):
    """Coins and normal noise for a chain."""

    @abstractmethod
    def coins(self, probabilities: Tensor) -> Tensor:
        """Zeros and ones, one with the given probability, in the same dtype."""

    @abstractmethod
    def normal(self, like: Tensor, *shape: int) -> Tensor:
        """Standard normal noise of this shape and a tensor's dtype."""


@final
class Drawn(Chance):
    """Numbers drawn as they are needed.

    Args:
        generator: on the device of the chain.
    """

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator

    def coins(self, probabilities: Tensor) -> Tensor:
        return coin_flips(probabilities, self._generator)

    def normal(self, like: Tensor, *shape: int) -> Tensor:
        return normals(like, self._generator, *shape)


@final
class Given(Chance):
    """Numbers drawn before.

    Args:
        numbers: uniform ones for coins and normal ones for noise, in the order of the chain.
    """

    def __init__(self, numbers: Sequence[Tensor]) -> None:
        self._numbers = iter(numbers)

    def coins(self, probabilities: Tensor) -> Tensor:
        return next(self._numbers).lt(probabilities).to(probabilities.dtype)

    def normal(self, like: Tensor, *shape: int) -> Tensor:
        return next(self._numbers)


def coin_flips(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """Zeros and ones, one with the given probability, in the same dtype."""
    if probabilities.is_cuda:
        return torch.bernoulli(probabilities, generator=generator)
    # on the CPU torch.bernoulli takes two to four times as long: most of the time of a Gibbs step
    return uniforms(probabilities, generator, *probabilities.shape).lt_(probabilities)


def uniforms(like: Tensor, generator: torch.Generator, *shape: int) -> Tensor:
    """Numbers in [0, 1) of a tensor's kind: what coins on a processor are thrown with."""
    return torch.rand(shape, generator=generator, dtype=like.dtype, device=like.device)


def normals(like: Tensor, generator: torch.Generator, *shape: int) -> Tensor:
    """Standard normal numbers of a tensor's kind."""
    return torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device)

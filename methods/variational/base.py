"""What a variational distribution is: differentiable draws, weighted; and the noise they are made of."""

import math
from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Distribution


class Draws(NamedTuple):
    """States with log-probabilities and weights that sum to one.

    Attributes:
        visible: shape (n, ...).
        latent: shape (n, ...).
        log_prob: of the distribution the draws stand for: log q1(h|v) or log p2(v, h), shape (n,).
        weight: shape (n,); for enumerated states the probabilities, differentiable.
    """

    visible: Tensor
    latent: Tensor
    log_prob: Tensor
    weight: Tensor

    def mean(self, values: Tensor) -> Tensor:
        """The expectation of values of shape (n,)."""
        return (self.weight * values).sum()


class VariationalPosterior(nn.Module, ABC):
    """q1(h|v)."""

    @abstractmethod
    def noise(self, n: int, generator: torch.Generator, like: Tensor) -> Tensor:
        """The noise that `draws` turns into latents of n visibles."""

    @abstractmethod
    def draws(self, v: Tensor, noise: Tensor) -> Draws:
        """Draws from q(v) q1(h|v), the rows of `v` having equal weight."""

    @abstractmethod
    def log_prob(self, v: Tensor, h: Tensor) -> Tensor:
        """Log q1(h|v), shape (n,)."""

    @abstractmethod
    def distribution(self, v: Tensor) -> Distribution:
        """q1(.|v) as a `torch.distributions` object."""


class VariationalJoint(nn.Module, ABC):
    """p2(v, h)."""

    @abstractmethod
    def noise(self, n: int, generator: torch.Generator, like: Tensor) -> Tensor:
        """The noise that `draws` turns into n pairs."""

    @abstractmethod
    def draws(self, noise: Tensor) -> Draws:
        """Draws from p2(v, h)."""

    @abstractmethod
    def log_prob(self, v: Tensor, h: Tensor) -> Tensor:
        """Log p2(v, h), shape (n,)."""

    @abstractmethod
    def sample(self, n: int, generator: torch.Generator | None) -> Tensor:
        """N visibles of p2."""

    def code_noise(self, n: int, generator: torch.Generator, like: Tensor) -> Tensor:
        """The noise that `bound` needs for n pairs; none where `log_prob` is tractable."""
        return like.new_zeros(n, 0)

    def bound(self, v: Tensor, h: Tensor, noise: Tensor) -> Tensor:
        """A lower bound on `log_prob`, on average over the noise; equal to it where it is tractable."""
        return self.log_prob(v, h)


def normal_noise(n: int, d: int, generator: torch.Generator, like: Tensor) -> Tensor:
    """Standard normal noise, shape (n, d); device and floating dtype are those of `like`."""
    return torch.randn(n, d, generator=generator, dtype=_float(like), device=like.device)


def logistic_noise(n: int, d: int, generator: torch.Generator, like: Tensor) -> Tensor:
    """Standard logistic noise, shape (n, d), finite; dtype and device as `normal_noise`.

    Logits plus logistic noise are positive with the probability the logits stand for.
    """
    dtype = _float(like)
    uniform = torch.rand(n, d, generator=generator, dtype=dtype, device=like.device)
    return uniform.logit(eps=torch.finfo(dtype).eps)


def normal_log_prob(z: Tensor) -> Tensor:
    """Log-density of N(0, 1), elementwise."""
    return -0.5 * z.square() - 0.5 * math.log(2 * math.pi)


def equal_weights(values: Tensor) -> Tensor:
    """Weights 1/n of n draws."""
    return torch.full_like(values, 1 / len(values))


def _float(like: Tensor) -> torch.dtype:
    return like.dtype if like.is_floating_point() else torch.get_default_dtype()

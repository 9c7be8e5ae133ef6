"""Gaussian families: real latents, reparameterised."""

import math
from typing import final

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from bilevel.methods.variational.base import (
    Draws,
    ExactDraws,
    VariationalJoint,
    VariationalPosterior,
    equal_weights,
    gaussian,
    gaussian_log_prob,
    normal_log_prob,
    normal_noise,
    reparameterised,
)


@final
class GaussianPosterior(VariationalPosterior):
    """Diagonal Gaussian q1(h|v), reparameterised.

    Args:
        network: module v -> (mean, log-variance), each (n, d).
        latent_dim: dimension d of the latent.
    """

    latent_dim: int

    def __init__(self, network: nn.Module, latent_dim: int) -> None:
        super().__init__()
        self.network = network
        self.latent_dim = latent_dim

    def noise(self, n: int, generator: torch.Generator, like: Tensor) -> Tensor:
        return normal_noise(n, self.latent_dim, generator, like)

    def moments(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance, each (n, d)."""
        mean, log_variance = self.network(v)
        return mean, log_variance

    def draws(self, v: Tensor, noise: Tensor) -> Draws:
        mean, log_variance = self.moments(v)
        h = reparameterised(mean, log_variance, noise)
        log_prob = normal_log_prob(noise).sum(1) - 0.5 * log_variance.sum(1)
        return Draws(v, h, log_prob, equal_weights(log_prob))

    def log_prob(self, v: Tensor, h: Tensor) -> Tensor:
        return gaussian_log_prob(h, *self.moments(v))

    def distribution(self, v: Tensor) -> Distribution:
        return gaussian(*self.moments(v))

    def mean(self, v: Tensor) -> Tensor:
        return self.moments(v)[0]

    def exact(self, v: Tensor, noise: Tensor) -> ExactDraws:
        mean, log_variance = self.moments(v)
        h = reparameterised(mean, log_variance, noise)
        log_prob = normal_log_prob(noise).sum(2) - 0.5 * log_variance.sum(1)
        return ExactDraws(h, log_prob, log_prob.new_full(log_prob.shape, 1 / len(noise)))

    def known_score(self, v: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_variance = self.moments(v)
        deviation = (log_variance / 2).exp()
        return mean + deviation * noise, -noise / deviation


@final
class GaussianJoint(VariationalJoint):
    r"""$p_2(v, h) = N(h; 0, I)\, N(v; G(h), \sigma^2 I)$.

    With a fixed sigma the entropy of the joint is a constant: no entropy estimator is needed.

    Args:
        generator: module h -> v.
        latent_dim: dimension d of the latent.
        visible_shape: shape of one visible.
        sigma: standard deviation of the visible given the latent.
    """

    def __init__(
        self, generator: nn.Module, latent_dim: int, visible_shape: tuple[int, ...], sigma: float
    ) -> None:
        super().__init__()
        if sigma <= 0:
            raise ValueError(f"`sigma` must be positive, got {sigma!r}")
        self.generator = generator
        self.latent_dim = latent_dim
        self.visible_shape = visible_shape
        self.sigma = sigma

    def noise(self, n: int, generator: torch.Generator, like: Tensor) -> Tensor:
        return normal_noise(n, self.latent_dim + math.prod(self.visible_shape), generator, like)

    def draws(self, noise: Tensor) -> Draws:
        h, z = noise[:, : self.latent_dim], noise[:, self.latent_dim :]
        v = self.generator(h) + self.sigma * z.view(-1, *self.visible_shape)
        log_prob = normal_log_prob(noise).sum(1) - z.shape[1] * math.log(self.sigma)
        return Draws(v, h, log_prob, equal_weights(log_prob))

    def log_prob(self, v: Tensor, h: Tensor) -> Tensor:
        z: Tensor = ((v - self.generator(h)) / self.sigma).flatten(1)
        log_scale = z.shape[1] * math.log(self.sigma)
        return normal_log_prob(z).sum(1) + normal_log_prob(h).sum(1) - log_scale

    def visible_mean(self, h: Tensor) -> Tensor:
        means: Tensor = self.generator(h)
        return means

    def sample(self, n: int, generator: torch.Generator | None) -> Tensor:
        like = next(self.generator.parameters())
        h = normal_noise(n, self.latent_dim, generator, like)
        visibles: Tensor = self.generator(h)
        return visibles

"""Variational distributions as differentiable draws: sampled by reparameterisation, or enumerated.

An expectation is a weighted sum over `Draws`. A sampled distribution gives one draw per row with equal
weights, a tabular one every state with its probability: the same loss is then a stochastic estimate
or the exact number.
"""

import math
from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, Independent, Normal


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


class GaussianPosterior(VariationalPosterior):
    """Diagonal Gaussian q1(h|v), reparameterised.

    Args:
        network: module v -> (mean, log-variance), each (n, d).
        latent_dim: dimension d of the latent.
    """

    def __init__(self, network: nn.Module, latent_dim: int) -> None:
        super().__init__()
        self.network = network
        self.latent_dim = latent_dim

    def noise(self, n: int, generator: torch.Generator, like: Tensor) -> Tensor:
        return _normal(n, self.latent_dim, generator, like)

    def moments(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance, each (n, d)."""
        mean, log_variance = self.network(v)
        return mean, log_variance

    def draws(self, v: Tensor, noise: Tensor) -> Draws:
        mean, log_variance = self.moments(v)
        h = mean + (log_variance / 2).exp() * noise
        log_prob = _normal_log_prob(noise).sum(1) - 0.5 * log_variance.sum(1)
        return Draws(v, h, log_prob, _equal(log_prob))

    def log_prob(self, v: Tensor, h: Tensor) -> Tensor:
        mean, log_variance = self.moments(v)
        z = (h - mean) / (log_variance / 2).exp()
        return _normal_log_prob(z).sum(1) - 0.5 * log_variance.sum(1)

    def distribution(self, v: Tensor) -> Distribution:
        mean, log_variance = self.moments(v)
        return Independent(Normal(mean, (log_variance / 2).exp()), 1)


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
        return _normal(n, self.latent_dim + math.prod(self.visible_shape), generator, like)

    def draws(self, noise: Tensor) -> Draws:
        h, z = noise[:, : self.latent_dim], noise[:, self.latent_dim :]
        v = self.generator(h) + self.sigma * z.view(-1, *self.visible_shape)
        log_prob = _normal_log_prob(noise).sum(1) - z.shape[1] * math.log(self.sigma)
        return Draws(v, h, log_prob, _equal(log_prob))

    def log_prob(self, v: Tensor, h: Tensor) -> Tensor:
        z: Tensor = ((v - self.generator(h)) / self.sigma).flatten(1)
        log_scale = z.shape[1] * math.log(self.sigma)
        return _normal_log_prob(z).sum(1) + _normal_log_prob(h).sum(1) - log_scale

    def sample(self, n: int, generator: torch.Generator | None) -> Tensor:
        like = next(self.generator.parameters())
        size = (n, self.latent_dim)
        h = torch.randn(size, generator=generator, dtype=like.dtype, device=like.device)
        visibles: Tensor = self.generator(h)
        return visibles


class TabularPosterior(VariationalPosterior):
    """Every state h = 0, ..., H-1 of every v = 0, ..., V-1 with its own probability, enumerated.

    Args:
        logits: initial logits, shape (V, H).
    """

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def noise(self, n: int, generator: torch.Generator, like: Tensor) -> Tensor:
        return self.logits.new_zeros(n, 0)

    def draws(self, v: Tensor, noise: Tensor) -> Draws:
        states = self.logits.shape[1]
        log_prob = self.logits.log_softmax(dim=1)[v].flatten()
        h = torch.arange(states, device=v.device).repeat(len(v))
        return Draws(v.repeat_interleave(states), h, log_prob, log_prob.exp() / len(v))

    def log_prob(self, v: Tensor, h: Tensor) -> Tensor:
        return self.logits.log_softmax(dim=1)[v, h]

    def distribution(self, v: Tensor) -> Distribution:
        return Categorical(logits=self.logits[v])


class TabularJoint(VariationalJoint):
    """Every pair (v, h) with its own probability, enumerated.

    Args:
        logits: initial logits, shape (V, H).
    """

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def noise(self, n: int, generator: torch.Generator, like: Tensor) -> Tensor:
        return self.logits.new_zeros(n, 0)

    def draws(self, noise: Tensor) -> Draws:
        return enumerated(self._log_table())

    def log_prob(self, v: Tensor, h: Tensor) -> Tensor:
        return self._log_table()[v, h]

    def sample(self, n: int, generator: torch.Generator | None) -> Tensor:
        visible = self._log_table().exp().sum(dim=1)
        return torch.multinomial(visible, n, replacement=True, generator=generator)

    def _log_table(self) -> Tensor:
        return self.logits - self.logits.flatten().logsumexp(0)


class TabularEnergy(nn.Module):
    """E(v, h) as a table of shape (V, H); its distribution can be enumerated.

    Args:
        table: initial energies, shape (V, H).
    """

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table)

    def forward(self, v: Tensor, h: Tensor) -> Tensor:
        """E(v, h), shape (n,)."""
        return self.table[v, h]

    def log_joint(self) -> Tensor:
        """Log p(v, h) of all states, shape (V, H)."""
        return -self.table - (-self.table).flatten().logsumexp(0)

    def free_energy(self, v: Tensor) -> Tensor:
        """-log sum_h exp(-E(v, h)), shape (n,)."""
        return -(-self.table).logsumexp(dim=1)[v]


class DecoupledEnergy(nn.Module):
    r"""$E(v, h) = E(v) - \log q_1(h|v)$ (Eq. 8): its posterior is q1, its marginal energy E(v).

    Args:
        marginal: module v -> (n,).
        posterior: q1, shared with the lower level.
        table_size: (V, H) if both are tabular, so that the joint can be enumerated.
    """

    def __init__(
        self,
        marginal: nn.Module,
        posterior: VariationalPosterior,
        table_size: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.marginal = marginal
        self.posterior = posterior
        self.table_size = table_size

    def forward(self, v: Tensor, h: Tensor) -> Tensor:
        """E(v, h), shape (n,)."""
        return self.free_energy(v) - self.posterior.log_prob(v, h)

    def free_energy(self, v: Tensor) -> Tensor:
        """E(v), shape (n,)."""
        energies: Tensor = self.marginal(v)
        return energies.flatten()

    def log_joint(self) -> Tensor:
        """Log p(v, h) of all states, shape (V, H).

        Raises:
            ValueError: if the model is not tabular.
        """
        if self.table_size is None:
            raise ValueError("this model cannot be enumerated; it has no `table_size`")
        v, h = (
            i.flatten() for i in torch.meshgrid(*map(torch.arange, self.table_size), indexing="ij")
        )
        log_weights: Tensor = -self(v, h).view(self.table_size)
        return log_weights - log_weights.flatten().logsumexp(0)


def enumerated(log_table: Tensor) -> Draws:
    """All states of a normalised log-table of shape (V, H)."""
    rows, columns = log_table.shape
    v = torch.arange(rows, device=log_table.device).repeat_interleave(columns)
    h = torch.arange(columns, device=log_table.device).repeat(rows)
    log_prob = log_table.flatten()
    return Draws(v, h, log_prob, log_prob.exp())


def _normal(n: int, d: int, generator: torch.Generator, like: Tensor) -> Tensor:
    dtype = like.dtype if like.is_floating_point() else torch.get_default_dtype()
    return torch.randn(n, d, generator=generator, dtype=dtype, device=like.device)


def _normal_log_prob(z: Tensor) -> Tensor:
    return -0.5 * z.square() - 0.5 * math.log(2 * math.pi)


def _equal(values: Tensor) -> Tensor:
    return torch.full_like(values, 1 / len(values))

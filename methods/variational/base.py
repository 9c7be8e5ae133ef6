"""What a variational distribution is: differentiable draws, weighted; and the noise they are made of."""

import math
from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple, final

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal

from bilevel.methods.networks.units import Change


@final
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


@final
class ExactDraws(NamedTuple):
    """Several latents for each of n visibles, drawn without relaxation and without gradient.

    Attributes:
        latent: shape (S, n, ...).
        log_prob: log q1(h|v), shape (S, n).
        weight: shape (S, n), columns sum to one.
    """

    latent: Tensor
    log_prob: Tensor
    weight: Tensor


class VariationalPosterior(nn.Module, ABC):
    """q1(h|v).

    Attributes:
        latent_dim: dimension of latents that are real numbers; `None` for others.
        binary: whether latents are bits, which `draws` relaxes.
    """

    latent_dim: int | None = None
    binary: ClassVar[bool] = False

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

    # Hooks: a family overrides what it knows better.

    def mean(self, v: Tensor) -> Tensor:
        """The mean of q1(h|v), differentiable."""
        mean: Tensor = self.distribution(v).mean
        return mean

    def exact(self, v: Tensor, noise: Tensor) -> ExactDraws:
        """Several latents for each visible, exact: bits are 0 or 1. Differentiable, bits aside.

        Args:
            v: visibles, shape (n, ...).
            noise: from `noise`, shape (S, n, d), or (S, 1, d) if all visibles share it.

        Returns:
            S latents for each visible; more of a family that enumerates its states.
        """
        copies, n = len(noise), len(v)
        rows = v.expand(copies, *v.shape).flatten(0, 1)
        draws = self.draws(rows, noise.expand(copies, n, *noise.shape[2:]).flatten(0, 1))

        def by_copies(values: Tensor) -> Tensor:
            apart: Tensor = values.unflatten(0, (copies, n, -1))
            return apart.movedim(2, 1).flatten(0, 1)

        return ExactDraws(
            by_copies(draws.latent), by_copies(draws.log_prob), n * by_copies(draws.weight)
        )

    def known_score(self, v: Tensor, noise: Tensor) -> tuple[Tensor, Tensor] | None:
        r"""Draws and $\nabla_h \log q_1$ at them, where that has a closed form; `None` where not."""
        return None

    def rewriting(self) -> Change | None:
        """How it is rewritten where the visibles change units; `None` if that is not known."""
        return None


class VariationalJoint(nn.Module, ABC):
    """p2(v, h).

    Attributes:
        binary: whether latents are bits, which `draws` relaxes.
        enumerates: whether `draws` gives all states with their probabilities.
    """

    binary: ClassVar[bool] = False
    enumerates: ClassVar[bool] = False

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

    # Hooks: a family overrides what it knows better.

    def exact_draws(self, n: int, generator: torch.Generator) -> Draws:
        """Draws without relaxation; `log_prob` may be less on average, as `bound` is."""
        return self.draws(self.noise(n, generator, next(self.parameters())))

    def visible_mean(self, h: Tensor) -> Tensor:
        """The mean of p2(v|h).

        Raises:
            NotImplementedError: if the family has none.
        """
        raise NotImplementedError(
            f"`{type(self).__name__}` gives no visibles for latents; use a `GaussianJoint`, or draw "
            "from `posterior(v)`"
        )

    def rewriting(self) -> Change | None:
        """How it is rewritten where the visibles change units; `None` if that is not known."""
        return None

    def code_noise(self, n: int, generator: torch.Generator, like: Tensor) -> Tensor:
        """The noise that `bound` needs for n pairs; none where `log_prob` is tractable."""
        return like.new_zeros(n, 0)

    def bound(self, v: Tensor, h: Tensor, noise: Tensor) -> Tensor:
        """A lower bound on `log_prob`, on average over the noise; equal to it where it is tractable."""
        return self.log_prob(v, h)


def normal_noise(n: int, d: int, generator: torch.Generator | None, like: Tensor) -> Tensor:
    """Standard normal noise, shape (n, d); device and floating dtype are those of `like`."""
    return torch.randn(n, d, generator=generator, dtype=_float(like), device=like.device)


def normal_like(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal noise, shaped and placed like `x`; torch's own generator by default."""
    return torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)


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


def reparameterised(mean: Tensor, log_variance: Tensor, noise: Tensor) -> Tensor:
    r"""$\mu + \sigma \epsilon$, a draw from $N(\mu, \sigma^2)$."""
    return mean + (log_variance / 2).exp() * noise


def gaussian(mean: Tensor, log_variance: Tensor) -> Distribution:
    r"""$N(\mu, \mathrm{diag}(\sigma^2))$ for every row."""
    return Independent(Normal(mean, (log_variance / 2).exp()), 1)


def gaussian_log_prob(h: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Its log-density, shape (n,)."""
    z = (h - mean) / (log_variance / 2).exp()
    return normal_log_prob(z).sum(1) - 0.5 * log_variance.sum(1)


def gaussian_kl(mean: Tensor, log_variance: Tensor) -> Tensor:
    r"""$KL(N(\mu, \sigma^2) \| N(0, I))$ of every row, shape (n,)."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(dim=1)


def equal_weights(values: Tensor) -> Tensor:
    """Weights 1/n of n draws."""
    return torch.full_like(values, 1 / len(values))


def _float(like: Tensor) -> torch.dtype:
    return like.dtype if like.is_floating_point() else torch.get_default_dtype()

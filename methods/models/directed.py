r"""`Directed`: a latent $h \sim N(0, I)$, a decoder $p(v|h)$, and a posterior that stands for its own.

$E(v, h) = -\log p(h) - \log p(v|h)$ is normalised, $Z = 1$: only $F(v) = -\log p(v)$ is intractable.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Self, cast, final

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from bilevel.methods.likelihood.free_energy import log_weights
from bilevel.methods.models.chunks import chunked, chunked_distribution
from bilevel.methods.models.model import Chains, LatentModel, all_known, attempt
from bilevel.methods.networks.units import Change, Rewritable
from bilevel.methods.variational import GaussianPosterior
from bilevel.methods.variational.base import normal_log_prob, normal_noise, reparameterised
from bilevel.methods.variational.bernoulli import bernoulli_log_prob

ENERGY_SAMPLES, IMAGE_ENERGY_SAMPLES = 100, 10
"""Draws of the importance-weighted bound that `energy` is, of rows and of images."""

PAIRS, IMAGE_PAIRS = 10_000, 500  # (v, h) evaluated at a time


@final
@dataclass(frozen=True, kw_only=True, repr=False)
class Directed(LatentModel):
    """A decoder of normal latents and a diagonal Gaussian posterior.

    Attributes:
        encoder: q(h|v).
        decoder: h -> logits of bits, or (mean, log-variance) of real visibles.
        bits: whether p(v|h) is of independent bits.
        noisy: whether samples are draws from p(v|h), or its means.
    """

    encoder: GaussianPosterior = field()
    decoder: nn.Module
    bits: bool
    noisy: bool

    def cost(self, v: Tensor, h: Tensor) -> Tensor:
        """-log p(v|h), differentiable, shape (n,)."""
        output = self.decoder(h)
        if self.bits:
            return -bernoulli_log_prob(output.flatten(1), v.flatten(1))
        mean, log_variance = output
        z = (v - mean) * (-log_variance / 2).exp()
        cost: Tensor = (log_variance / 2 - normal_log_prob(z)).flatten(1).sum(1)
        return cost

    def joint_energy(self, v: Tensor, h: Tensor) -> Tensor:
        """E(v, h) with all its constants."""
        return self.cost(v, h) - normal_log_prob(h).sum(1)

    def energy(self, v: Tensor) -> Tensor:
        """The importance-weighted bound on F(v), whose noise is the same for every row."""
        generator = torch.Generator(v.device).manual_seed(0)
        draws = ENERGY_SAMPLES if v.ndim == 2 else IMAGE_ENERGY_SAMPLES
        noise = normal_noise(draws, self.encoder.latent_dim, generator, v)[:, None]

        def bound(rows: Tensor) -> Tensor:
            left = iter(noise)

            def following(count: int) -> Tensor:
                return torch.stack([next(left) for _ in range(count)])

            return self._log_mean_weight(rows, draws, following)

        return -chunked(bound, v)

    def log_likelihood(
        self, v: Tensor, num_samples: int, generator: torch.Generator | None
    ) -> Tensor:
        """The importance-weighted lower bound on log p(v), shape (n,).

        Args:
            v: visibles.
            num_samples: draws from the posterior per row.
            generator: draws the noise.
        """

        def bound(rows: Tensor) -> Tensor:
            def noise(count: int) -> Tensor:
                size = (count, len(rows), self.encoder.latent_dim)
                return torch.randn(size, generator=generator, dtype=rows.dtype, device=rows.device)

            return self._log_mean_weight(rows, num_samples, noise)

        return chunked(bound, v)

    def _log_mean_weight(
        self, v: Tensor, num_samples: int, noise: Callable[[int], Tensor]
    ) -> Tensor:
        """Log of the mean of w_k, shape (n,); `noise(count)` has shape (count, n or 1, d)."""
        total = v.new_full((len(v),), -math.inf)
        size = max(1, (PAIRS if v.ndim == 2 else IMAGE_PAIRS) // len(v))
        for start in range(0, num_samples, size):
            count = min(size, num_samples - start)
            weights = log_weights(self._energies, self.encoder, v, noise(count))
            total = torch.logaddexp(total, weights.logsumexp(0))
        return total - math.log(num_samples)

    def _energies(self, v: Tensor, h: Tensor) -> Tensor:
        """Energies of several latents of each visible, (S, n, d) -> (S, n)."""
        rows = v.expand(len(h), *v.shape).flatten(0, 1)
        return self.joint_energy(rows, h.flatten(0, 1)).view(h.shape[:2])

    def sample(self, n: int, generator: torch.Generator | None, chains: Chains) -> Tensor:
        chains.refuse()
        h = normal_noise(n, self.encoder.latent_dim, generator, next(self.encoder.parameters()))

        def visibles(h: Tensor) -> Tensor:
            if not self.noisy:
                return self._mean(h)
            output = self.decoder(h)
            if self.bits:
                return torch.bernoulli(output.sigmoid(), generator=generator)
            mean, log_variance = output
            noise = torch.empty_like(mean).normal_(generator=generator)
            return reparameterised(mean, log_variance, noise)

        return chunked(visibles, h)

    def posterior(self, v: Tensor) -> Distribution:
        return chunked_distribution(self.encoder.distribution, v)

    def decode(self, h: Tensor) -> Tensor:
        """The means of p(v|h)."""
        return chunked(self._mean, h)

    def reconstruct(self, v: Tensor) -> Tensor:
        return chunked(lambda part: self._mean(self.encoder.mean(part)), v)

    def _mean(self, h: Tensor) -> Tensor:
        output = self.decoder(h)
        return cast(Tensor, output.sigmoid() if self.bits else output[0])

    def probe(self, v: Tensor) -> Self:
        width = self.encoder.latent_dim
        moments = attempt("encoder", self.encoder.network, v)
        shapes = [tuple(part.shape) for part in moments]
        if shapes != [(len(v), width)] * 2:
            raise ValueError(
                "the encoder must give mean and log-variance of the latent, each of shape "
                f"(n, {width}); got {shapes} for {len(v)} visibles"
            )
        output = attempt("decoder", self.decoder, moments[0])
        mean = output if self.bits else output[0]
        if mean.shape != v.shape:
            raise ValueError(
                f"the decoder must give visibles of shape {tuple(v.shape)}, got {tuple(mean.shape)}"
            )
        return self

    def rewritings(self) -> list[Change] | None:
        if self.visibles.range is not None:
            return None
        parts = (self.encoder.network, self.decoder)
        return all_known([p.rewriting() if isinstance(p, Rewritable) else None for p in parts])

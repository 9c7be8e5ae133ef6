r"""`Decoupled`: a marginal energy, a posterior and a generator.

$p(v, h) = p_\psi(v)\, q_1(h|v)$ with $p_\psi(v) \propto e^{-E(v)}$ has the posterior $q_1$ and the
marginal energy $E$ by construction; a generator $G$ of the latent draws its visibles in one pass.
"""

from dataclasses import dataclass, replace
from typing import Self, final

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.func import functional_call

from bilevel.methods.models.chunks import chunked, chunked_distribution
from bilevel.methods.models.model import Chains, LatentModel, attempt
from bilevel.methods.networks.spectral_norm import widened
from bilevel.methods.variational.base import gaussian, gaussian_log_prob, normal_noise


@final
@dataclass(frozen=True, kw_only=True, repr=False)
class Decoupled(LatentModel):
    """Three networks.

    Attributes:
        marginal: v -> (n,), the energy E.
        moments: v -> (mean, log-variance), each (n, d), of q1(h|v).
        generator: h -> v.
    """

    marginal: nn.Module
    moments: nn.Module
    generator: nn.Module

    # The networks' answers, differentiable, in float32 at least: sums over pixels and latents need it.

    def free_energy(self, v: Tensor) -> Tensor:
        """E(v), shape (n,)."""
        return widened(self.marginal(v)).flatten()

    def encode(self, v: Tensor, *, frozen: bool = False) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of q1(h|v), differentiable: in v alone if `frozen`."""
        if frozen:
            weights = {name: p.detach() for name, p in self.moments.named_parameters()}
            mean, log_variance = functional_call(self.moments, weights, (v,))
        else:
            mean, log_variance = self.moments(v)
        return widened(mean), widened(log_variance)

    def generate(self, h: Tensor) -> Tensor:
        """G(h), in the mode the module is in."""
        return widened(self.generator(h))

    def joint_energy(self, v: Tensor, h: Tensor) -> Tensor:
        r"""$E(v) - \log q_1(h|v)$ (Eq. 8 of the BiDVL paper)."""
        return self.free_energy(v) - gaussian_log_prob(h, *self.encode(v))

    def energy(self, v: Tensor) -> Tensor:
        return chunked(self.free_energy, v)

    def sample(self, n: int, generator: torch.Generator | None, chains: Chains) -> Tensor:
        chains.refuse()
        like = next(self.generator.parameters())
        return chunked(self.generate, normal_noise(n, self.known_dim(), generator, like))

    def posterior(self, v: Tensor) -> Distribution:
        return chunked_distribution(lambda part: gaussian(*self.encode(part)), v)

    def decode(self, h: Tensor) -> Tensor:
        """G(h), as `sample` draws them."""
        return chunked(self.generate, h)

    def reconstruct(self, v: Tensor) -> Tensor:
        return chunked(lambda part: self.generate(self.encode(part)[0]), v)

    def probe(self, v: Tensor) -> Self:
        out, dim = attempt("posterior", self.moments, v), self.latent_dim
        if isinstance(out, tuple) and dim is None:
            dim = out[0].shape[1]
        if not isinstance(out, tuple) or any(part.shape != (len(v), dim) for part in out):
            raise ValueError(
                "the posterior must give a mean and a log-variance, each of shape "
                f"(n, {dim or 'd'})"
            )
        generated = attempt("generator", self.generator, v.new_zeros(len(v), dim or 0))
        if generated.shape != v.shape:
            raise ValueError(
                f"the generator maps {dim} latents to visibles of shape "
                f"{tuple(generated.shape[1:])}, but the data have {tuple(v.shape[1:])}"
            )
        energy = attempt("energy", self.marginal, v)
        if not isinstance(energy, Tensor) or energy.numel() != len(v):
            raise ValueError("the energy must give one number per visible, shape (n,)")
        return replace(self, latent_dim=dim)

    def rewritings(self) -> None:
        return None

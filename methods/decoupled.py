r"""`DecoupledEBLVM`: a marginal energy, a posterior and a generator, and what they do once trained.

$p(v, h) = p_\psi(v)\, q_1(h|v)$ with $p_\psi(v) \propto e^{-E(v)}$ has the posterior $q_1$ and the
marginal energy $E$ by construction; a generator $G$ of the latent draws its visibles in one pass.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal
from torch.func import functional_call

from bilevel.methods.data.visibles import latents
from bilevel.methods.eblvm import EBLVM, attempt, chunked
from bilevel.methods.networks.spectral_norm import widened


class DecoupledEBLVM(EBLVM):
    """An EBLVM of three networks; a subclass says how they learn.

    It sets `upper` to hold the "energy", v -> (n,), and `lower` to hold the "posterior", v -> (mean,
    log-variance), each (n, d), and the "generator", h -> v.
    """

    _latent_dim: int | None = None

    def network(self, name: Literal["energy", "posterior", "generator"]) -> nn.Module:
        """One of the three networks."""
        return (self.upper if name == "energy" else self.lower).get_submodule(name)

    @property
    def latent_dim(self) -> int:
        """Dimension d of the latent.

        Raises:
            ValueError: if it was not given and no data have been seen yet.
        """
        if self._latent_dim is None:
            raise ValueError(
                "the dimension of the latent is not known before the model has seen data; give "
                f"`latent_dim` to `{type(self).__name__}`"
            )
        return self._latent_dim

    def find_latent_dim(self, v: Tensor) -> None:
        """Where it was not given, read it off the posterior of visibles."""
        if self._latent_dim is None:
            with self.evaluating("running"):
                out = attempt("posterior", self.network("posterior"), v[:2])
            if isinstance(out, tuple):  # anything else is refused by `probe`
                self._latent_dim = out[0].shape[1]

    # The networks' answers in float32 at least: sums over pixels and latents need it.

    def generate(self, h: Tensor) -> Tensor:
        """G(h), differentiable, in the mode the module is in; of a trained model use `decode`."""
        return widened(self.network("generator")(h))

    def encode(self, v: Tensor, *, frozen: bool = False) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of q1(h|v), differentiable: in v alone if `frozen`."""
        posterior = self.network("posterior")
        if frozen:
            weights = {name: p.detach() for name, p in posterior.named_parameters()}
            mean, log_variance = functional_call(posterior, weights, (v,))
        else:
            mean, log_variance = posterior(v)
        return widened(mean), widened(log_variance)

    def free_energy(self, v: Tensor) -> Tensor:
        """E(v), differentiable, shape (n,)."""
        return widened(self.network("energy")(v)).flatten()

    # ------------------------------------------------------------------ the trained model

    def energy(self, v: Tensor) -> Tensor:
        """The marginal energy E(v), shape (n,); its negative scores how typical v is.

        Batch norm, if the energy has any, always uses running statistics.
        """
        with self.evaluating("running"):
            return chunked(self.free_energy, self.check(v))

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """N visibles G(h), h ~ N(0, I); in one pass, no Markov chain."""
        if n < 1:
            raise ValueError(f"`n` must be positive, got {n}")
        p = next(self.network("generator").parameters())
        h = torch.randn(n, self.latent_dim, generator=generator, dtype=p.dtype, device=p.device)
        with self.evaluating():
            return chunked(self.generate, h)

    def decode(self, h: Tensor) -> Tensor:
        """Visibles G(h) of given latents, shape (n, d), as `sample` draws them.

        Raises:
            ValueError: if they have the wrong width, or are not finite.
        """
        p = next(self.network("generator").parameters())
        with self.evaluating():
            return chunked(self.generate, latents(h, self.latent_dim, p))

    def posterior(self, v: Tensor) -> Distribution:
        """q1(h|v), the model's own posterior: a diagonal Gaussian over (n, d)."""
        with self.evaluating():
            both = chunked(lambda part: torch.stack(self.encode(part), 1), self.check(v))
        mean, log_variance = both.unbind(1)
        return Independent(Normal(mean, (log_variance / 2).exp()), 1)

    def reconstruct(self, v: Tensor) -> Tensor:
        """G(mean of q1(h|v)), same shape as v."""
        with self.evaluating():
            return chunked(lambda part: self.generate(self.encode(part)[0]), self.check(v))

    def probe(self, v: Tensor) -> None:
        self.find_latent_dim(v)
        with self.evaluating("running"):
            out = attempt("posterior", self.network("posterior"), v)
            size = (len(v), self._latent_dim)
            if not isinstance(out, tuple) or any(part.shape != size for part in out):
                raise ValueError(
                    "the posterior must give a mean and a log-variance, each of shape "
                    f"(n, {self._latent_dim or 'd'})"
                )
            h = v.new_zeros(len(v), self.latent_dim)
            generated = attempt("generator", self.network("generator"), h)
            if generated.shape != v.shape:
                raise ValueError(
                    f"the generator maps {self.latent_dim} latents to visibles of shape "
                    f"{tuple(generated.shape[1:])}, but the data have {tuple(v.shape[1:])}"
                )
            energy = attempt("energy", self.network("energy"), v)
            if not isinstance(energy, Tensor) or energy.numel() != len(v):
                raise ValueError("the energy must give one number per visible, shape (n,)")

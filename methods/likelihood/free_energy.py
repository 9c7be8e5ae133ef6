r"""The free energy of any joint energy, bounded from above by a posterior's draws.

With $h_k \sim q(h|v)$, exact draws (relaxed ones bound nothing), and weights
$w_k = e^{-E(v, h_k)} / q(h_k|v)$,

$$ F(v) = -\log \int e^{-E(v, h)} dh \;\le\; E\Big[-\log \frac1S \sum_k w_k\Big]
   \;\le\; E_q[E(v, h) + \log q(h|v)] . $$

The first bound tightens with the number S of draws, the second is what variational learners descend.
Both are tight where q is the posterior.
"""

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from bilevel.methods.variational import VariationalPosterior

Energies: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""(visibles (n, ...), latents (S, n, ...)) -> energies (S, n)."""


def log_weights(
    energies: Energies, posterior: VariationalPosterior, v: Tensor, noise: Tensor
) -> Tensor:
    r"""$\log w_k$ of exact draws from the posterior, shape (S, n).

    Args:
        energies: of visibles and of several latents of each.
        posterior: q(h|v).
        v: visibles, shape (n, ...).
        noise: the posterior's, shape (S, n, d), or (S, 1, d) if all visibles share it.
    """
    latent, log_prob, _ = posterior.exact(v, noise)
    return -energies(v, latent) - log_prob


def free_energy_bound(
    energies: Energies,
    posterior: VariationalPosterior,
    v: Tensor,
    noise: Tensor,
    *,
    weighted: bool,
) -> Tensor:
    """The bound on F(v), shape (n,).

    Args:
        energies: of visibles and of several latents of each.
        posterior: q(h|v).
        v: visibles, shape (n, ...).
        noise: the posterior's, shape (S, n, d), or (S, 1, d) if all visibles share it.
        weighted: the tighter bound, or the mean of energy and log-posterior.

    References:
        Importance Weighted Autoencoders (Burda, Grosse and Salakhutdinov, 2016),
        https://arxiv.org/abs/1509.00519
    """
    log_w = log_weights(energies, posterior, v, noise)
    return math.log(len(log_w)) - log_w.logsumexp(0) if weighted else -log_w.mean(0)


def one_by_one(energy: Callable[[Tensor, Tensor], Tensor]) -> Energies:
    """A joint energy (v, h) -> (n,) that takes one latent of every visible at a time."""

    def energies(v: Tensor, latents: Tensor) -> Tensor:
        return torch.stack([energy(v, h) for h in latents])

    return energies

"""Small variational families, and the enumeration of their states."""

import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Independent

from bilevel.methods.machines.enumeration import states
from bilevel.methods.variational import BernoulliPosterior, HierarchicalJoint
from tests.machines import rng

NV = 3


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=rng(seed), dtype=torch.float64)


def linear(below: int, above: int, seed: int) -> nn.Linear:
    layer = nn.Linear(below, above, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(randn(above, below, seed=seed))
        layer.bias.copy_(randn(above, seed=seed + 100))
    return layer


def net(below: int, above: int, seed: int) -> nn.Module:
    return nn.Sequential(linear(below, 4, seed), nn.Tanh(), linear(4, above, seed + 50))


def posterior(dims: tuple[int, ...] = (2,), temperature: float = 0.1) -> BernoulliPosterior:
    widths = (NV, *dims)
    networks = [net(widths[i], widths[i + 1], seed=i) for i in range(len(dims))]
    return BernoulliPosterior(networks, dims, temperature=temperature)


def joint(
    dims: tuple[int, ...] = (2,),
    *,
    bits: int = 2,
    prior: str = "bernoulli",
    visible: str = "bernoulli",
    auxiliary: nn.Module | None = None,
    temperature: float = 0.1,
) -> HierarchicalJoint:
    widths = (bits, *reversed(dims))
    networks = [net(widths[i], widths[i + 1], seed=10 + i) for i in range(len(dims))]
    networks.append(net(dims[0], NV * (1 + (visible == "gaussian")), seed=20))
    if auxiliary is None:
        auxiliary = net(dims[-1], bits * (1 + (prior == "gaussian")), seed=30)
    return HierarchicalJoint(
        networks,
        auxiliary,
        visible_dim=NV,
        latent_dims=dims,
        latent_dim=bits,
        prior=prior,
        visible=visible,
        temperature=temperature,
    )


def every(units: int) -> Tensor:
    return states(units, 0, 2**units, torch.zeros((), dtype=torch.float64))


def product(*tables: Tensor) -> list[Tensor]:
    """Every combination of the rows of the tables, one tensor per table."""
    index = torch.cartesian_prod(*(torch.arange(len(t)) for t in tables))
    return [t[i] for t, i in zip(tables, index.unbind(1), strict=True)]


def triples(q: HierarchicalJoint) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Every (v, h, z) of a fully binary joint, with log q(z, h, v) by torch.distributions."""
    v, h, z = product(every(NV), every(sum(q.latent_dims)), every(q.latent_dim))
    layers = [z, *reversed(h.split(q.latent_dims, dim=1)), v]
    log_q = Bernoulli(torch.full_like(z, 0.5)).log_prob(z).sum(1)
    for network, above, below in zip(q.networks, layers, layers[1:], strict=False):
        log_q = log_q + Independent(Bernoulli(logits=network(above)), 1).log_prob(below)
    return v, h, z, log_q


class ExactAuxiliary(nn.Module):
    """The logit of q(z|h) for one bit z."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, h: Tensor) -> Tensor:
        zero, one = (
            Independent(Bernoulli(logits=self.network(h.new_tensor([[bit]]))), 1).log_prob(h)
            for bit in (0.0, 1.0)
        )
        return (one - zero)[:, None]


def exact_joint(dims: tuple[int, ...] = (2,), temperature: float = 1e-9) -> HierarchicalJoint:
    inexact = joint(dims, bits=1)
    return joint(
        dims,
        bits=1,
        auxiliary=ExactAuxiliary(inexact.networks[0]),
        temperature=temperature,
    )


def close(a: Tensor, b: Tensor | float, tol: float = 1e-12) -> None:
    torch.testing.assert_close(a, torch.as_tensor(b, dtype=a.dtype), rtol=tol, atol=tol)

"""The undecoupled BiDVL with sampled distributions, on a linear Gaussian model whose truth is known."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

from bilevel import Unrolled, check_hypergradient
from bilevel.methods import GeneralBiDVL
from bilevel.methods.variational import GaussianJoint, GaussianPosterior

D, H = 3, 2


def weights(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class LinearEnergy(nn.Module):
    """E(v, h) = |v - A h|^2 / 2 + |h|^2 / 2, so p(v) = N(0, I + A A^T)."""

    def __init__(self) -> None:
        super().__init__()
        # orthogonal columns: the posterior's covariance is diagonal, within the Gaussian family
        self.matrix = nn.Parameter(torch.linalg.qr(weights(D, H))[0] * torch.tensor([1.0, 2.0]))

    def forward(self, v: Tensor, h: Tensor) -> Tensor:
        return 0.5 * ((v - h @ self.matrix.mT).square().sum(1) + h.square().sum(1))


class ExactPosterior(nn.Module):
    """Mean and log-variance of p(h|v) of the linear energy."""

    def __init__(self, energy: LinearEnergy) -> None:
        super().__init__()
        precision = torch.eye(H) + (energy.matrix.mT @ energy.matrix).detach()
        self.gain = nn.Parameter(torch.linalg.solve(precision, energy.matrix.detach().mT))
        self.log_variance = nn.Parameter(-precision.diagonal().log())

    def forward(self, v: Tensor) -> tuple[Tensor, Tensor]:
        return v @ self.gain.mT, self.log_variance.expand(len(v), -1)


def model() -> GeneralBiDVL:
    energy = LinearEnergy()
    generator = nn.Linear(H, D, bias=False, dtype=torch.float64)
    with torch.no_grad():
        generator.weight.copy_(weights(D, H, seed=3))
    return GeneralBiDVL(
        energy,
        GaussianPosterior(ExactPosterior(energy).double(), H),
        GaussianJoint(generator, H, (D,), sigma=0.7),
    ).double()


def test_draws_carry_their_own_log_probability() -> None:
    made = model()
    v = weights(5, D, seed=1)
    generator = torch.Generator().manual_seed(0)
    for part, draws in (
        ("posterior", made.lower["posterior"].draws(v, weights(5, H, seed=2))),
        ("joint", made.lower["joint"].draws(weights(5, H + D, seed=2))),
    ):
        again = made.lower[part].log_prob(draws.visible, draws.latent)
        torch.testing.assert_close(draws.log_prob, again, rtol=1e-12, atol=1e-12)
    distribution = made.lower["posterior"].distribution(v)
    h = distribution.sample()
    torch.testing.assert_close(
        made.lower["posterior"].log_prob(v, h), distribution.log_prob(h), rtol=1e-12, atol=1e-12
    )
    assert made.lower["joint"].noise(4, generator, v).shape == (4, H + D)


def test_joint_is_a_normalised_gaussian() -> None:
    """log p2(v, h) against torch's multivariate normal of (h, v)."""
    joint = model().lower["joint"]
    g, s = joint.generator.weight.detach(), joint.sigma
    top = torch.cat([torch.eye(H).double(), g.mT], dim=1)
    bottom = torch.cat([g, g @ g.mT + s**2 * torch.eye(D).double()], dim=1)
    truth = MultivariateNormal(torch.zeros(H + D).double(), torch.cat([top, bottom]))
    v, h = weights(6, D, seed=4), weights(6, H, seed=5)
    expected = truth.log_prob(torch.cat([h, v], dim=1))
    torch.testing.assert_close(joint.log_prob(v, h), expected, rtol=1e-10, atol=1e-10)


def test_energy_at_the_exact_posterior_is_the_free_energy() -> None:
    """E + log q1 does not depend on h then: the bound is exact for every draw."""
    made = model()
    v = weights(4, D, seed=6)
    matrix = made.upper["energy"].matrix.detach()
    covariance = torch.eye(D) + matrix @ matrix.mT
    log_p = MultivariateNormal(torch.zeros(D).double(), covariance).log_prob(v)
    log_z = 0.5 * (D + H) * math.log(2 * math.pi)  # the joint Gaussian has determinant one
    torch.testing.assert_close(made.energy(v), -log_p - log_z, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("steps", [1, 4])
def test_unrolled_hypergradient_equals_finite_differences(steps: int) -> None:
    made = model()
    batch = made.draw(weights(7, D, seed=7), torch.Generator().manual_seed(8))
    optimizer = torch.optim.SGD(made.lower.parameters(), 1e-2, momentum=0.5)
    check = check_hypergradient(
        made, Unrolled(steps), batch, [batch], lower_optimizer=optimizer, tolerance=1e-9
    )
    assert check.passed, check


def test_fit_sample_and_reconstruct() -> None:
    made = model()
    data = weights(200, D, seed=9)
    history = made.fit(data, num_steps=5, batch_size=50, log_every=1)
    assert history.steps == 5
    assert made.sample(6, torch.Generator().manual_seed(0)).shape == (6, D)
    assert made.reconstruct(data[:3]).shape == (3, D)
    assert made.posterior(data[:3]).sample().shape == (3, H)


def test_symmetric_divergence_needs_an_enumerable_energy() -> None:
    made = model()
    with pytest.raises(ValueError, match="`LinearEnergy` does not have; use divergence='kl'"):
        GeneralBiDVL(
            made.upper["energy"],
            made.lower["posterior"],
            made.lower["joint"],
            divergence="symmetric",
        )

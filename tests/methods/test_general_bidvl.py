"""The undecoupled BiDVL with sampled distributions, on a linear Gaussian model whose truth is known."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

from bilevel import Alternating, Unrolled, check_hypergradient
from bilevel.methods import GeneralBiDVL
from bilevel.methods.models import DBM, RBM, GaussianRBM
from bilevel.methods.variational import GaussianJoint, GaussianPosterior
from tests import machines
from tests.machines import NV, machine, moments, pairs, rng

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


def test_symmetric_divergence_needs_a_machine_or_an_enumerable_energy() -> None:
    made = model()
    with pytest.raises(ValueError, match="got `LinearEnergy` with `GaussianJoint`; use diverg"):
        GeneralBiDVL(
            made.upper["energy"],
            made.lower["posterior"],
            made.lower["joint"],
            divergence="symmetric",
        )


# ---------------------------------------------------------------------- the symmetric KL of a machine


def estimated(made: GeneralBiDVL, n: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """What the reverse divergence of the joint is estimated from: v, h and their weights."""
    batch = made.draw_lower(made.draw(torch.zeros(n, NV).double(), rng(seed)), rng(seed), 0)
    assert batch.proposals is not None
    v, h, log_density, *_ = batch.proposals
    return v, h, (-made.joint_energy(v, h) - log_density).softmax(0)


@pytest.mark.parametrize(
    ("reverse", "sweeps", "tolerance"), [("importance", 1, 0.02), ("gibbs", 30, 0.02)]
)
def test_both_estimators_know_the_machine(reverse: Any, sweeps: int, tolerance: float) -> None:
    """Moments E_p[v h] against enumeration, and their derivative in psi (what `Implicit` needs)."""
    machine_ = machine()
    made = GeneralBiDVL.for_model(
        machine_, divergence="symmetric", reverse=reverse, sweeps=sweeps, prior="bernoulli"
    ).double()
    v, h, weight = estimated(made, 100_000)
    exact = moments(machine_)["weight"]
    moment = torch.einsum("n,ni,nj->ij", weight, v, h)
    torch.testing.assert_close(moment.detach(), exact, rtol=0, atol=tolerance)
    (slope,) = torch.autograd.grad(moment[0, 0], [machine_.weight])
    every_v, every_h = pairs(machine_)
    probability = (-machine_(every_v, every_h)).softmax(0)
    truth = (probability * every_v[:, 0] * every_h[:, 0]).sum()
    (expected,) = torch.autograd.grad(truth, [machine_.weight])
    torch.testing.assert_close(slope, expected, rtol=0, atol=tolerance)


def test_one_sweep_is_biased_and_more_are_less() -> None:
    machine_ = machine()
    errors = []
    for sweeps in (1, 30):
        made = GeneralBiDVL.for_model(machine_, divergence="symmetric", sweeps=sweeps).double()
        v, h, weight = estimated(made, 100_000)
        moment = torch.einsum("n,ni,nj->ij", weight, v, h).detach()
        errors.append(float((moment - moments(machine_)["weight"]).abs().max()))
    assert errors[0] > 3 * errors[1]


def test_the_posterior_direction_is_exact() -> None:
    """KL(q p(h|v) || q q1) in omega: log q1 is linear in h, so no sample is needed."""
    machine_ = machine()
    made = GeneralBiDVL.for_model(machine_, divergence="symmetric").double()
    v = (torch.rand(5, NV, generator=rng(1)) < 0.5).double()
    batch = made.draw_lower(made.draw(v, rng()), rng(), 0)
    without = batch._replace(proposals=None)
    made.divergence = "kl"
    kl, _ = made.lower_loss(without)
    made.divergence = "symmetric"
    full, _ = made.lower_loss(batch)
    posterior = made.lower["posterior"]
    wanted = list(posterior.parameters())
    ours = torch.autograd.grad(full - kl, wanted)
    exact = machines.ExactPosterior(machine_).draws(v, torch.zeros(0))
    truth = -exact.mean(posterior.log_prob(exact.visible, exact.latent))
    for a, b in zip(ours, torch.autograd.grad(truth, wanted), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", [RBM, GaussianRBM, DBM])
@pytest.mark.parametrize("divergence", ["kl", "symmetric"])
def test_use_on_machines(kind: Any, divergence: Any, tmp_path: Path) -> None:
    machine_ = kind(NV, (3, 2) if kind is DBM else 3)
    made = GeneralBiDVL.for_model(machine_, divergence=divergence, sweeps=2)
    data = (torch.rand(40, NV, generator=rng(1)) < 0.5).float()
    made.fit(data, num_steps=2, lower_steps=2, batch_size=10)
    assert made.sample(6, rng()).shape == (6, NV)
    assert made.energy(data).shape == (40,)
    made.save(tmp_path)
    again = GeneralBiDVL.load(tmp_path)
    torch.testing.assert_close(dict(again.state_dict()), dict(made.state_dict()), rtol=0, atol=0)
    assert again.divergence == divergence


def test_a_deep_machine_and_the_symmetric_kl_leave_alternating() -> None:
    made = GeneralBiDVL.for_model(DBM(NV, (3, 2)), divergence="symmetric")
    batch = made.draw(torch.zeros(4, NV), rng())
    lower = made.draw_lower(batch, rng(), 0)
    with pytest.raises(ValueError, match="is not seen; use divergence='kl', or `Alternating"):
        Unrolled(2).hypergradient(made, batch, [lower])
    assert Alternating().hypergradient(made, batch).value.isfinite()


def test_unknown_estimators_and_no_sweeps_are_refused() -> None:
    with pytest.raises(ValueError, match="`reverse` cannot be 'gibs'; did you mean `gibbs`"):
        GeneralBiDVL.for_model(RBM(NV, 3), reverse="gibs")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`sweeps` must be positive, got 0"):
        GeneralBiDVL.for_model(RBM(NV, 3), sweeps=0)


@pytest.mark.usefixtures("traced_only")
@pytest.mark.parametrize("reverse", ["gibbs", "importance"])
def test_traced_steps_equal_eager_ones(reverse: Any) -> None:
    data = (torch.rand(40, NV, generator=rng(1)) < 0.5).double()
    made = [
        GeneralBiDVL.for_model(machine(), divergence="symmetric", reverse=reverse) for _ in range(2)
    ]
    for one, compiled in zip(made, (False, True), strict=True):
        one.fit(data, num_steps=3, lower_steps=2, batch_size=10, compile=compiled)
    torch.testing.assert_close(made[1].state_dict(), made[0].state_dict(), rtol=1e-10, atol=1e-12)

"""Likelihoods and bounds on them, against enumeration."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bilevel.methods.data.tables import load_table
from bilevel.methods.likelihood import (
    LogPartition,
    annealed_importance_sampling,
    chi_square_upper_bound,
    log_likelihood,
    sampler_lower_bound,
    variational_lower_bound,
)
from bilevel.methods.machines.enumeration import states
from bilevel.methods.models import DBM, RBM, GaussianRBM
from bilevel.methods.variational import (
    BernoulliPosterior,
    HierarchicalJoint,
    TabularEnergy,
    TabularJoint,
)
from tests.devices import generator
from tests.methods.likelihood.cases import machine

# ---------------------------------------------------------------------- likelihoods and bounds


def test_log_likelihood_is_exact_where_log_z_enumerates() -> None:
    """Every energy of every state, summed."""
    model = machine("DBM")
    v = (torch.rand(9, 6, generator=generator()) < 0.5).double()
    h = states(9, 0, 2**9, v)

    def minus_free_energy(rows: Tensor) -> Tensor:
        pairs = rows.repeat_interleave(len(h), 0), h.repeat(len(rows), 1)
        return (-model(*pairs).detach()).view(len(rows), len(h)).logsumexp(1)

    log_z = minus_free_energy(states(6, 0, 2**6, v)).logsumexp(0)
    want = (minus_free_energy(v).mean() - log_z).item()
    assert log_likelihood(model, v) == pytest.approx(want, abs=1e-12)
    estimate = LogPartition(torch.full((3,), 2.0, dtype=torch.float64), 10)
    want = -model.free_energy(v).mean().item() - 2
    assert log_likelihood(model, v, estimate) == pytest.approx(want, abs=1e-12)


def test_a_log_likelihood_out_of_reach_says_what_to_use() -> None:
    rbm, v = RBM(30, 26), torch.zeros(2, 30)
    with pytest.raises(ValueError, match="annealed_importance_sampling"):
        log_likelihood(rbm, v)
    assert math.isfinite(log_likelihood(rbm, v, 40.0))
    with pytest.raises(ValueError, match="`variational_lower_bound`"):
        log_likelihood(DBM(30, (26, 3)), v, 40.0)


def exact_posterior(model: Any) -> BernoulliPosterior:
    posterior = BernoulliPosterior.for_model(model)
    linear = posterior.networks[0]
    assert isinstance(linear, nn.Linear)
    with torch.no_grad():
        linear.weight.copy_(model.weight.mT)
        linear.bias.copy_(model.latent_bias)
    return posterior


@pytest.mark.parametrize("kind", ["RBM", "GaussianRBM"])
def test_the_exact_posterior_leaves_no_gap(kind: str) -> None:
    model = machine(kind)
    v = (torch.rand(9, model.visible_dim, generator=generator()) < 0.5).double()
    found = variational_lower_bound(
        model, exact_posterior(model), v, model.log_partition(), generator=generator()
    )
    assert found.gap == pytest.approx(0, abs=1e-12)
    assert found.value == pytest.approx(log_likelihood(model, v), abs=1e-12)
    assert found.standard_error < 1e-12


@pytest.mark.parametrize("kind", ["RBM", "DBM"])
def test_the_gap_is_the_divergence_of_the_posterior(kind: str) -> None:
    model = machine(kind)
    posterior = BernoulliPosterior.for_model(model, generator=generator(3))
    v = (torch.rand(6, 6, generator=generator()) < 0.5).double()
    h = states(sum(model.latent_dims), 0, 2 ** sum(model.latent_dims), v)
    divergence = torch.zeros((), dtype=torch.float64)
    with torch.no_grad():
        for row in v.split(1):
            rows = row.expand(len(h), -1)
            log_q = posterior.log_prob(rows, h)
            log_p = (-model(rows, h)).log_softmax(0)
            divergence += (log_q.exp() * (log_q - log_p)).sum() / len(v)
    found = variational_lower_bound(
        model, posterior, v, model.log_partition(), generator=generator(), num_samples=2000
    )
    assert found.gap is not None
    assert found.gap > 0
    assert abs(found.gap - divergence.item()) < 4 * found.standard_error < 0.1
    assert found.value + found.gap == pytest.approx(log_likelihood(model, v), abs=1e-9)


def test_a_gap_that_cannot_be_computed_is_none() -> None:
    model = DBM(6, (16, 2))
    found = variational_lower_bound(
        model,
        BernoulliPosterior.for_model(model),
        torch.zeros(2, 6),
        10.0,
        generator=generator(),
        num_samples=1,
    )
    assert found.gap is None
    assert found.standard_error == math.inf
    with pytest.raises(ValueError, match="`num_samples` must be at least 1"):
        variational_lower_bound(
            model,
            BernoulliPosterior.for_model(model),
            torch.zeros(2, 6),
            10.0,
            generator=generator(),
            num_samples=0,
        )


def test_advil_13_half_the_log_of_the_mean_square_is_above_log_z() -> None:
    table = torch.randn(6, 5, generator=generator(1), dtype=torch.float64)
    energy = TabularEnergy(table)
    log_z = (-table).flatten().logsumexp(0).item()
    for seed in range(5):
        q = TabularJoint(torch.randn(6, 5, generator=generator(seed), dtype=torch.float64))
        above = chi_square_upper_bound(energy, q, generator=generator(), num_samples=1)
        below = sampler_lower_bound(energy, q, generator=generator(), num_samples=1)
        assert below.value < log_z < above.value
        log_q = q.logits.detach().flatten().log_softmax(0)
        want = 0.5 * (-2 * table.flatten() - log_q).logsumexp(0).item()
        assert above.value == pytest.approx(want, abs=1e-12)
    perfect = TabularJoint(-table)
    for bound in (chi_square_upper_bound, sampler_lower_bound):
        found = bound(energy, perfect, generator=generator(), num_samples=1)
        assert found.value == pytest.approx(log_z, abs=1e-12)
        assert found.standard_error == 0


@pytest.mark.parametrize("prior", ["gaussian", "bernoulli"])
def test_advil_14_the_sampler_bounds_log_z_on_both_sides(prior: Any) -> None:
    """With the auxiliary r(z|h) too, trained or not; the draws are many enough for the upper one."""
    model = machine("RBM", scale=0.3)
    joint = HierarchicalJoint.for_model(model, prior=prior, latent_dim=2, hidden=3)
    log_z = model.log_partition().item()
    below = sampler_lower_bound(model, joint, generator=generator(), num_samples=20_000)
    above = chi_square_upper_bound(model, joint, generator=generator(), num_samples=20_000)
    assert below.value + 3 * below.standard_error < log_z
    assert above.value - 3 * above.standard_error > log_z
    assert above.standard_error < 0.2
    with pytest.raises(ValueError, match="`num_samples` must be at least 1"):
        chi_square_upper_bound(model, joint, generator=generator(), num_samples=0)


# ---------------------------------------------------------------------- impossible likelihoods


def test_advil_12_the_base_rate_of_the_digits_is_where_likelihoods_start() -> None:
    table = load_table("digits")
    train, test = table.train.double(), table.test.double()
    model = RBM(64, 15, grey=True).double()
    base = model.base_rate(train)
    with torch.no_grad():
        model.weight.zero_()
        model.visible_bias.copy_(base)
    found = log_likelihood(model, test)
    assert found == pytest.approx(-30.90, abs=0.01)
    estimate = annealed_importance_sampling(
        model, temperatures=10, num_chains=3, base=base, generator=generator()
    )
    assert log_likelihood(model, test, estimate) == pytest.approx(found, abs=1e-9)


def test_bism_15_no_likelihood_on_the_checkerboard_beats_its_entropy() -> None:
    g = generator()
    v = 0.5 * torch.rand(2000, 2, generator=g, dtype=torch.float64)
    v[1000:] += 0.5
    model = GaussianRBM(2, 4).double()
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(400):
        optimizer.zero_grad()
        (-model.log_likelihood(v).mean()).backward()
        optimizer.step()
    found = log_likelihood(model, v)
    assert -0.3 < found < 0.36 < math.log(2)

"""Bounds with binary latents against enumeration; numbers are AdvIL's assertions."""

import pytest
import torch
from torch import Tensor

from bilevel.methods.models import DBM, RBM, BoltzmannMachine
from bilevel.methods.variational import (
    BernoulliPosterior,
    HierarchicalJoint,
    TabularEnergy,
    TabularJoint,
    TabularPosterior,
)
from tests.machines import rng
from tests.methods.variational.cases import (
    NV,
    close,
    every,
    exact_joint,
    joint,
    posterior,
    product,
    randn,
    triples,
)


def tabular(model: BoltzmannMachine) -> TabularEnergy:
    units = sum(model.latent_dims)
    v, h = product(every(model.visible_dim), every(units))
    return TabularEnergy(model(v, h).detach().view(-1, 2**units))


def saddle(energy: TabularEnergy, q: TabularPosterior, p: TabularJoint, data: Tensor) -> Tensor:
    """AdvIL's objective, every expectation exact."""
    none = torch.zeros(0)
    up, down = q.draws(data, none), p.draws(none)
    return up.mean(energy(up.visible, up.latent) + up.log_prob) - down.mean(
        energy(down.visible, down.latent) + down.log_prob
    )


@pytest.mark.parametrize("model", [RBM(NV, 2), DBM(NV, (2, 2))], ids=["RBM", "DBM"])
def test_2_the_objective_at_the_exact_distributions_is_the_likelihood(model) -> None:
    model = model.double()
    energy, data = tabular(model), torch.tensor([0, 3, 5, 5])
    log_joint = energy.log_joint().detach()
    exact = saddle(energy, TabularPosterior(log_joint), TabularJoint(log_joint), data)
    close(exact, -model.log_likelihood(every(NV)[data]).mean())


def test_3_the_objective_misses_the_likelihood_by_two_divergences_of_either_sign() -> None:
    model = RBM(NV, 2).double()
    energy, data = tabular(model), torch.tensor([0, 3, 5, 5])
    log_joint = energy.log_joint().detach()
    log_posterior = log_joint.log_softmax(1)
    nll = -model.log_likelihood(every(NV)[data]).mean()
    gaps = []
    for up_noise, down_noise in ((1.0, 0.1), (0.1, 1.0)):
        q = TabularPosterior(log_joint + up_noise * randn(8, 4, seed=1))
        p = TabularJoint(log_joint + down_noise * randn(8, 4, seed=2))
        log_q, log_p = q.logits.log_softmax(1), p.logits.flatten().log_softmax(0).view(8, 4)
        kl_up = (log_q.exp() * (log_q - log_posterior)).sum(1)[data].mean()
        kl_down = (log_p.exp() * (log_p - log_joint)).sum()
        gaps.append(saddle(energy, q, p, data) - nll)
        close(gaps[-1], kl_up - kl_down)
    assert gaps[0] > 0 > gaps[1]


def test_3_holds_for_the_sampled_families_by_enumeration() -> None:
    model, q, p = RBM(NV, 2).double(), posterior(), joint()
    data = every(NV)[[0, 3, 5, 5]]
    v, h = product(data, every(2))
    log_q = q.log_prob(v, h)
    up = (log_q.exp() * (model(v, h) + log_q)).sum() / len(data)
    kl_up = (log_q.exp() * (log_q + model(v, h) - model.free_energy(v))).sum() / len(data)
    v, h = product(every(NV), every(2))
    log_p = p.log_prob(v, h)
    down = (log_p.exp() * (model(v, h) + log_p)).sum()
    kl_down = (log_p.exp() * (log_p + model(v, h) + model.log_partition())).sum()
    close(up - down + model.log_likelihood(data).mean(), kl_up - kl_down)


def sampler_bound(model: BoltzmannMachine, q: HierarchicalJoint) -> Tensor:
    """The lower bound on log Z with exact expectations over 0/1 states."""
    v, h, z, log_q = triples(q)
    return (log_q.exp() * (-model(v, h) - q.log_weight(v, h, z))).sum()


@pytest.mark.parametrize(
    ("model", "dims"), [(RBM(NV, 2), (2,)), (DBM(NV, (2, 2)), (2, 2))], ids=["RBM", "DBM"]
)
def test_4_the_sampler_bounds_log_z_from_below(model, dims) -> None:
    model = model.double()
    assert sampler_bound(model, joint(dims)) < model.log_partition() - 1e-3
    assert sampler_bound(model, exact_joint(dims)) < model.log_partition() - 1e-3


def test_4_with_equality_where_the_sampler_is_the_model_and_r_exact() -> None:
    """One hidden unit: p(h) is a coin that z need not bend, so q(z|h) is uniform."""
    model = RBM(NV, 1).double()
    with torch.no_grad():
        model.visible_bias.copy_(randn(NV))
    q = HierarchicalJoint.for_model(model, prior="bernoulli", latent_dim=2, hidden=0)
    log_odds = model.log_unnormalized_first(every(1)).diff()
    with torch.no_grad():
        for p in q.parameters():
            p.zero_()
        q.networks[0].bias.copy_(log_odds)
        q.networks[1].weight.copy_(model.weight)
        q.networks[1].bias.copy_(model.visible_bias)
    close(sampler_bound(model, q), model.log_partition())
    with torch.no_grad():
        q.networks[0].bias += 0.1
    assert sampler_bound(model, q) < model.log_partition() - 1e-5


@pytest.mark.parametrize("dims", [(2,), (2, 3)])
def test_5_the_entropy_bound_is_tight_iff_r_is_the_posterior_of_z(dims) -> None:
    def entropy(q: HierarchicalJoint) -> Tensor:
        v, h = product(every(NV), every(sum(q.latent_dims)))
        log_prob = q.log_prob(v, h)
        return -(log_prob.exp() * log_prob).sum()

    def bound(q: HierarchicalJoint) -> Tensor:
        v, h, z, log_q = triples(q)
        return -(log_q.exp() * q.log_weight(v, h, z)).sum()

    close(bound(exact_joint(dims)), entropy(exact_joint(dims)))
    for loose in (joint(dims, bits=1), joint(dims, bits=3)):
        assert bound(loose) < entropy(loose) - 1e-3


def test_8_linear_logits_contain_the_posterior_of_an_rbm() -> None:
    model = RBM(NV, 2, generator=rng(4)).double()
    q = BernoulliPosterior.for_model(model)
    with torch.no_grad():
        model.latent_bias.copy_(randn(2))
        q.networks[0].weight.copy_(model.weight.mT)
        q.networks[0].bias.copy_(model.latent_bias)
    v, h = product(every(NV), every(2))
    close(q.log_prob(v, h), model.free_energy(v) - model(v, h))
    close(q.logits(v), model.posterior_logits(v))
    log_q = q.log_prob(v, h)
    encoder_loss = (log_q.exp() * (model(v, h) + log_q)).sum() / 2**NV
    close(encoder_loss, model.free_energy(every(NV)).mean())

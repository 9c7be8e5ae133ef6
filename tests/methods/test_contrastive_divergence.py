"""Contrastive divergence: its gradient from exact samples, and its chains."""

import copy
import itertools
import math

import pytest
import torch
from torch import Tensor

from bilevel.methods.contrastive_divergence import Batch, ContrastiveDivergence
from bilevel.methods.maximum_likelihood import MaximumLikelihood
from bilevel.methods.models import RBM
from tests.methods.small_models import (
    BINARY,
    EXACT,
    MACHINES,
    assert_distributed,
    bits,
    data_for,
    draws,
    gradient,
    joint_states,
    loss_of,
    machine,
)
from tests.problems import generator, normal


@pytest.mark.parametrize("name", ["RBM", "RBM, more latents"])
def test_divergence_with_exact_samples_has_the_likelihood_gradient(name: str) -> None:
    """The expectation over v_k ~ p, by enumeration."""
    model = MACHINES[name]()
    learner, exact = ContrastiveDivergence(model), MaximumLikelihood(model)
    data = data_for(model)
    with torch.no_grad():
        p = model.log_likelihood(bits(model.visible_dim)).exp()
    losses = [loss_of(learner, Batch(data, None, v[None], None)) for v in bits(model.visible_dim)]
    found = gradient(learner, p @ torch.stack(losses))
    wanted = gradient(exact, loss_of(exact, data))
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, **EXACT)


@pytest.mark.parametrize("name", ["DBM", "GaussianDBM"])
def test_divergence_of_two_layers_has_the_gradient_of_the_variational_bound(name: str) -> None:
    """Of E(v, mu) - H(mu) + log Z, by finite differences that let mu follow."""
    model = MACHINES[name]()
    learner, data = ContrastiveDivergence(model), data_for(model)

    def bound() -> Tensor:
        mu = model.mean_field(data, sweeps=60)
        entropy = torch.special.entr(mu) + torch.special.entr(1 - mu)
        return (model(data, mu) - entropy.sum(1)).mean() + model.log_partition()

    mu = model.mean_field(data, sweeps=60)
    log_z = gradient(learner, model.log_partition())
    positive = gradient(learner, model(data, mu).mean())
    loss = loss_of(learner, Batch(data, mu, data[:1], mu[:1]))
    negative = gradient(learner, model(data[:1], mu[:1]).mean())
    of_loss = gradient(learner, loss)
    for key, parameter in learner.variables("upper").items():
        torch.testing.assert_close(of_loss[key], positive[key] - negative[key], **EXACT)
        flat, step = parameter.detach().view(-1), 1e-5
        values = []
        for sign in (1, -1):
            flat[0] += sign * step
            values.append(bound().item())
            flat[0] -= sign * step
        difference = (values[0] - values[1]) / (2 * step)
        found = (positive[key] + log_z[key]).view(-1)[0].item()
        assert found == pytest.approx(difference, abs=1e-8)


def test_joint_samples_of_two_layers_give_the_model_term() -> None:
    model = MACHINES["DBM"]()
    learner, data = ContrastiveDivergence(model), data_for(model)
    mu = model.mean_field(data)
    v, h, p = joint_states(model)
    losses = [loss_of(learner, Batch(data, mu, v[i : i + 1], h[i : i + 1])) for i in range(len(v))]
    found = gradient(learner, p @ torch.stack(losses))
    wanted = gradient(learner, model(data, mu).mean() + model.log_partition())
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, **EXACT)


def test_mean_field_descends_its_bound_and_is_exact_without_a_second_layer() -> None:
    model = MACHINES["DBM"]()
    v = data_for(model)
    with torch.no_grad():
        bounds = []
        for sweeps in (1, 2, 4, 8, 100):
            mu = model.mean_field(v, sweeps)
            entropy = torch.special.entr(mu) + torch.special.entr(1 - mu)
            bounds.append(model(v, mu) - entropy.sum(1))
        for worse, better in itertools.pairwise(bounds):
            assert bool((better <= worse + 1e-12).all())
        assert bool((bounds[0] > bounds[1]).all())
        assert bool((bounds[-1] >= model.free_energy(v)).all())
        model.weight2.zero_()
        mu = model.mean_field(v, sweeps=1)
        entropy = torch.special.entr(mu) + torch.special.entr(1 - mu)
        torch.testing.assert_close(model(v, mu) - entropy.sum(1), model.free_energy(v), **EXACT)
    single = MACHINES["RBM"]()
    exact = single.posterior_logits(data_for(single)).sigmoid()
    torch.testing.assert_close(single.mean_field(data_for(single), 1), exact, **EXACT)


@pytest.mark.parametrize("steps", [1, 3])
def test_chains_from_data_leave_the_model_invariant(steps: int) -> None:
    model = MACHINES["RBM"]()
    with torch.no_grad():
        p = model.log_likelihood(bits(4)).exp()
    data = bits(4)[draws(p, 200_000)]
    batch = ContrastiveDivergence(model, steps).draw(data, generator(1))
    assert_distributed(batch.sampled_visible, p)
    assert not batch.sampled_visible.equal(data)
    assert batch.visible is data
    assert batch.mean_field is batch.sampled_latent is None


@pytest.mark.parametrize("name", BINARY)
def test_persistent_chains_leave_the_model_invariant(name: str) -> None:
    model = MACHINES[name]()
    learner = ContrastiveDivergence(model, steps=2, persistent=True)
    _, h, p = joint_states(model)
    learner.chains = h[draws(p, 200_000)][:, : model.latent_dims[0]]
    before = learner.chains.clone()
    batch = learner.draw(data_for(model), generator(1))
    assert_distributed(batch.sampled_visible, p.view(2**model.visible_dim, -1).sum(1))
    first = bits(model.latent_dims[0])
    marginal = torch.stack([p[(h[:, : first.shape[1]] == row).all(1)].sum() for row in first])
    assert_distributed(learner.chains, marginal)
    assert not learner.chains.equal(before)
    if batch.sampled_latent is not None:
        assert batch.sampled_latent[:, : first.shape[1]].equal(learner.chains)
        both = torch.cat([batch.sampled_latent, batch.sampled_visible], dim=1)
        assert_distributed(both, p)  # numbered as the joint states are: v counts for more


def test_persistent_chains_go_on_where_they_were_and_forget_their_start() -> None:
    model = MACHINES["RBM"]()
    learner = ContrastiveDivergence(model, persistent=True, num_chains=50_000)
    source, data = generator(2), torch.zeros(10, 4, dtype=torch.float64)
    for _ in range(60):
        batch = learner.draw(data, source)
    with torch.no_grad():
        p = model.log_likelihood(bits(4)).exp()
    assert_distributed(batch.sampled_visible, p)
    assert len(learner.chains) == 50_000
    state = generator(3)
    v, h = model.gibbs(learner.chains.clone(), state.clone_state())
    batch = learner.draw(data, state)
    assert batch.sampled_visible.equal(v)
    assert learner.chains.equal(h)


def test_contrastive_chains_start_at_the_data_of_each_batch() -> None:
    model = machine(RBM, 4, 3)
    with torch.no_grad():
        model.weight.copy_(50 * torch.eye(4, 3))  # h copies three visibles, v copies h
        model.visible_bias.copy_(torch.tensor([-25.0, -25, -25, -25]))
        model.latent_bias.fill_(-25)
    learner = ContrastiveDivergence(model)
    for seed in range(3):
        data = (normal(8, 4, seed=seed) > 0).double()
        kept = learner.draw(data, generator(seed)).sampled_visible
        assert kept[:, :3].equal(data[:, :3])


@pytest.mark.parametrize("name", ["RBM", "GaussianRBM", "DBM"])
def test_a_resumed_persistent_run_equals_the_uninterrupted_one(name: str, tmp_path) -> None:
    truth = MACHINES[name]()
    data = truth.gibbs(truth.initial(60, generator()), generator(), steps=20)[0]
    states_ = []
    for folder, stops in (("whole", [6]), ("parts", [3, 6])):
        for part, stop in enumerate(stops):
            learner = ContrastiveDivergence(MACHINES[name](), persistent=True)
            learner.fit(
                data,
                num_steps=6,
                batch_size=20,
                checkpoint_every=3,
                run=tmp_path / folder,
                resume=part > 0,
                callbacks=[lambda step, stop=stop: step.number == stop],
            )
        states_.append(learner.state_dict())
    assert states_[0]["chains"].shape == (20, truth.latent_dims[0])
    assert states_[0].keys() == states_[1].keys()
    assert all(states_[0][key].equal(states_[1][key]) for key in states_[0])


def test_number_of_chains_need_not_be_the_batch_size() -> None:
    learner = ContrastiveDivergence(MACHINES["RBM"](), persistent=True, num_chains=33)
    data = data_for(learner.model, 10)
    assert learner.chains.shape == (0, 3)
    assert len(learner.draw(data, generator()).sampled_visible) == 33
    assert math.isfinite(loss_of(learner, learner.draw(data, generator())).item())
    twin = copy.deepcopy(learner)
    twin.load_state_dict(ContrastiveDivergence(learner.model, persistent=True).state_dict())
    assert twin.chains.shape == (0, 3)
    assert learner.chains.shape == (33, 3)

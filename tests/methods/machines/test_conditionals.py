"""Conditional distributions of Boltzmann machines against enumeration; where chains start."""

import pytest
import torch
from torch.autograd import grad
from torch.distributions import Bernoulli

from bilevel.methods.models import RBM, GaussianRBM
from tests.devices import generator
from tests.methods.machines.cases import (
    BINARY,
    EXACT,
    GAUSSIAN,
    by_definition,
    cube,
    machine,
    pairs,
    visibles,
)


@pytest.mark.parametrize("name", ["RBM", "GaussianRBM"])
def test_posterior_logits_are_those_of_the_enumerated_posterior(name: str, device: str):
    """A8: the linear-logit posterior with (W, c) is exact."""
    model = machine(name, device)
    v, h = visibles(model), cube(model.latent_dims[0], device)
    posterior = (-by_definition(model, *pairs(v, h)).view(len(v), -1)).log_softmax(1)
    rows, states = pairs(v, h)
    log_q = Bernoulli(logits=model.posterior_logits(rows)).log_prob(states).sum(1)
    torch.testing.assert_close(log_q.view(len(v), -1), posterior, **EXACT)


@pytest.mark.parametrize("name", BINARY)
def test_visible_mean_is_that_of_the_enumerated_conditional(name: str, device: str):
    model = machine(name, device)
    v, h = cube(model.visible_dim, device), cube(sum(model.latent_dims), device)
    weights = (-by_definition(model, *pairs(v, h)).view(len(v), -1)).softmax(0)
    torch.testing.assert_close(model.visible_mean(h), weights.mT @ v, **EXACT)


@pytest.mark.parametrize("name", GAUSSIAN)
def test_gaussian_energy_is_flat_in_the_visible_at_its_mean(name: str, device: str):
    """B1: grad_v E vanishes at b + s^2 W h."""
    model = machine(name, device)
    h = cube(sum(model.latent_dims), device)
    v = model.visible_mean(h).detach().requires_grad_()
    (slope,) = grad(model(v, h).sum(), v)
    torch.testing.assert_close(slope, torch.zeros_like(slope), **EXACT)


@pytest.mark.parametrize("name", ["DBM", "GaussianDBM"])
def test_conditionals_of_two_layers_are_those_of_the_energy(name: str, device: str):
    """The log-odds of a unit are the energy without it less the energy with it."""
    model = machine(name, device)
    h = cube(sum(model.latent_dims), device)
    v = visibles(model, len(h))
    h1, h2 = h.split(model.latent_dims, dim=1)
    logits = torch.cat([model._first_logits(v, h2), model._second_logits(h1)], dim=1)
    for unit in range(h.shape[1]):
        off, on = h.clone(), h.clone()
        off[:, unit], on[:, unit] = 0, 1
        odds = by_definition(model, v, off) - by_definition(model, v, on)
        torch.testing.assert_close(logits[:, unit], odds, **EXACT)


def test_chains_start_at_visibles_from_the_posterior(device: str):
    """One hidden layer: a draw from p(h|v). Two: every unit of the second layer at 1/2."""
    n = 40_000
    for name in ("RBM", "GaussianRBM", "DBM", "GaussianDBM"):
        model = machine(name, device)
        v = visibles(model, 1).expand(n, -1)
        h1 = model.first_layer(v, generator(device=device))
        if len(model.latent_dims) == 1:
            probabilities = model.posterior_logits(v[:1]).sigmoid()
        else:
            logits = model.latent_bias1 + v[:1] @ model.weight1 + model.weight2.sum(1) / 2
            probabilities = logits.sigmoid()
        z = (h1.mean(0) - probabilities[0]) / (probabilities[0] * (1 - probabilities[0]) / n).sqrt()
        assert h1.shape == (n, model.latent_dims[0])
        assert float(z.abs().max().detach()) < 5, name


def test_initial_layers_are_fair_coins(device: str):
    model = machine("DBM", device)
    h1 = model.initial(40_000, generator(device=device))
    assert set(h1.unique().tolist()) == {0.0, 1.0}
    assert h1.dtype == torch.float64
    assert float(((h1.mean(0) - 0.5) * 2 * 200).abs().max()) < 5  # standard deviations


def test_base_rate_is_the_clipped_mean(device: str):
    data = torch.tensor([[0.0, 1.0, 0.25], [0.0, 1.0, 0.75]], device=device).double()
    rate = RBM(3, 2).base_rate(data).sigmoid()
    torch.testing.assert_close(
        rate.cpu(), torch.tensor([1e-5, 1 - 1e-5, 0.5], dtype=torch.float64), **EXACT
    )
    assert GaussianRBM(3, 2).base_rate(data) is None

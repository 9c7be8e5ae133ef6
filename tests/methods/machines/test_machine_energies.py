"""Energies and sums of Boltzmann machines against brute force: enumerated, or integrated on a grid.

Numbers in brackets are those of the assertions in the papers' fact sheets: A for AdvIL, B for BiSM.
"""

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from bilevel.methods.models import RBM, GaussianDBM, GaussianRBM, enumeration
from tests.methods.machines.cases import (
    BINARY,
    EXACT,
    GAUSSIAN,
    MACHINES,
    by_definition,
    cube,
    line,
    machine,
    normal,
    pairs,
    trained,
    visibles,
)


@pytest.mark.parametrize("name", MACHINES)
def test_energy_is_its_definition_for_any_visible_and_relaxed_latents(name: str, device: str):
    model = machine(name, device)
    v = normal(9, model.visible_dim, device=device)
    h = normal(9, sum(model.latent_dims), seed=1, device=device).sigmoid()
    torch.testing.assert_close(model(v, h), by_definition(model, v, h), **EXACT)


@pytest.mark.parametrize("name", MACHINES)
def test_free_energy_sums_out_the_latent(name: str, device: str):
    """A8 (half), B1."""
    model = machine(name, device)
    v, states = visibles(model), cube(sum(model.latent_dims), device)
    energies = by_definition(model, *pairs(v, states)).view(len(v), -1)
    torch.testing.assert_close(model.free_energy(v), -(-energies).logsumexp(1), **EXACT)


@pytest.mark.parametrize("name", BINARY)
def test_log_partition_three_ways(name: str, device: str):
    """A1: over all states, over the visibles, over the first hidden layer alone."""
    model = machine(name, device)
    v, h = cube(model.visible_dim, device), cube(sum(model.latent_dims), device)
    everything = (-by_definition(model, *pairs(v, h))).logsumexp(0)
    over_visibles = (-model.free_energy(v)).logsumexp(0)
    over_first = model.log_unnormalized_first(cube(model.latent_dims[0], device)).logsumexp(0)
    for way in (over_visibles, over_first, model.log_partition()):
        torch.testing.assert_close(way, everything, **EXACT)


@pytest.mark.parametrize("name", BINARY)
def test_log_partition_enumerates_the_cheaper_side(name: str):
    model = machine(name)
    units, _ = model._cheaper_side()
    assert units == min(model.latent_dims[0], model.visible_dim + sum(model.latent_dims[1:]))


def test_log_partition_of_a_machine_and_its_transpose_agree():
    model, transpose = trained(RBM(6, 4)), RBM(4, 6).double()
    transpose.load_state_dict(
        {
            "weight": model.weight.mT,
            "visible_bias": model.latent_bias,
            "latent_bias": model.visible_bias,
        }
    )
    torch.testing.assert_close(model.log_partition(), transpose.log_partition(), **EXACT)


@pytest.mark.parametrize("make", [GaussianRBM, lambda d, n: GaussianDBM(d, (n, 2))])
@pytest.mark.parametrize("dim", [1, 2])
def test_gaussian_log_partition_is_the_integral_over_a_grid(make: Any, dim: int, device: str):
    """B1; the trapezoidal rule is exact to rounding for sums of Gaussians this wide."""
    model = trained(make(dim, 3), device, size=0.3)
    grid, cell = line(dim, 601, 30.0, device)
    with torch.no_grad():
        integral = (-model.free_energy(grid)).logsumexp(0) + math.log(cell)
        torch.testing.assert_close(model.log_partition(), integral, **EXACT)
        total = model.log_likelihood(grid).exp().sum() * cell
    assert abs(float(total) - 1) < 1e-12


@pytest.mark.parametrize("name", GAUSSIAN)
def test_gaussian_machine_is_a_mixture_over_its_first_layer(name: str, device: str):
    model = machine(name, device)
    h1 = cube(model.latent_dims[0], device)
    component = Normal(model.visible_mean(h1), model.log_scale.exp())
    mixture = MixtureSameFamily(
        Categorical(logits=model.log_unnormalized_first(h1)), Independent(component, 1)
    )
    v = visibles(model)
    torch.testing.assert_close(model.log_likelihood(v), mixture.log_prob(v), **EXACT)


@pytest.mark.parametrize("name", BINARY)
def test_probabilities_of_all_visibles_sum_to_one(name: str):
    model = machine(name)
    total = model.log_likelihood(cube(model.visible_dim)).exp().sum()
    assert abs(float(total.detach()) - 1) < 1e-12


def test_without_interactions_the_likelihood_is_that_of_the_base_rate(device: str):
    model, data = machine("RBM", device), normal(50, 5, device=device).sigmoid()
    model.binary = False  # grey values stand for probabilities
    with torch.no_grad():
        model.weight.zero_()
        model.visible_bias.copy_(model.base_rate(data))
    expected = -nn.functional.binary_cross_entropy_with_logits(
        model.visible_bias.expand_as(data), data, reduction="none"
    ).sum(1)
    torch.testing.assert_close(model.log_likelihood(data), expected, **EXACT)


def test_advils_gaussian_machine_is_ours_with_the_weights_divided_by_the_scale(device: str):
    """E = |v - b|^2 / (2 s^2) - c.h - v^T W' h / s and AdvIL's own log p~(h), with one s for all."""
    model, scale = machine("GaussianRBM", device), 0.7
    theirs = normal(2, 4, seed=5, device=device)
    with torch.no_grad():
        model.log_scale.fill_(math.log(scale))
        model.weight.copy_(theirs / scale)
    b, c, h = model.visible_bias, model.latent_bias, cube(4, device)
    v = visibles(model, len(h))
    energy = (v - b).square().sum(1) / (2 * scale**2) - h @ c - ((v @ theirs / scale) * h).sum(1)
    torch.testing.assert_close(model(v, h), energy, **EXACT)
    field = h @ theirs.mT
    marginal = 0.5 * field.square().sum(1) + field @ b / scale + h @ c
    marginal = marginal + math.log(2 * math.pi * scale**2)  # d/2 log(2 pi s^2) for d = 2
    torch.testing.assert_close(model.log_unnormalized_first(h), marginal, **EXACT)
    torch.testing.assert_close(model.visible_mean(h), scale * field + b, **EXACT)
    torch.testing.assert_close(model.posterior_logits(v), c + v @ theirs / scale, **EXACT)


@pytest.mark.parametrize("name", MACHINES)
def test_float32_agrees_with_float64(name: str, device: str):
    model = machine(name, device)
    single = copy.deepcopy(model).float()
    v = visibles(model)
    h = torch.bernoulli(torch.full((7, sum(model.latent_dims)), 0.5, device=device))
    torch.testing.assert_close(single(v.float(), h), model(v, h.double()).float())
    torch.testing.assert_close(single.log_likelihood(v.float()), model.log_likelihood(v).float())


def test_sums_survive_large_interactions():
    model = machine("RBM")
    with torch.no_grad():
        model.weight.mul_(1e4)
    v = cube(5)
    assert model.log_likelihood(v).isfinite().all()
    assert abs(float(model.log_likelihood(v).exp().sum().detach()) - 1) < 1e-10  # of sums near 1e4


def test_log_one_plus_exp_is_exact_beyond_torchs_threshold():
    """torch's softplus is the identity from 20 on: an error of 2e-9."""
    x = torch.tensor([-800.0, -30.0, 0.0, 19.0, 20.5, 25.0, 39.0, 41.0, 800.0], dtype=torch.float64)
    expected = [math.log1p(math.exp(-abs(t))) + max(t, 0.0) for t in x.tolist()]
    actual = enumeration.log_one_plus_exp(x)
    torch.testing.assert_close(
        actual, torch.tensor(expected, dtype=torch.float64), rtol=1e-15, atol=0
    )

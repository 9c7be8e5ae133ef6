"""Gibbs sampling of Boltzmann machines against the enumerated distribution, annealed or not."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from bilevel.methods.models import GaussianDBM, GaussianRBM
from tests.devices import generator
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
)


def annealed(model: Any, beta: float, base: Tensor | None = None) -> Any:
    """The machine at inverse temperature beta, made by changing its parameters."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.startswith(("weight", "latent_bias")):
                p.mul_(beta)
            elif name == "visible_bias" and model.visible_range is not None:
                p.mul_(beta).add_((1 - beta) * (torch.zeros_like(p) if base is None else base))
    return model


# ---------------------------------------------------------------------- Gibbs sampling


def chi_square(counts: Tensor, log_p: Tensor) -> float:
    """How many standard deviations Pearson's statistic lies above its mean."""
    expected = log_p.softmax(0) * counts.sum()
    statistic = ((counts - expected).square() / expected).sum()
    degrees = len(log_p) - 1
    return float((statistic - degrees) / math.sqrt(2 * degrees))


def count(rows: Tensor) -> Tensor:
    """How often each state occurs, in `cube` order."""
    powers = 2 ** torch.arange(rows.shape[1] - 1, -1, -1, device=rows.device)
    return torch.bincount((rows.long() * powers).sum(1), minlength=2 ** rows.shape[1]).double()


@pytest.mark.parametrize(("beta", "base"), [(1.0, False), (0.6, False), (0.6, True)])
@pytest.mark.parametrize("name", ["RBM", "DBM"])
def test_gibbs_leaves_the_annealed_distribution_invariant(
    name: str, beta: float, base: bool, device: str
):
    """Started at exact draws, one step gives exact draws; another temperature's are told apart."""
    model = machine(name, device)
    rate = normal(model.visible_dim, seed=8, device=device) if base else None
    states = pairs(cube(model.visible_dim, device), cube(sum(model.latent_dims), device))

    def log_p(beta: float) -> Tensor:
        return -by_definition(annealed(model, beta, rate), *states).detach()

    draws = generator(4, device)
    n = 200_000
    start = torch.multinomial(log_p(beta).softmax(0), n, replacement=True, generator=draws)
    h1 = states[1][start, : model.latent_dims[0]]
    counts = count(torch.cat(model.gibbs(h1, draws, 1, beta, rate), dim=1))
    assert abs(chi_square(counts, log_p(beta))) < 5
    assert chi_square(counts, log_p(0.9 * beta)) > 20


@pytest.mark.parametrize("name", ["RBM", "DBM"])
def test_gibbs_converges_from_anywhere(name: str, device: str):
    model = machine(name, device)
    draws = generator(5, device)
    v, h = model.gibbs(torch.zeros_like(model.initial(50_000, draws)), draws, steps=100)
    states = pairs(cube(model.visible_dim, device), cube(sum(model.latent_dims), device))
    assert abs(chi_square(count(torch.cat([v, h], 1)), -by_definition(model, *states).detach())) < 5


@pytest.mark.parametrize("beta", [1.0, 0.6])
@pytest.mark.parametrize("name", GAUSSIAN)
def test_gaussian_gibbs_leaves_the_annealed_distribution_invariant(
    name: str, beta: float, device: str
):
    """Latents by their counts, visibles by their first two moments within each latent state."""
    model = machine(name, device)
    target = annealed(model, beta)
    first, h = cube(model.latent_dims[0], device), cube(sum(model.latent_dims), device)
    draws = generator(6, device)
    n = 200_000
    log_first = target.log_unnormalized_first(first).detach()
    start = torch.multinomial(log_first.softmax(0), n, replacement=True, generator=draws)
    v, states = model.gibbs(first[start], draws, 1, beta)

    mean = target.visible_mean(h).detach()
    # log of the integral of exp(-E) over v, per h: the Gaussian integral at its mode
    log_p = -by_definition(target, mean, h).detach()
    assert abs(chi_square(count(states), log_p)) < 5
    assert chi_square(count(states), 0.9 * log_p) > 20
    z = (v - target.visible_mean(states).detach()) / model.log_scale.exp().detach()
    assert float(z.mean(0).abs().max()) * math.sqrt(n) < 5
    assert float((z.square().mean(0) - 1).abs().max()) * math.sqrt(n / 2) < 5
    assert float((z.mT @ states / n).abs().max()) * math.sqrt(n) < 5  # and independent of h


@pytest.mark.parametrize("name", MACHINES)
def test_gibbs_is_reproducible_and_leaves_no_graph(name: str, device: str):
    model = machine(name, device)
    h1 = model.initial(6, generator(device=device))
    before = h1.clone()
    v, h = model.gibbs(h1, generator(1, device), steps=3)
    again = model.gibbs(h1, generator(1, device), steps=3)
    assert v.equal(again[0])
    assert h.equal(again[1])
    assert v.shape == (6, model.visible_dim)
    assert h.shape == (6, sum(model.latent_dims))
    assert h1.equal(before)
    assert not v.requires_grad
    assert not h.requires_grad


# ---------------------------------------------------------------------- the annealed path


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("base", [False, True])
@pytest.mark.parametrize("name", BINARY)
def test_annealed_first_layer_sums_out_the_rest(name: str, base: bool, beta: float, device: str):
    model = machine(name, device)
    rate = normal(model.visible_dim, seed=8, device=device) if base else None
    h1, rest = cube(model.latent_dims[0], device), cube(sum(model.latent_dims[1:]), device)
    latents = torch.cat(pairs(h1, rest), dim=1)
    v = cube(model.visible_dim, device)
    energies = by_definition(annealed(model, beta, rate), *pairs(v, latents))
    expected = (-energies).view(len(v), len(h1), len(rest)).logsumexp((0, 2))
    actual = model.log_unnormalized_first(h1, beta, rate)
    torch.testing.assert_close(actual, expected, **EXACT)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("make", [lambda: GaussianRBM(1, 3), lambda: GaussianDBM(1, (3, 2))])
def test_annealed_gaussian_first_layer_integrates_out_the_rest(make: Any, beta: float, device: str):
    model = trained(make(), device, size=0.5)
    h1, rest = cube(model.latent_dims[0], device), cube(sum(model.latent_dims[1:]), device)
    latents = torch.cat(pairs(h1, rest), dim=1)
    v, cell = line(1, 1201, 15.0, device)
    energies = by_definition(annealed(model, beta), *pairs(v, latents))
    expected = (-energies).view(len(v), len(h1), len(rest)).logsumexp((0, 2)) + math.log(cell)
    torch.testing.assert_close(model.log_unnormalized_first(h1, beta), expected, **EXACT)


@pytest.mark.parametrize("name", MACHINES)
def test_log_partition_base_is_log_z_without_interactions(name: str, device: str):
    """A10: sum softplus(b0) + n_h log 2 for binary visibles."""
    model = machine(name, device)
    bases = [None]
    if model.visible_range is not None:
        bases.append(normal(model.visible_dim, seed=8, device=device))
    for base in bases:
        at_zero = model.log_partition_base(base)
        torch.testing.assert_close(at_zero, annealed(model, 0.0, base).log_partition(), **EXACT)
    if model.visible_range is not None:
        closed = bases[1].exp().log1p().sum() + sum(model.latent_dims) * math.log(2)
        torch.testing.assert_close(model.log_partition_base(bases[1]), closed, **EXACT)

"""Boltzmann machines against brute force: every sum enumerated or integrated on a grid.

Numbers in brackets are those of the assertions in the papers' fact sheets: A for AdvIL, B for BiSM.
"""

import copy
import itertools
import json
import math
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import grad, gradcheck, gradgradcheck
from torch.distributions import Bernoulli, Categorical, Independent, MixtureSameFamily, Normal
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bilevel.methods.models import (
    DBM,
    MAX_UNITS,
    RBM,
    GaussianDBM,
    GaussianRBM,
    LatentVariableModel,
    enumeration,
    from_recipe,
)
from tests.devices import DEVICES, generator

MACHINES = {
    "RBM": lambda: RBM(5, 3),
    "RBM with few visibles": lambda: RBM(3, 5),
    "DBM": lambda: DBM(4, (3, 2)),
    "DBM with a wide first layer": lambda: DBM(2, (5, 2)),
    "GaussianRBM": lambda: GaussianRBM(2, 4),
    "GaussianDBM": lambda: GaussianDBM(2, (3, 2)),
}
BINARY = [name for name in MACHINES if "Gaussian" not in name]
GAUSSIAN = [name for name in MACHINES if "Gaussian" in name]
EXACT: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12}


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


def normal(*shape: int, seed: int = 0, device: str = "cpu") -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=generator(seed)).to(device)


def trained(model: LatentVariableModel, device: str = "cpu", size: float = 0.8) -> Any:
    """The model in float64, far from its symmetric start."""
    draws = generator(1)
    with torch.no_grad():
        for p in model.double().parameters():
            p.copy_(size * torch.randn(p.shape, dtype=p.dtype, generator=draws))
    return model.to(device)


def machine(name: str, device: str = "cpu") -> Any:
    return trained(MACHINES[name](), device)


def cube(units: int, device: str = "cpu") -> Tensor:
    """All of {0, 1}^units."""
    rows = list(itertools.product([0.0, 1.0], repeat=units))
    return torch.tensor(rows, dtype=torch.float64, device=device)


def pairs(v: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """Every v with every h, v slowest."""
    return v.repeat_interleave(len(h), 0), h.repeat(len(v), 1)


def by_definition(model: Any, v: Tensor, h: Tensor) -> Tensor:
    """E(v, h), term by term as the papers write it."""
    if model.visible_range is None:
        energy = (((v - model.visible_bias) / model.log_scale.exp()) ** 2).sum(1) / 2
    else:
        energy = -torch.einsum("ni,i->n", v, model.visible_bias)
    if len(model.latent_dims) == 1:
        energy = energy - torch.einsum("nj,j->n", h, model.latent_bias)
        return energy - torch.einsum("ni,ij,nj->n", v, model.weight, h)
    h1, h2 = h[:, : model.latent_dims[0]], h[:, model.latent_dims[0] :]
    energy = energy - torch.einsum("nj,j->n", h1, model.latent_bias1)
    energy = energy - torch.einsum("nk,k->n", h2, model.latent_bias2)
    energy = energy - torch.einsum("ni,ij,nj->n", v, model.weight1, h1)
    return energy - torch.einsum("nj,jk,nk->n", h1, model.weight2, h2)


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


def visibles(model: Any, n: int = 7, seed: int = 3) -> Tensor:
    v = normal(n, model.visible_dim, seed=seed, device=model.visible_bias.device.type)
    return v if model.visible_range is None else (v > 0).double()


def line(dim: int, points: int, half_width: float, device: str = "cpu") -> tuple[Tensor, float]:
    """A grid on [-half_width, half_width]^dim and the volume of a cell."""
    axis = torch.linspace(-half_width, half_width, points, dtype=torch.float64, device=device)
    return torch.cartesian_prod(*[axis] * dim).view(-1, dim), float(axis[1] - axis[0]) ** dim


# ------------------------------------------------------------------ energies and exact sums


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


# ------------------------------------------------------------------ conditionals


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


# ------------------------------------------------------------------ Gibbs sampling


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


# ------------------------------------------------------------------ the annealed path


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


# ------------------------------------------------------------------ derivatives


def binary_moments(model: Any) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor]:
    v, h = pairs(cube(model.visible_dim), cube(sum(model.latent_dims)))
    p = (-by_definition(model, v, h)).softmax(0).detach()
    return {"visible_bias": p @ v}, p, v, h


@pytest.mark.parametrize("name", BINARY)
def test_gradient_of_log_partition_is_the_models_moments(name: str):
    """A6, the negative phase."""
    model = machine(name)
    moments, p, v, h = binary_moments(model)
    h1, h2 = h[:, : model.latent_dims[0]], h[:, model.latent_dims[0] :]
    if len(model.latent_dims) == 1:
        moments |= {"latent_bias": p @ h, "weight": torch.einsum("n,ni,nj->ij", p, v, h)}
    else:
        moments |= {"latent_bias1": p @ h1, "latent_bias2": p @ h2}
        moments |= {"weight1": torch.einsum("n,ni,nj->ij", p, v, h1)}
        moments |= {"weight2": torch.einsum("n,nj,nk->jk", p, h1, h2)}
    parameters = dict(model.named_parameters())
    grads = grad(model.log_partition(), list(parameters.values()))
    assert parameters.keys() == moments.keys()
    for key, actual in zip(parameters, grads, strict=True):
        torch.testing.assert_close(actual, moments[key], **EXACT)


def test_gradient_of_the_gaussian_log_partition_is_the_models_moments():
    model = machine("GaussianRBM")
    h = cube(4)
    p = model.log_unnormalized_first(h).softmax(0).detach()
    b, scale = model.visible_bias.detach(), model.log_scale.exp().detach()
    mean = model.visible_mean(h).detach()
    expected = {
        "weight": torch.einsum("n,ni,nj->ij", p, mean, h),
        "visible_bias": (p @ mean - b) / scale**2,
        "latent_bias": p @ h,
        "log_scale": 1 + p @ ((mean - b) / scale).square(),  # E[(v - b)^2 / s^2]
    }
    parameters = dict(model.named_parameters())
    grads = grad(model.log_partition(), list(parameters.values()))
    assert parameters.keys() == expected.keys()
    for key, actual in zip(parameters, grads, strict=True):
        torch.testing.assert_close(actual, expected[key], **EXACT)


def test_gradient_of_the_likelihood_is_positive_minus_negative_phase():
    """A6: d NLL / dW = E_model[v h^T] - E_data,posterior[v h^T]."""
    model, data = machine("RBM"), visibles(machine("RBM"), 11)
    _, p, v, h = binary_moments(model)
    negative = torch.einsum("n,ni,nj->ij", p, v, h)
    positive = data.mT @ model.posterior_logits(data).sigmoid() / len(data)
    (actual,) = grad(-model.log_likelihood(data).mean(), model.weight)
    torch.testing.assert_close(actual, (negative - positive).detach(), **EXACT)


@pytest.mark.parametrize("chunk", [enumeration.CHUNK, 16])
@pytest.mark.parametrize("name", MACHINES)
def test_derivatives_agree_with_finite_differences(
    name: str, chunk: int, monkeypatch: pytest.MonkeyPatch
):
    """Step 1e-5: truncation and rounding are both near 1e-10."""
    monkeypatch.setattr(enumeration, "CHUNK", chunk)
    model = trained(MACHINES[name](), size=0.3)
    names, values = zip(*model.named_parameters(), strict=True)
    v = visibles(model, 3)

    def log_likelihood(*values: Tensor) -> Tensor:
        module = _Call(model, "log_likelihood")
        named = {f"model.{name}": value for name, value in zip(names, values, strict=True)}
        return torch.func.functional_call(module, named, (v,)).sum()

    inputs = tuple(p.detach().requires_grad_() for p in values)
    tolerances = {"eps": 1e-5, "atol": 1e-9, "rtol": 1e-9}
    assert gradcheck(log_likelihood, inputs, **tolerances)
    assert gradgradcheck(log_likelihood, inputs, **tolerances)


class _Call(nn.Module):
    """A method of a model as `forward`, for `functional_call`."""

    def __init__(self, model: nn.Module, method: str) -> None:
        super().__init__()
        self.model, self.method = model, method

    def forward(self, *args: Any) -> Any:
        return getattr(self.model, self.method)(*args)


def test_score_matching_differentiates_the_free_energy_three_times(device: str):
    """Score and Laplacian of log p(v) in closed form, and the gradient of their loss."""
    model = machine("GaussianRBM", device)
    v = visibles(model).requires_grad_()
    (score,) = grad(-model.free_energy(v).sum(), v, create_graph=True)
    laplacian = sum(
        grad(score[:, i].sum(), v, create_graph=True)[0][:, i] for i in range(model.visible_dim)
    )
    on = (model.latent_bias + v @ model.weight).sigmoid()
    precision = (-2 * model.log_scale).exp()
    closed_score = -(v - model.visible_bias) * precision + on @ model.weight.mT
    spread = (on * (1 - on)) @ model.weight.square().sum(0)
    closed_laplacian = spread - precision.sum()
    torch.testing.assert_close(score, closed_score, **EXACT)
    torch.testing.assert_close(laplacian, closed_laplacian, **EXACT)
    parameters = list(model.parameters())
    actual = grad((score.square().sum(1) / 2 + laplacian).mean(), parameters)
    closed = grad((closed_score.square().sum(1) / 2 + closed_laplacian).mean(), parameters)
    for a, c in zip(actual, closed, strict=True):
        torch.testing.assert_close(a, c, **EXACT)


@pytest.mark.parametrize("name", GAUSSIAN)
def test_energy_can_be_differentiated_in_the_visible_and_then_in_the_parameters(name: str):
    """The gradient in v and its product with itself, as BiSM's upper loss has them."""
    model = machine(name)
    v, h = visibles(model).requires_grad_(), normal(7, sum(model.latent_dims)).sigmoid()

    def loss(energy: Tensor) -> Tensor:
        (slope,) = grad(energy.sum(), v, create_graph=True)
        (curved,) = grad((slope * slope.detach().sign()).sum(), v, create_graph=True)
        return slope.square().sum() + curved.square().sum()

    parameters = list(model.parameters())
    actual = grad(loss(model(v, h)), parameters, allow_unused=True, materialize_grads=True)
    expected = grad(
        loss(by_definition(model, v, h)), parameters, allow_unused=True, materialize_grads=True
    )
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, **EXACT)


@pytest.mark.parametrize("name", MACHINES)
def test_losses_can_be_traced(name: str):
    model = machine(name)
    v, h = visibles(model), normal(7, sum(model.latent_dims)).sigmoid()

    def loss(parameters: dict[str, Tensor], v: Tensor, h: Tensor) -> Tensor:
        energy = torch.func.functional_call(model, parameters, (v, h))
        named = {f"model.{name}": value for name, value in parameters.items()}
        log_p = torch.func.functional_call(_Call(model, "log_likelihood"), named, (v,))
        return energy.sum() + log_p.sum()

    parameters = dict(model.named_parameters())
    traced = make_fx(torch.func.grad(loss))(parameters, v, h)(parameters, v, h)
    energy = model(v, h).sum() + model.log_likelihood(v).sum()
    for key, expected in zip(parameters, grad(energy, list(parameters.values())), strict=True):
        torch.testing.assert_close(traced[key], expected, **EXACT)


# ------------------------------------------------------------------ chunks


@pytest.mark.parametrize(
    "make", [lambda: RBM(9, 6), lambda: DBM(5, (6, 3)), lambda: GaussianDBM(2, (6, 3))]
)
def test_chunks_change_neither_values_nor_gradients(
    make: Any, device: str, monkeypatch: pytest.MonkeyPatch
):
    model = trained(make(), device)
    v = visibles(model)
    parameters = list(model.parameters())

    def derivatives() -> list[Tensor]:
        value = model.log_likelihood(v).sum()
        first = grad(value, parameters, create_graph=True)
        second = grad(sum(g.sin().sum() for g in first), parameters)
        with torch.no_grad():
            return [value, model.log_likelihood(v), *first, *second]

    whole = derivatives()
    # sums over the states in another order; a GPU's own order costs some bits of second derivatives
    bound = EXACT if device == "cpu" else {"rtol": 1e-11, "atol": 1e-11}
    for chunk in (1, 40, 300):  # one state at a time, and several
        monkeypatch.setattr(enumeration, "CHUNK", chunk)
        for a, b in zip(derivatives(), whole, strict=True):
            torch.testing.assert_close(a, b, **bound)


class _Peak(TorchDispatchMode):
    """The most bytes alive at once among tensors that operations returned."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and not tensor._is_view():
                size = tensor.numel() * tensor.element_size()
                self.alive += size
                self.most = max(self.most, self.alive)
                weakref.finalize(tensor, self.free, size)
        return result

    def free(self, size: int) -> None:
        self.alive -= size


@pytest.mark.parametrize("quantity", ["log_partition", "free_energy"])
@pytest.mark.parametrize("differentiate", [False, True])
def test_chunks_bound_the_memory(
    quantity: str, differentiate: bool, monkeypatch: pytest.MonkeyPatch
):
    model = trained(DBM(32, (13, 12)))
    args = (visibles(model, 32),) if quantity == "free_energy" else ()

    def peak(chunk: int) -> int:
        monkeypatch.setattr(enumeration, "CHUNK", chunk)
        with torch.set_grad_enabled(differentiate), _Peak() as memory:
            value = getattr(model, quantity)(*args).sum()
            if differentiate:
                grad(value, list(model.parameters()), allow_unused=True)
        return memory.most

    whole, chunked = peak(2**20), peak(2**13)
    assert whole > 2**13 * 32 * 8  # all states at once, 32 wide
    assert chunked < 8 * 2**13 * 8 + 100_000  # a few tensors of a chunk, and the parameters'
    assert chunked < whole / 8


# ------------------------------------------------------------------ construction


@pytest.mark.parametrize("name", MACHINES)
def test_a_recipe_survives_json_and_builds_the_model_again(name: str):
    model = MACHINES[name]()
    again = from_recipe(json.loads(json.dumps(model.recipe)))
    assert type(again) is type(model)
    assert again.recipe == model.recipe
    assert (again.visible_dim, again.latent_dims) == (model.visible_dim, model.latent_dims)
    for key, value in again.state_dict().items():
        assert value.equal(model.state_dict()[key])


def test_a_recipe_keeps_the_options():
    assert RBM(3, 2).binary
    assert not from_recipe(RBM(3, 2, grey=True).recipe).binary
    assert not from_recipe(DBM(3, (2, 2), grey=True).recipe).binary
    for model in (GaussianRBM(3, 2, learn_scale=False), GaussianDBM(3, (2, 2), learn_scale=False)):
        again: Any = from_recipe(model.recipe)
        assert not again.log_scale.requires_grad
        assert "log_scale" in again.state_dict()
        assert not again.binary


@pytest.mark.parametrize("name", MACHINES)
def test_a_model_starts_the_same_every_time_or_as_its_generator_says(name: str):
    kind, recipe = type(MACHINES[name]()), dict(MACHINES[name]().recipe)
    recipe.pop("kind")
    torch.manual_seed(int(torch.randint(1000, ())))
    first, second, other, same = (
        kind(**recipe, generator=g) for g in (None, None, generator(1), generator(1))
    )
    for key, value in first.state_dict().items():
        assert value.equal(second.state_dict()[key])
        assert other.state_dict()[key].equal(same.state_dict()[key])
        if "weight" in key:
            assert not value.equal(other.state_dict()[key])


def test_models_start_as_the_papers_do():
    model: Any = RBM(64, 50)
    bound = 4 * math.sqrt(6 / (64 + 50))
    assert 0.99 * bound < float(model.weight.abs().max().detach()) <= bound
    assert not model.visible_bias.any()
    assert not model.latent_bias.any()
    model = GaussianRBM(20, 100)
    for p in (model.weight, model.visible_bias, model.latent_bias):
        assert 0.08 < float(p.abs().max().detach()) <= 0.1
    assert not model.log_scale.any()
    model = DBM(64, (50, 30))
    bound = 4 * math.sqrt(6 / (50 + 30))
    assert 0.99 * bound < float(model.weight2.abs().max().detach()) <= bound


def test_visibles_say_what_they_are():
    assert RBM(3, 2).visible_range == DBM(3, (2, 2)).visible_range == (0.0, 1.0)
    assert GaussianRBM(3, 2).visible_range is GaussianDBM(3, (2, 2)).visible_range is None


# ------------------------------------------------------------------ refusals


def test_enumerable_is_whether_the_cheaper_side_is_small():
    over = MAX_UNITS + 1
    assert RBM(784, MAX_UNITS).enumerable
    assert RBM(MAX_UNITS, 784).enumerable
    assert DBM(10, (500, MAX_UNITS - 10)).enumerable
    assert DBM(500, (MAX_UNITS, 500)).enumerable
    assert not RBM(over, over).enumerable
    assert not DBM(10, (500, MAX_UNITS - 9)).enumerable
    assert not GaussianRBM(2, over).enumerable
    assert not GaussianDBM(2, (over, 2)).enumerable


@pytest.mark.parametrize("make", [lambda: RBM(30, 26), lambda: GaussianRBM(2, 26)])
def test_a_partition_function_too_large_to_enumerate_names_the_alternative(make: Any):
    with pytest.raises(ValueError, match=r"26 binary units.*annealed_importance_sampling"):
        make().log_partition()


def test_a_free_energy_too_large_to_enumerate_names_the_alternative():
    with pytest.raises(ValueError, match=r"26 units.*variational posterior"):
        DBM(4, (26, 2)).free_energy(torch.zeros(1, 4))


@pytest.mark.parametrize("name", ["DBM", "GaussianDBM"])
def test_two_layers_have_no_posterior_logits(name: str):
    model = MACHINES[name]()
    with pytest.raises(NotImplementedError, match=rf"`{name}`.*variational posterior"):
        model.posterior_logits(visibles(model).float())


@pytest.mark.parametrize("name", MACHINES)
def test_wrong_widths_name_both(name: str):
    model = MACHINES[name]()
    d, first, whole = model.visible_dim, model.latent_dims[0], sum(model.latent_dims)
    v, wide_v = torch.zeros(3, d), torch.zeros(3, d + 1)
    wide_h1, draws = torch.zeros(3, first + 1), generator()
    for call in (model.free_energy, model.log_likelihood, lambda v: model.first_layer(v, draws)):
        for wrong in (wide_v, torch.zeros(d)):
            with pytest.raises(ValueError, match=rf"shape \(n, {d}\), got .*{wrong.shape[-1]}"):
                call(wrong)
    for call in (model.log_unnormalized_first, lambda h: model.gibbs(h, draws)):
        with pytest.raises(ValueError, match=rf"shape \(n, {first}\), got \(3, {first + 1}\)"):
            call(wide_h1)
    with pytest.raises(ValueError, match=rf"latents of shape .*got \(3, {whole + 1}\)"):
        model(v, torch.zeros(3, whole + 1))


@pytest.mark.parametrize("name", ["RBM", "GaussianDBM"])
def test_a_chain_has_at_least_one_step(name: str):
    model = MACHINES[name]()
    with pytest.raises(ValueError, match=r"`steps` must be at least 1, got 0"):
        model.gibbs(model.initial(2, generator()), generator(), steps=0)


@pytest.mark.parametrize("name", GAUSSIAN)
def test_gaussian_visibles_take_no_base_rate(name: str):
    model = MACHINES[name]()
    h1, base = model.initial(2, generator()), torch.zeros(2)
    for call in (
        lambda: model.log_partition_base(base),
        lambda: model.log_unnormalized_first(h1, 0.5, base),
        lambda: model.gibbs(h1, generator(), base=base),
    ):
        with pytest.raises(ValueError, match="leave `base` out"):
            call()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: RBM(0, 3), ValueError, "`visible_dim` must be positive, got 0"),
        (lambda: RBM(3, -1), ValueError, "`latent_dim` must be positive, got -1"),
        (lambda: GaussianRBM(2.0, 3), TypeError, "`visible_dim` must be an integer, got 2.0"),
        (lambda: RBM(3, True), TypeError, "`latent_dim` must be an integer, got True"),
        (lambda: DBM(3, 4), ValueError, r"two hidden layers, \(n1, n2\), got 4"),
        (lambda: DBM(3, (4, 4, 4)), ValueError, "two hidden layers"),
        (lambda: GaussianDBM(3, (4, 0)), ValueError, r"`latent_dims\[1\]` must be positive"),
        (lambda: from_recipe({"kind": "SBM"}), ValueError, "kind 'SBM'; choose one of RBM"),
        (lambda: from_recipe({}), ValueError, "kind None"),
    ],
)
def test_bad_arguments_are_refused_at_construction(make: Any, error: Any, message: str):
    with pytest.raises(error, match=message):
        make()

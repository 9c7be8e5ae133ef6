"""Variational families of binary latents against enumeration; numbers are AdvIL's assertions."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Independent, Normal
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

from bilevel.methods.machines.enumeration import states
from bilevel.methods.models import DBM, RBM, GaussianDBM, GaussianRBM, LatentVariableModel
from bilevel.methods.variational import (
    BernoulliPosterior,
    HierarchicalJoint,
    TabularEnergy,
    TabularJoint,
    TabularPosterior,
)
from tests.devices import DEVICES
from tests.machines import rng

NV = 3
TIGHT = {"atol": 1e-8, "rtol": 1e-7}  # what central differences with steps of 1e-6 resolve


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


# ---------------------------------------------------------------------- AdvIL's assertions


def tabular(model: LatentVariableModel) -> TabularEnergy:
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


def sampler_bound(model: LatentVariableModel, q: HierarchicalJoint) -> Tensor:
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


# ---------------------------------------------------------------------- probabilities


@pytest.mark.parametrize("dims", [(3,), (3, 2), (2, 1, 2)])
def test_posterior_is_normalised_over_all_latents(dims) -> None:
    q = posterior(dims)
    v, h = product(every(NV), every(sum(dims)))
    close(q.log_prob(v, h).view(2**NV, -1).logsumexp(1), torch.zeros(2**NV))


@pytest.mark.parametrize("dims", [(2,), (2, 3), (2, 1, 2)])
def test_joint_by_enumeration_is_brute_force_and_normalised(dims) -> None:
    q = joint(dims, bits=3)
    v, h, z, log_q = triples(q)
    brute = log_q.view(-1, 8).logsumexp(1)
    close(q.log_prob(v[::8], h[::8]), brute)
    close(brute.logsumexp(0), 0.0)
    ratio = log_q - Independent(Bernoulli(logits=q.auxiliary(h[:, -dims[-1] :])), 1).log_prob(z)
    close(q.log_weight(v, h, z), ratio)


@pytest.mark.parametrize("dims", [(2,), (2, 2)])
def test_gaussian_visibles_and_gaussian_z_have_the_densities_of_torch(dims) -> None:
    q = joint(dims, prior="gaussian", visible="gaussian")
    v, h, z = randn(5, NV, seed=1), every(sum(dims))[:4].repeat(2, 1)[:5], randn(5, 2, seed=2)
    layers = [z, *reversed(h.split(dims, dim=1))]
    expected = Normal(0.0, 1.0).log_prob(z).sum(1)
    for network, above, below in zip(q.networks, layers, layers[1:], strict=False):
        expected = expected + Bernoulli(logits=network(above)).log_prob(below).sum(1)
    for output, x, sign in ((q.networks[-1](layers[-1]), v, 1), (q.auxiliary(layers[1]), z, -1)):
        mean, log_variance = output.chunk(2, dim=1)
        density = Normal(mean, (log_variance / 2).exp()).log_prob(x).sum(1)
        expected = expected + sign * density
    close(q.log_weight(v, h, z), expected)


def test_draws_carry_the_log_probability_of_their_values() -> None:
    v = every(NV)
    for dims in ((2,), (2, 3)):
        q = posterior(dims)
        draws = q.draws(v, q.noise(len(v), rng(), v))
        close(draws.log_prob, q.log_prob(v, draws.latent))
        for prior in ("gaussian", "bernoulli"):
            for visible in ("gaussian", "bernoulli"):
                p = joint(dims, prior=prior, visible=visible)
                noise = p.noise(100, rng(), v)
                z = noise[:, -2:] if prior == "gaussian" else (noise[:, -2:] > 0).double()
                draws = p.draws(noise)
                close(draws.log_prob, p.log_weight(draws.visible, draws.latent, z))
                close(draws.weight.sum(), 1.0)


@pytest.mark.parametrize("dims", [(2,), (2, 3)])
def test_bound_is_below_log_prob_and_equal_for_the_exact_r(dims) -> None:
    exact = exact_joint(dims)
    v, h = product(every(NV), every(sum(dims)))
    noise = exact.code_noise(len(v), rng(), v)
    close(exact.bound(v, h, noise), exact.log_prob(v, h))  # at every z, not on average only
    loose = joint(dims, bits=2)
    v, h, z, log_q = triples(loose)
    log_r = log_q - loose.log_weight(v, h, z)
    mean = (log_r.exp() * loose.log_weight(v, h, z)).view(-1, 4).sum(1)
    log_prob = loose.log_prob(v[::4], h[::4])
    assert (mean < log_prob).all()
    assert (mean < log_prob - 1e-3).any()
    estimate = (log_r + loose.log_weight(v, h, z)).view(-1, 4).logsumexp(1)
    close(estimate, log_prob)  # E_r[exp(log_weight)] = q(v, h)


def test_bound_with_a_gaussian_z_by_quadrature() -> None:
    q = joint((2,), bits=1, prior="gaussian")
    v, h = product(every(NV), every(2))
    noise = torch.linspace(-12, 12, 4001, dtype=torch.float64)
    step = noise[1] - noise[0]
    density = Normal(0.0, 1.0).log_prob(noise).exp() * step
    columns = torch.stack([q.bound(v, h, x.expand(len(v), 1)) for x in noise[::20]], dim=1)
    mean = (columns * density[::20] * 20).sum(1)
    z = noise[:, None]
    table = q.networks[0](z)
    log_h = Independent(Bernoulli(logits=table), 1)
    log_q = torch.stack([(log_h.log_prob(x).exp() * density).sum().log() for x in h])
    log_q = log_q + Bernoulli(logits=q.networks[1](h)).log_prob(v).sum(1)
    close(log_q.logsumexp(0), 0.0, tol=1e-9)
    assert (mean < log_q).all()


def test_a_gaussian_z_that_nothing_depends_on_makes_the_bound_exact() -> None:
    q = HierarchicalJoint.for_model(RBM(NV, 2).double(), hidden=0)
    with torch.no_grad():
        q.networks[0].weight.zero_()
        for p in q.auxiliary.parameters():
            p.zero_()
    v, h = product(every(NV), every(2))
    bound = q.bound(v, h, q.code_noise(len(v), rng(), v))
    close(bound.logsumexp(0), 0.0)


# ---------------------------------------------------------------------- draws


def test_cold_relaxed_draws_have_the_probabilities_of_the_logits() -> None:
    n = 10_000
    uniform = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    q = posterior((3,), temperature=1e-9)
    v = every(NV)[5].expand(n, -1)
    h = q.draws(v, uniform.logit()[:, None].expand(-1, 3)).latent
    assert ((h < 1e-6) | (h > 1 - 1e-6)).double().mean() > 0.999
    close(h.mean(0), q.logits(v[0]).sigmoid(), tol=1.01 / n)
    p = joint((2,), temperature=1e-9)
    noise = torch.zeros(n, NV + 2 + 2, dtype=torch.float64)
    noise[:, :-2] = uniform.logit()[:, None]
    noise[:, -2:] = 1.0  # z = (1, 1)
    logits = p.networks[0](torch.ones(1, 2, dtype=torch.float64))[0]
    close(p.draws(noise).latent.mean(0), logits.sigmoid(), tol=1.01 / n)


def test_warm_draws_are_the_sigmoid_of_logits_plus_noise() -> None:
    q, v = posterior((3,), temperature=0.7), every(NV)
    noise = q.noise(len(v), rng(), v)
    close(q.draws(v, noise).latent.logit() * 0.7, q.logits(v) + noise, tol=1e-10)
    p = joint((2,), temperature=0.7)
    noise = p.noise(9, rng(), v)
    draws = p.draws(noise)
    logits = torch.cat(
        (p.networks[1](draws.latent), p.networks[0]((noise[:, -2:] > 0).double())), 1
    )
    close(torch.cat(draws[:2], 1).logit() * 0.7, logits + noise[:, :-2], tol=1e-10)


def test_noise_is_finite_logistic_and_of_the_generator() -> None:
    q, like = posterior((3,)), torch.zeros(1, dtype=torch.float32)
    noise = q.noise(200_000, rng(), like)
    assert noise.dtype == torch.float32
    assert noise.isfinite().all()
    assert abs(noise.var() / (math.pi**2 / 3) - 1) < 0.02
    assert torch.equal(noise, q.noise(200_000, rng(), like))
    code = joint().code_noise(100_000, rng(), like)
    assert abs((code > 0).double().mean() - 0.5) < 0.01
    assert joint().noise(4, rng(), torch.zeros(1).long()).dtype == torch.get_default_dtype()


def counts(*columns: Tensor) -> Tensor:
    """Relative frequencies of binary rows, numbered as `every` numbers them (first column slowest)."""
    number = torch.zeros(len(columns[0]), dtype=torch.long)
    for x in columns:
        bits = (x.long() * 2 ** torch.arange(x.shape[1])).sum(1)
        number = number * 2 ** x.shape[1] + bits
    size = 2 ** sum(x.shape[1] for x in columns)
    return torch.bincount(number, minlength=size) / len(number)


@pytest.mark.parametrize("dims", [(2,), (2, 1)])
def test_hard_draws_have_the_right_frequencies(dims) -> None:
    n = 40_000
    q, p = posterior(dims), joint(dims)
    v = every(NV)[5].expand(n, -1)
    h = q.hard(v, rng())
    expected = q.log_prob(v[: 2 ** sum(dims)], every(sum(dims))).exp()
    assert ((counts(h) - expected).abs() < 5 * (expected / n).sqrt() + 1e-9).all()
    ancestral = p.hard(n, rng())
    expected = triples(p)[3].exp()
    frequencies = counts(ancestral.visible, ancestral.latent, ancestral.code)
    assert ((frequencies - expected).abs() < 5 * (expected / n).sqrt() + 1 / n).all()
    assert torch.equal(p.sample(9, rng(7)), p.hard(9, rng(7)).visible)
    assert not any(x.requires_grad for x in (h, *ancestral))


def test_hard_gaussian_visibles_have_the_right_moments() -> None:
    p = joint((1,), visible="gaussian", prior="gaussian")
    draws = p.hard(50_000, rng())
    assert abs(draws.code.std() - 1) < 0.02
    for h in (0.0, 1.0):
        v = draws.visible[draws.latent[:, 0] == h]
        mean, log_variance = p.networks[-1](torch.full((1, 1), h, dtype=torch.float64)).chunk(2, 1)
        deviation = (log_variance / 2).exp()[0]
        assert ((v.mean(0) - mean[0]).abs() < 5 * deviation / len(v) ** 0.5).all()
        close(v.std(0) / deviation, torch.ones(NV), tol=0.05)
        close(p.visible_mean(torch.full((1, 1), h, dtype=torch.float64)), mean)


def test_distribution_of_one_layer_is_torchs_and_of_two_is_refused() -> None:
    q = posterior((3,))
    v, h = product(every(NV), every(3))
    close(q.distribution(v).log_prob(h), q.log_prob(v, h))
    with pytest.raises(NotImplementedError, match=r"2 layers.*`hard\(v, generator\)`"):
        posterior((3, 2)).distribution(v)


# ---------------------------------------------------------------------- derivatives


def of_parameters(module: nn.Module, function):
    """`function` of the module's parameters and what else it takes."""
    names = [name for name, _ in module.named_parameters()]

    class Call(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self, *args):
            return function(module, *args)

    call = Call()

    def pure(*args):
        values, rest = args[: len(names)], args[len(names) :]
        named = {f"module.{name}": value for name, value in zip(names, values, strict=True)}
        return functional_call(call, named, rest)

    return pure, [p.detach().clone().requires_grad_() for p in module.parameters()]


@pytest.mark.parametrize("dims", [(2,), (2, 2)])
def test_log_prob_of_the_posterior_is_differentiable_to_third_order(dims) -> None:
    widths = (NV, *dims)
    networks = [linear(a, b, seed=i) for i, (a, b) in enumerate(zip(widths, dims, strict=False))]
    q = BernoulliPosterior(networks, dims)
    function, parameters = of_parameters(q, lambda q, v, h: q.log_prob(v, h))
    v, h = randn(2, NV).requires_grad_(), torch.rand(2, sum(dims), generator=rng()).double()
    inputs = (*parameters, v, h.requires_grad_())
    assert torch.autograd.gradcheck(function, inputs, **TIGHT)

    def gradient(*inputs):
        total = function(*inputs).sum()
        return torch.autograd.grad(total, inputs, create_graph=True)

    assert torch.autograd.gradcheck(gradient, inputs, **TIGHT)
    assert torch.autograd.gradgradcheck(gradient, inputs, **TIGHT)


@pytest.mark.parametrize("visible", ["bernoulli", "gaussian"])
@pytest.mark.parametrize("prior", ["bernoulli", "gaussian"])
def test_draws_and_bound_agree_with_finite_differences(prior, visible) -> None:
    """Entries of both losses, with smooth networks and at a temperature finite differences can see."""
    p = joint((2, 2), prior=prior, visible=visible, temperature=0.7)
    function, parameters = of_parameters(p, lambda p, noise: p.draws(noise)[:3])
    noise = p.noise(2, rng(3), parameters[0])
    assert torch.autograd.gradcheck(lambda *w: function(*w, noise), parameters, **TIGHT)
    v, h = randn(2, NV), every(4)[[3, 6]]
    if visible == "bernoulli":
        v = (v > 0).double()
    code = p.code_noise(2, rng(), v)
    function, parameters = of_parameters(p, lambda p, v, h: p.bound(v, h, code))
    assert torch.autograd.gradcheck(lambda *w: function(*w, v, h), parameters, **TIGHT)


def test_log_prob_by_enumeration_agrees_with_finite_differences() -> None:
    p = joint((2, 1))
    names = [name for name, _ in p.named_parameters()]
    function, parameters = of_parameters(p, lambda p, v, h: p.log_prob(v, h))
    v, h = product(every(NV)[:2], every(3)[:3])
    for name, value in zip(names, parameters, strict=True):
        value.requires_grad_(not name.startswith("auxiliary"))
    assert torch.autograd.gradcheck(lambda *w: function(*w, v, h), parameters, **TIGHT)


@pytest.mark.parametrize("prior", ["bernoulli", "gaussian"])
@pytest.mark.parametrize("model", [DBM(4, (3, 2)), GaussianRBM(4, 3)], ids=["DBM", "GaussianRBM"])
def test_losses_can_be_traced(model, prior) -> None:
    """AdvIL's sampler and encoder losses with their gradients, traced once and run on other noise."""
    model = model.double()
    p, q = HierarchicalJoint.for_model(model, prior=prior), BernoulliPosterior.for_model(model)
    variables = [*p.parameters(), *q.parameters()]
    v = (randn(5, 4) > 0).double()

    def gradients(p_noise: Tensor, q_noise: Tensor, code: Tensor) -> list[Tensor]:
        down, up = p.draws(p_noise), q.draws(v, q_noise)
        loss = down.mean(model(down.visible, down.latent) + down.log_prob)
        loss = loss + up.mean(model(v, up.latent) + up.log_prob)
        loss = loss - p.bound(v, up.latent.round(), code).mean()
        return [loss, *torch.autograd.grad(loss, variables)]

    def noise(seed: int) -> tuple[Tensor, ...]:
        generator = rng(seed)
        makers = (p.noise, q.noise, p.code_noise)
        return tuple(make(5, generator, v) for make in makers)

    traced = make_fx(gradients)(*noise(0))
    for got, expected in zip(traced(*noise(1)), gradients(*noise(1)), strict=True):
        close(got, expected)
        assert got.isfinite().all()


# ---------------------------------------------------------------------- for a model


@pytest.mark.parametrize(
    ("model", "prior", "latent_dim", "hidden", "activation"),
    [
        (RBM(64, 50), "gaussian", 15, 25, nn.ReLU),
        (RBM(500, 200), "gaussian", 50, 100, nn.ReLU),
        (RBM(300, 100), "gaussian", 25, 50, nn.ReLU),
        (RBM(64, 15), "bernoulli", 10, 15, nn.ReLU),
        (DBM(64, (50, 50)), "gaussian", 15, 25, nn.Sigmoid),
    ],
)
def test_published_architectures(model, prior, latent_dim, hidden, activation) -> None:
    p = HierarchicalJoint.for_model(model, prior=prior)
    first, middle, last = p.networks[0]
    assert (first.in_features, first.out_features) == (latent_dim, hidden)
    assert isinstance(middle, activation)
    assert last.out_features == model.latent_dims[-1]
    assert p.networks[-1].out_features == model.visible_dim
    shapes = [layer.weight.shape for layer in p.auxiliary if isinstance(layer, nn.Linear)]
    heads = 2 if prior == "gaussian" else 1
    assert shapes == [(hidden, model.latent_dims[-1]), (heads * latent_dim, hidden)]
    assert isinstance(p.auxiliary[1], nn.Sigmoid)
    largest = 4 * math.sqrt(6 / (hidden + model.latent_dims[-1]))
    assert 0.9 * largest < p.auxiliary[0].weight.abs().max() <= largest
    assert all(not bias.any() for name, bias in p.named_parameters() if name.endswith("bias"))


def test_frey_faces_have_a_linear_sampler() -> None:
    p = HierarchicalJoint.for_model(GaussianRBM(560, 200))
    assert [layer.weight.shape for layer in p.networks] == [(200, 50), (2 * 560, 200)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "model",
    [RBM(6, 3), DBM(6, (4, 3)), GaussianRBM(6, 4), GaussianDBM(6, (4, 3))],
    ids=["RBM", "DBM", "GaussianRBM", "GaussianDBM"],
)
def test_families_follow_their_model(model, dtype, device) -> None:
    model = model.to(device, dtype)
    before = torch.get_rng_state()
    q = BernoulliPosterior.for_model(model)
    generator = torch.Generator(device).manual_seed(0)
    for prior in ("gaussian", "bernoulli"):
        p = HierarchicalJoint.for_model(model, prior=prior)
        hard = p.hard(5, generator)
        draws = p.draws(p.noise(5, generator, hard.visible))
        up = q.draws(hard.visible, q.noise(5, generator, hard.visible))
        bound = p.bound(hard.visible, hard.latent, p.code_noise(5, generator, hard.visible))
        results = [*hard, *draws, *up, bound, q.hard(hard.visible, generator)]
        assert model(draws.visible, up.latent).shape == (5,)
        for result in results:
            assert result.dtype == dtype
            assert result.device.type == device
            assert result.isfinite().all()
    assert torch.equal(before, torch.get_rng_state())
    again = HierarchicalJoint.for_model(model)
    first, second = (HierarchicalJoint.for_model(model).state_dict(), again.state_dict())
    assert all(torch.equal(first[name], second[name]) for name in first)


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_temperature_must_be_positive(temperature) -> None:
    for make in (posterior, joint):
        with pytest.raises(ValueError, match="`temperature` must be positive"):
            make(temperature=temperature)


def test_log_prob_that_cannot_be_enumerated_says_what_to_use() -> None:
    for q in (joint(prior="gaussian"), joint(bits=16)):
        with pytest.raises(NotImplementedError, match=r"use `bound\(v, h, noise\)`"):
            q.log_prob(every(NV)[:1], every(2)[:1])


def test_networks_and_widths_must_match() -> None:
    with pytest.raises(ValueError, match="one width per network, got 1 networks"):
        BernoulliPosterior([net(NV, 2, 0)], (2, 2))
    with pytest.raises(ValueError, match="one module per hidden layer"):
        HierarchicalJoint(
            [net(2, 2, 0)], net(2, 4, 1), visible_dim=3, latent_dims=(2,), latent_dim=2
        )
    with pytest.raises(ValueError, match="prior"):
        joint(prior="cauchy")

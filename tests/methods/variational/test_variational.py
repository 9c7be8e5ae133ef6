"""Variational families of binary latents: probabilities, draws and derivatives, against enumeration."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Independent, Normal
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

from bilevel.methods.models import DBM, RBM, GaussianRBM
from bilevel.methods.variational import BernoulliPosterior, HierarchicalJoint
from tests.machines import rng
from tests.methods.variational.cases import (
    NV,
    close,
    every,
    exact_joint,
    joint,
    linear,
    posterior,
    product,
    randn,
    triples,
)

TIGHT = {"atol": 1e-8, "rtol": 1e-7}  # what central differences with steps of 1e-6 resolve


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

"""AdvIL: its objective, its gradients and its blocks of steps; numbers are the paper's assertions."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

from bilevel import Alternating, Implicit, Unrolled, check_hypergradient
from bilevel.methods import Training
from bilevel.methods.advil import AdvIL
from bilevel.methods.likelihood import chi_square_upper_bound
from bilevel.methods.models import DBM, RBM, GaussianRBM
from bilevel.methods.networks.convolutional import JointEnergy, parameter_count
from bilevel.methods.variational import (
    BernoulliPosterior,
    GaussianJoint,
    GaussianPosterior,
    HierarchicalJoint,
)
from bilevel.methods.variational.base import normal_log_prob
from tests.machines import NV, ExactJoint, ExactPosterior, machine, moments, rng
from tests.problems import normal


def binary(n: int, seed: int = 1) -> Tensor:
    return torch.rand(n, NV, generator=rng(seed), dtype=torch.float64).round()


def stripes(n: int) -> Tensor:
    """Two patterns with a little noise: something to learn."""
    v = (torch.arange(n)[:, None] % 2 == torch.arange(NV) % 2).double()
    flips = torch.rand(v.shape, generator=rng(3), dtype=v.dtype) < 0.1
    return (v - flips.double()).abs()


@pytest.mark.parametrize("kind", [RBM, DBM])
def test_2_and_6_exact_distributions_give_the_likelihood_and_its_gradient(kind: Any) -> None:
    model, v = machine(kind), binary(6)
    advil = AdvIL(model, ExactPosterior(model), ExactJoint(model))
    loss, _ = advil.upper_loss(advil.draw(v, rng()))
    likelihood = -model.log_likelihood(v).mean()
    torch.testing.assert_close(loss, likelihood, rtol=1e-12, atol=1e-12)
    parameters = list(model.parameters())
    exact = torch.autograd.grad(likelihood, parameters)
    for ours, truth in zip(torch.autograd.grad(loss, parameters), exact, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-12)


def test_6_the_gradient_is_a_difference_of_moments() -> None:
    model, v = machine(), binary(6)
    advil = AdvIL(model, ExactPosterior(model), ExactJoint(model))
    loss, _ = advil.upper_loss(advil.draw(v, rng()))
    (grad,) = torch.autograd.grad(loss, [model.weight])
    data = v.T @ model.posterior_logits(v).sigmoid() / len(v)
    torch.testing.assert_close(grad, moments(model)["weight"] - data, rtol=1e-12, atol=1e-12)


def test_7_each_term_reaches_its_own_variables_only() -> None:
    advil = AdvIL(machine())
    batch = advil.draw(binary(6), rng())
    sampler_only = advil.draw_lower(batch, rng(), 1)
    parts = {name: list(m.parameters()) for name, m in advil.lower.named_children()}
    loss: Any = advil.lower_loss(sampler_only)
    assert all(
        g is None
        for g in torch.autograd.grad(loss, parts["posterior"], allow_unused=True, retain_graph=True)
    )
    assert all(g is not None for g in torch.autograd.grad(loss, parts["joint"]))
    # the data term alone: both terms less the sampler's, at the same noise
    both = advil.lower_loss(
        sampler_only._replace(visible=batch.visible, posterior_noise=batch.posterior_noise)
    )
    data_term = both - advil.lower_loss(sampler_only)
    for g in torch.autograd.grad(data_term, parts["joint"], retain_graph=True):
        torch.testing.assert_close(g, torch.zeros_like(g), rtol=0, atol=1e-15)
    assert all(g.abs().sum() > 0 for g in torch.autograd.grad(data_term, parts["posterior"]))


def test_7_the_machine_feels_samples_as_constants() -> None:
    """The partial derivative is that of the energies at the draws."""
    advil = AdvIL(machine())
    batch = advil.draw(binary(6), rng())
    answer = Alternating().hypergradient(advil, batch)
    up = advil.encoder.draws(batch.visible, batch.posterior_noise)
    down = advil.sampler.draws(batch.joint_noise)
    model = advil.model
    loss = model(up.visible, up.latent.detach()).mean()
    loss = loss - model(down.visible.detach(), down.latent.detach()).mean()
    for name, g in zip(
        answer.grad, torch.autograd.grad(loss, list(model.parameters())), strict=True
    ):
        torch.testing.assert_close(answer.grad[name], g, rtol=1e-12, atol=1e-12)


def test_blocks_take_different_numbers_of_steps() -> None:
    """One of the machine, one of the encoder, `lower_steps` of the sampler."""
    advil = AdvIL(machine())
    optimizers = advil.optimizers(Training(upper_lr=1e-3, lower_lr=1e-3))
    advil.fit(binary(40), num_steps=3, lower_steps=7, batch_size=10, optimizers=optimizers)
    upper, lower = optimizers
    assert {float(s["step"]) for s in upper.state.values()} == {3.0}
    steps = {
        name: {float(lower.state[p]["step"]) for p in m.parameters()}
        for name, m in advil.lower.named_children()
    }
    assert steps == {"posterior": {3.0}, "joint": {21.0}}


@pytest.mark.parametrize("solver", [Unrolled(2), Implicit()], ids=["unrolled", "implicit"])
def test_hypergradient_equals_finite_differences(solver: Any) -> None:
    """The response term the paper drops; at a temperature at which differences resolve it."""
    model = machine()
    advil = AdvIL(
        model,
        BernoulliPosterior.for_model(model, temperature=1.0),
        HierarchicalJoint.for_model(model, latent_dim=2, hidden=3, temperature=1.0),
    )
    batch = advil.draw(binary(5), rng())
    if isinstance(solver, Implicit):
        answer = solver.hypergradient(advil, batch, [batch], throw=False)
        assert answer.stats.response_norm > 0
        return
    optimizer = torch.optim.SGD(advil.lower.parameters(), 1e-2)
    check = check_hypergradient(
        advil, solver, batch, [batch], lower_optimizer=optimizer, tolerance=1e-8
    )
    assert check.passed, check


def test_14_and_15_the_sampler_brackets_log_z_if_it_takes_enough_steps() -> None:
    gaps = {}
    for lower_steps in (1, 20):
        advil = AdvIL(RBM(NV, 3).double(), prior="bernoulli")
        advil.fit(
            stripes(400),
            num_steps=150,
            batch_size=100,
            lower_steps=lower_steps,
            lower_lr=3e-3,
            upper_lr=3e-3,
        )
        with torch.no_grad():
            exact = float(advil.model.log_partition())
            lower = float(
                advil.upper_loss(advil.draw(stripes(4000), rng()))[1]["log_partition_bound"]
            )
        upper = chi_square_upper_bound(
            advil.model, advil.sampler, generator=rng(), num_samples=20_000
        )
        gaps[lower_steps] = exact - lower
        if lower_steps > 1:
            assert lower < exact + 0.1  # soft draws bend the bound a little
            assert exact < upper.value + 3 * upper.standard_error
    assert gaps[20] < 0.3
    assert gaps[20] < gaps[1]


def test_15_training_beats_independent_units() -> None:
    data = stripes(400)
    advil = AdvIL(RBM(NV, 3).double())
    advil.fit(data, num_steps=200, batch_size=100, lower_steps=10, lower_lr=1e-2, upper_lr=5e-2)
    mean = data.mean(0)
    independent = float((data * mean.log() + (1 - data) * (1 - mean).log()).sum(1).mean())
    learned = float(advil.model.log_likelihood(data).mean().detach())
    assert learned > independent + 0.3
    share = data.unique(dim=0, return_counts=True)[1] / len(data)
    assert learned <= float((share * share.log()).sum())  # the data's own distribution


def test_save_and_load(tmp_path: Path) -> None:
    advil = AdvIL(DBM(NV, (3, 2)), prior="bernoulli")
    advil.save(tmp_path)
    again = AdvIL.load(tmp_path)
    torch.testing.assert_close(dict(again.state_dict()), dict(advil.state_dict()), rtol=0, atol=0)
    assert again.sampler.prior == "bernoulli"


@pytest.mark.parametrize(
    "model", [RBM(NV, 3), GaussianRBM(NV, 3), DBM(NV, (3, 2))], ids=lambda m: type(m).__name__
)
def test_use(model: Any) -> None:
    advil = AdvIL(model)
    data = binary(40).float()
    history = advil.fit(data, num_steps=2, lower_steps=3, batch_size=10, log_every=1)
    assert {"energy_data", "energy_samples", "log_partition_bound"} <= history.records[-1].keys()
    assert advil.sample(5, rng()).shape == (5, NV)
    assert advil.energy(data).shape == (40,)
    assert advil.reconstruct(data).shape == data.shape
    assert advil.posterior(data).sample().shape == (40, sum(model.latent_dims))


def test_data_that_are_not_binary_are_refused() -> None:
    with pytest.raises(ValueError, match=r"exactly 0 or 1, but 8 of 8 values are not.*grey=True"):
        AdvIL(RBM(NV, 3)).fit(torch.full((2, NV), 0.5))
    with pytest.raises(ValueError, match=r"in \[0, 1\], got values from 0.5 to 2"):
        AdvIL(RBM(NV, 3, grey=True)).fit(torch.tensor([[0.5, 2.0, 1.0, 1.0]]))


def test_unrolled_steps_move_the_encoder_too() -> None:
    """A solver's hypothetical steps take the whole lower loss, though the loop's later ones do not."""
    advil = AdvIL(machine())
    history = advil.fit(
        binary(40), solver=Unrolled(3), num_steps=2, lower_steps=2, batch_size=10, log_every=1
    )
    assert history.records[-1]["response_norm"] > 0


@pytest.mark.usefixtures("traced_only")
def test_traced_steps_equal_eager_ones() -> None:
    """Blocks with different numbers of steps, the later ones without the encoder's gradient."""
    made = [AdvIL(machine()) for _ in range(2)]
    for advil, compiled in zip(made, (False, True), strict=True):
        advil.fit(binary(40), num_steps=3, lower_steps=3, batch_size=10, compile=compiled)
    torch.testing.assert_close(made[1].state_dict(), made[0].state_dict(), rtol=1e-10, atol=1e-12)


# ---------------------------------------------------------------------- other energies; images


class LinearGaussian(nn.Module):
    """E(v, h) = -log N(h; 0, I) N(v; A h + b, s^2 I), A with orthogonal columns: Z = 1."""

    def __init__(self, sigma: float = 0.6) -> None:
        super().__init__()
        basis = torch.linalg.qr(normal(3, 2))[0]
        self.matrix = nn.Parameter(basis * torch.tensor([1.5, 0.7]))
        self.bias = nn.Parameter(normal(3, seed=1))
        self.sigma = sigma

    def forward(self, v: Tensor, h: Tensor) -> Tensor:
        z = (v - h @ self.matrix.mT - self.bias) / self.sigma
        scale = v.shape[1] * math.log(self.sigma)
        return scale - normal_log_prob(z).sum(1) - normal_log_prob(h).sum(1)

    def generate(self, h: Tensor) -> Tensor:
        return h @ self.matrix.detach().mT + self.bias.detach()

    def moments(self, v: Tensor) -> tuple[Tensor, Tensor]:
        a, s2 = self.matrix.detach(), self.sigma**2
        precision = 1 + (a * a).sum(0) / s2
        mean = (v - self.bias.detach()) @ a / s2 / precision
        return mean, (-precision.log()).expand_as(mean)

    def free_energy(self, v: Tensor) -> Tensor:
        covariance = self.matrix @ self.matrix.mT + torch.eye(3).double() * self.sigma**2
        return -MultivariateNormal(self.bias, covariance).log_prob(v)


class Calls(nn.Module):
    """A function as a module, with a weight that does nothing."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function
        self.shift = nn.Parameter(torch.zeros(()).double())

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs)


def linear_gaussian() -> tuple[AdvIL, LinearGaussian]:
    """AdvIL of an energy whose posterior and joint the families contain, at both."""
    energy = LinearGaussian()
    posterior = GaussianPosterior(Calls(energy.moments), 2)
    joint = GaussianJoint(Calls(energy.generate), 2, (3,), energy.sigma)
    return AdvIL(energy, posterior, joint).double(), energy


def test_2_exact_gaussians_give_the_likelihood_at_every_draw() -> None:
    """E + log Q is F(v) and E + log q is -log Z = 0, whatever is drawn."""
    advil, energy = linear_gaussian()
    v = normal(5, 3, seed=4)
    loss, logs = advil.upper_loss(advil.draw(v, rng()))
    exact = energy.free_energy(v)
    torch.testing.assert_close(loss, exact.mean(), rtol=1e-12, atol=1e-12)
    assert abs(logs["log_partition_bound"].item()) < 1e-12
    torch.testing.assert_close(advil.energy(v), exact.detach(), rtol=1e-12, atol=1e-12)


def test_6_the_gradient_of_a_gaussian_energy_is_that_of_its_likelihood() -> None:
    """On average over the draws: 4.5 standard errors of 400 batches."""
    advil, energy = linear_gaussian()
    v = normal(500, 3, seed=4)
    (exact,) = torch.autograd.grad(energy.free_energy(v).mean(), [energy.matrix])
    losses = (advil.upper_loss(advil.draw(v, rng(seed)))[0] for seed in range(400))
    found = torch.stack([torch.autograd.grad(loss, [energy.matrix])[0] for loss in losses])
    error = found.std(0) / 20
    assert bool(((found.mean(0) - exact).abs() < 4.5 * error).all())
    assert float(exact.abs().max()) > 20 * float(error.max())  # it could have been wrong


def small(**options: Any) -> AdvIL:
    return AdvIL.for_images((1, 8, 8), **{"latent_dim": 3, "width": 4, **options})


def images(n: int = 40) -> Tensor:
    return torch.rand(n, 1, 8, 8, generator=rng(2)) * 2 - 1


def test_images_have_the_undecoupled_published_networks() -> None:
    with torch.device("meta"):
        advil = AdvIL.for_images((3, 32, 32))
    assert isinstance(advil.upper.get_submodule("model"), JointEnergy)
    assert parameter_count(advil.upper) == 8_701_633
    assert parameter_count(advil.lower) == 2_780_024 + 4_452_963


def test_the_entropy_of_the_image_sampler_is_constant() -> None:
    """The lower gradient of the generator is that of the mean energy alone."""
    advil = small().double().eval()  # spectral norm stands still
    batch = advil.draw(images(6).double(), rng())
    generator = list(advil.sampler.parameters())
    loss = advil.lower_loss(batch._replace(visible=None))
    found = torch.autograd.grad(loss, generator)
    draws = advil.sampler.draws(batch.joint_noise)
    energy = advil.joint_energy(draws.visible, draws.latent).mean()
    for ours, wanted in zip(found, torch.autograd.grad(energy, generator), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-12)
    assert any(float(g.abs().max()) > 0 for g in found)


def test_a_proper_energy_has_half_the_square_of_the_latent_beside_it(tmp_path: Path) -> None:
    plain, proper = small().eval(), small(proper=True).eval()
    v, h = images(5), torch.randn(5, 3, generator=rng())
    difference = proper.joint_energy(v, h) - plain.joint_energy(v, h)
    torch.testing.assert_close(difference, h.square().sum(1) / 2, rtol=1e-5, atol=1e-5)
    proper.save(tmp_path)
    torch.testing.assert_close(AdvIL.load(tmp_path).energy(v), proper.energy(v), rtol=0, atol=0)


def test_images_are_trained_saved_and_loaded(tmp_path: Path) -> None:
    advil, before = small(statistics="batch"), small().state_dict()
    history = advil.fit(images(), num_steps=2, batch_size=20, lower_steps=1, log_every=1)
    assert {"energy_data", "energy_samples"} <= history.records[-1].keys()
    # a bias in front of a batch norm does nothing; every other parameter moves
    after = advil.state_dict()
    still = [k for k, p in advil.named_parameters() if after[k].equal(before[k])]
    assert still == []
    assert advil.latent_dim == 3
    advil.save(tmp_path)
    again = AdvIL.load(tmp_path)
    assert again.statistics == "batch"
    v = images(5)
    torch.testing.assert_close(again.energy(v), advil.energy(v), rtol=0, atol=0)
    assert advil.sample(3, rng()).shape == advil.reconstruct(v[:3]).shape == (3, 1, 8, 8)
    assert advil.posterior(v).sample().shape == (5, 3)
    alone = torch.cat([advil.energy(row[None]) for row in v])
    torch.testing.assert_close(alone, advil.energy(v), rtol=1e-5, atol=1e-5)


def test_energies_that_are_no_machines_are_refused_what_they_cannot() -> None:
    with pytest.raises(
        ValueError, match=r"no default encoder and sampler for a `Linear`; give both"
    ):
        AdvIL(nn.Linear(3, 1))
    with pytest.raises(NotImplementedError, match=r"`JointEnergy` is no Boltzmann machine"):
        _ = small().model
    with pytest.raises(ValueError, match="did you mean `running`"):
        small(statistics="runing")
    with pytest.raises(ValueError, match="`sigma` must be positive"):
        small(sigma=0)
    advil, energy = linear_gaussian()
    wrong = AdvIL(energy, advil.encoder, GaussianJoint(nn.Linear(2, 4), 2, (4,), 0.5)).double()
    with pytest.raises(ValueError, match=r"visibles of shape \(4,\).*but the data have \(3,\)"):
        wrong.fit(normal(20, 3), num_steps=1, batch_size=10)

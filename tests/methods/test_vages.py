"""VaES and VaGES with every latent enumerated, where they are exact, and with draws.

Numbers in brackets are those of the assertions in the papers' fact sheet.
"""

import itertools
import math
from pathlib import Path
from typing import Any, final

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from bilevel import Alternating, Implicit, Unrolled
from bilevel.methods.models import RBM, GaussianDBM, GaussianRBM
from bilevel.methods.score_matching import ScoreMatching
from bilevel.methods.vages import Batch, Pairs, Samples, VaGES, slope_and_directions
from bilevel.methods.variational import (
    BernoulliPosterior,
    Draws,
    GaussianPosterior,
    VariationalPosterior,
)
from bilevel.tree import Tree
from tests.devices import DEVICES, generator

TIGHT: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12}
UNITS = 4


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=generator(seed))


def machine() -> GaussianRBM:
    """A Gaussian RBM far from its initial weights, in float64."""
    model = GaussianRBM(2, UNITS).double()
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(0.7 * normal(*p.shape, seed=i))
    return model


@final
class Enumerated(VariationalPosterior):
    """All states of the latents with their exact posterior probabilities; it needs no noise."""

    def __init__(self, model: GaussianRBM) -> None:
        super().__init__()
        self.logits = nn.Linear(2, UNITS, dtype=torch.float64)
        with torch.no_grad():
            self.logits.weight.copy_(model.weight.mT)
            self.logits.bias.copy_(model.latent_bias)

    def noise(self, n: int, generator: torch.Generator, like: Tensor) -> Tensor:
        return like.new_zeros(n, 0)

    def draws(self, v: Tensor, noise: Tensor) -> Draws:
        states = torch.tensor(list(itertools.product((0.0, 1.0), repeat=UNITS))).double()
        rows = v.repeat_interleave(len(states), 0)
        h = states.repeat(len(v), 1)
        log_prob = self.log_prob(rows, h)
        return Draws(rows, h, log_prob, log_prob.exp() / len(v))

    def log_prob(self, v: Tensor, h: Tensor) -> Tensor:
        a = self.logits(v)
        return (a * h - nn.functional.softplus(a, threshold=40)).sum(1)

    def distribution(self, v: Tensor) -> Distribution:
        raise NotImplementedError


def exact(**options: Any) -> VaGES:
    model = machine()
    return VaGES(model, Enumerated(model), **options)


def sampled(**options: Any) -> VaGES:
    """With the exact posterior, to be drawn from."""
    model = machine()
    posterior = BernoulliPosterior([Enumerated(model).logits], [UNITS])
    return VaGES(model, posterior, **options)


def data(n: int = 6) -> Tensor:
    return 0.8 * normal(n, 2, seed=50)


def gradient(made: VaGES, batch: Batch) -> Tree:
    grads = Alternating().hypergradient(made, batch).grad
    return {name.removeprefix("model."): g for name, g in grads.items()}


def marginal_gradient(made: VaGES, batch: Batch) -> Tree:
    """The gradient of the same denoising objective on the exact free energy."""
    single = ScoreMatching(made.model)
    single.objective = made.regression  # type: ignore[assignment]
    names, leaves = zip(*made.model.named_parameters(), strict=True)
    return dict(
        zip(names, torch.autograd.grad(single.upper_loss(batch.points), leaves), strict=True)  # type: ignore[arg-type]
    )


def free_score(model: GaussianRBM, v: Tensor) -> Tensor:
    v = v.requires_grad_() if v.is_leaf else v
    return torch.autograd.grad(-model.free_energy(v).sum(), v, create_graph=True)[0]


# ---------------------------------------------------------------- the estimates


def test_2_vaes_with_all_latents_is_the_score() -> None:
    made = exact()
    v = data()
    samples = made.samples(v, v.new_zeros(len(v), 2, 0), v.new_zeros(len(v), 0, 2, 0))
    torch.testing.assert_close(made.estimated_score(samples), free_score(made.model, v), **TIGHT)


@pytest.mark.parametrize("num_samples", [2, 3])
@pytest.mark.parametrize("objective", ["denoising", "multiscale"])
def test_2_vages_with_all_latents_is_the_exact_gradient(objective: str, num_samples: int) -> None:
    made = exact(objective=objective, num_samples=num_samples, sigma=0.2, sigma_range=(0.2, 0.6))
    batch = made.draw(data(), generator())
    answer, truth = gradient(made, batch), marginal_gradient(made, batch)
    assert set(answer) == {"visible_bias", "latent_bias", "weight", "log_scale"}
    for name in truth:
        torch.testing.assert_close(answer[name], truth[name], **TIGHT)
    single = ScoreMatching(made.model)
    single.objective = made.regression  # type: ignore[assignment]
    value = made.upper_loss(batch)
    torch.testing.assert_close(value, single.upper_loss(batch.points), **TIGHT)  # type: ignore[arg-type]


def test_3_without_the_covariance_weights_and_hidden_biases_are_wrong() -> None:
    made = exact(covariance=False)
    batch = made.draw(data(), generator())
    answer, truth = gradient(made, batch), marginal_gradient(made, batch)
    for name in ("visible_bias", "log_scale"):
        torch.testing.assert_close(answer[name], truth[name], **TIGHT)
    for name in ("weight", "latent_bias"):
        assert (answer[name] - truth[name]).norm() > 0.1 * truth[name].norm()
    assert answer["latent_bias"].abs().max() == 0


def test_12_sample_covariance_of_two_draws_is_unbiased() -> None:
    """Averaged over all pairs of latents under the posterior: the true covariance."""
    made = exact()
    v = data(1)
    states = made.samples(v, v.new_zeros(1, 1, 0), v.new_zeros(1, 0, 1, 0))
    slope, directions = slope_and_directions(states, states)
    z = normal(1, 2, seed=9)
    (along,) = torch.autograd.grad((z * slope).sum(), directions)
    p = states.weight[0]
    pairs = torch.cartesian_prod(torch.arange(len(p)), torch.arange(len(p)))
    half = torch.full((len(pairs), 2), 0.5).double()
    two = Samples(v, v, states.log_density[0, pairs], half)
    averaged = p[pairs].prod(1) @ two.covariance(along[0, pairs])
    torch.testing.assert_close(2 * averaged, states.covariance(along)[0], **TIGHT)


def test_directions_are_the_scores_of_single_latents() -> None:
    made = sampled()
    batch = made.draw(data(), generator())
    _, one, other = made.samples(data(), batch.latent, batch.langevin).groups(3)
    slope, directions = slope_and_directions(one, other)
    z = normal(6, 2, seed=9)
    (along,) = torch.autograd.grad((z * slope).sum(), directions, retain_graph=True)
    for i in range(2):
        v = data().requires_grad_()
        (g,) = torch.autograd.grad(-made.model(v, other.latent[:, i]).sum(), v)
        torch.testing.assert_close(along[:, i], (z * g).sum(1), **TIGHT)


def test_12_vages_with_two_draws_is_unbiased() -> None:
    """Mean and standard error over 40 batches of 2000 times the same six visibles."""
    made = sampled(sigma=0.3)
    one = made.draw(data(), generator())
    repeated = [x.repeat(2000, 1) for x in (one.data, one.points.visible, one.points.target)]  # type: ignore[union-attr]
    still = one.langevin.new_zeros(len(repeated[0]), 0, 6, UNITS)
    points = one.points._replace(visible=repeated[1], target=repeated[2])  # type: ignore[union-attr]
    answers = []
    for seed in range(40):
        noise = made.encoder.noise(3 * 2 * len(repeated[0]), generator(seed), repeated[0])
        latent = noise.view(len(repeated[0]), 6, UNITS)
        grads = gradient(made, Batch(repeated[0], points, latent, still))
        answers.append(torch.cat([g.flatten() for g in grads.values()]))
    truth = torch.cat([g.flatten() for g in marginal_gradient(made, one).values()])
    mean, error = torch.stack(answers).mean(0), torch.stack(answers).std(0) / 40**0.5
    deviation = (mean - truth) / error.clamp_min(1e-9)
    assert deviation.abs().max() < 4
    assert (error < 0.1 * truth.norm()).all()


def test_12_one_sample_is_refused() -> None:
    with pytest.raises(ValueError, match="`num_samples` is 1, but the sample covariance divides"):
        VaGES(machine(), num_samples=1)
    assert VaGES(machine(), num_samples=1, covariance=False).num_samples == 1
    with pytest.raises(ValueError, match="`num_samples` is 0"):
        VaGES(machine(), num_samples=0, covariance=False)


def test_4_variance_reduced_score_is_exact_for_every_draw() -> None:
    """At the exact posterior the score of p~ / q does not depend on h."""
    v = data()
    truth = free_score(machine(), data())
    for seed in range(3):
        reduced, plain = sampled(variance_reduced=True), sampled()
        noise = reduced.encoder.noise(12, generator(seed), v).view(6, 2, UNITS)
        still = noise.new_zeros(len(noise), 0, *noise.shape[1:])
        samples = reduced.samples(v, noise, still)
        torch.testing.assert_close(reduced.estimated_score(samples), truth, **TIGHT)
        assert (plain.estimated_score(plain.samples(v, noise, still)) - truth).abs().max() > 1e-2


def test_groups_are_independent() -> None:
    made = sampled()
    batch = made.draw(data(), generator())
    groups = batch.latent.chunk(3, dim=1)
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(groups, 2))
    assert batch.latent.shape == (6, 3 * 2, UNITS)


def test_hard_draws_are_the_relaxed_ones_rounded() -> None:
    made = sampled()
    v = data(50)
    noise = made.encoder.noise(100, generator(), v)
    h, log_prob, weight = made.encoder.exact(v, noise.view(2, 50, UNITS))
    soft = made.encoder.draws(v.repeat(2, 1), noise)
    assert torch.equal(h.flatten(0, 1), soft.latent.round())
    assert torch.equal(log_prob.flatten(), made.encoder.log_prob(v.repeat(2, 1), h.flatten(0, 1)))
    assert torch.equal(weight, torch.full((2, 50), 0.5).double())
    assert not h.requires_grad


def test_draws_of_two_layers_are_those_row_by_row() -> None:
    posterior = BernoulliPosterior.for_model(GaussianDBM(2, (3, 2))).double()
    v = data(20)
    noise = posterior.noise(60, generator(), v)
    h, log_prob, _ = posterior.exact(v, noise.view(3, 20, 5))
    below, rows = [], v.repeat(3, 1)
    for network, part in zip(posterior.networks, noise.split([3, 2], 1), strict=True):
        below.append((network(below[-1] if below else rows) + part > 0).double())
    assert torch.equal(h.flatten(0, 1), torch.cat(below, 1))
    alone = posterior.log_prob(rows, h.flatten(0, 1))
    torch.testing.assert_close(log_prob.flatten(), alone, rtol=1e-13, atol=1e-13)


# ---------------------------------------------------------------- the Stein discrepancy


def stein_kernel(model: GaussianRBM, v: Tensor, other: Tensor, width: float) -> Tensor:
    """U(v, v') with the kernel's derivatives by autograd, shape (n,)."""
    v, other = v.clone().requires_grad_(), other.clone().requires_grad_()
    k = (-(v - other).square().sum(1) / (2 * width**2)).exp()
    first, second = torch.autograd.grad(k.sum(), (v, other), create_graph=True)
    trace = sum(
        torch.autograd.grad(first[:, i].sum(), other, retain_graph=True)[0][:, i] for i in range(2)
    )
    s, t = free_score(model, v), free_score(model, other)
    first, second, k, trace = first.detach(), second.detach(), k.detach(), trace.detach()
    return k * (s * t).sum(1) + (s * second).sum(1) + (t * first).sum(1) + trace


def test_13_both_orders_together_have_the_gradient_of_the_stein_discrepancy() -> None:
    made = exact(objective="stein", width=0.6)
    v, other = data(5), 0.8 * normal(5, 2, seed=51)
    noise = v.new_zeros(5, 6, 0), v.new_zeros(5, 0, 6, 0)
    orders = [Batch(v, Pairs(a, b), *noise) for a, b in ((v, other), (other, v))]
    kernel = stein_kernel(made.model, v, other, 0.6).mean()
    names, leaves = zip(*made.model.named_parameters(), strict=True)
    truth = dict(zip(names, torch.autograd.grad(kernel, leaves), strict=True))
    answers = [gradient(made, batch) for batch in orders]
    for name in names:
        torch.testing.assert_close(answers[0][name] + answers[1][name], truth[name], **TIGHT)
        assert (2 * answers[0][name] - truth[name]).norm() > 1e-3 * truth[name].norm()
    for batch in orders:
        torch.testing.assert_close(made.upper_loss(batch), kernel.detach() / 2, **TIGHT)


def test_13_stein_compares_the_two_halves_of_a_batch() -> None:
    made = sampled(objective="stein")
    v = data(7)
    batch = made.draw(v, generator())
    assert isinstance(batch.points, Pairs)
    assert torch.equal(batch.points.visible, v[:3])
    assert torch.equal(batch.points.other, v[3:6])
    lower = made.draw_lower(batch, generator(), 0)
    assert torch.equal(lower.visible, v)
    with pytest.raises(ValueError, match="compares pairs of visibles"):
        made.draw(v[:1], generator())


# ---------------------------------------------------------------- the learner


def test_losses_are_functions_of_the_batch() -> None:
    made = sampled()
    batches = [made.draw(data(), generator(seed)) for seed in (0, 0, 1)]
    values = [made.upper_loss(batch) for batch in batches]
    assert torch.equal(values[0], values[1])
    assert not torch.equal(values[0], values[2])
    with torch.no_grad():
        assert torch.equal(made.upper_loss(batches[0]), values[0])


def test_lower_steps_have_their_own_noise() -> None:
    made = sampled(objective="multiscale")
    batch = made.draw(data(), generator())
    one, other = (made.draw_lower(batch, generator(seed), seed) for seed in (1, 2))
    assert not torch.equal(one.visible, other.visible)
    assert not torch.equal(one.latent, other.latent)
    assert torch.equal(one.gain, other.gain)
    assert one.latent.shape == (6, UNITS)


@pytest.mark.parametrize("objective", ["denoising", "multiscale", "stein"])
def test_fit_save_load_resume(objective: Any, tmp_path: Path) -> None:
    def make() -> VaGES:
        return VaGES(GaussianRBM(2, UNITS), objective=objective, num_samples=3, width=0.2)

    v = data(64).float()
    whole, first, again = make(), make(), make()
    settings: dict[str, Any] = {"num_steps": 4, "batch_size": 16, "log_every": 1}
    history = whole.fit(v, **settings)
    assert all(math.isfinite(record["lower_loss"]) for record in history.records)
    assert len(history.records) == 4
    first.fit(v, **settings, run=tmp_path / "run", callbacks=[lambda step: step.number == 2])
    again.fit(v, **settings, run=tmp_path / "run", resume=True)
    torch.testing.assert_close(again.state_dict(), whole.state_dict(), rtol=0, atol=0)
    whole.save(tmp_path / "model")
    loaded = VaGES.load(tmp_path / "model")
    assert (loaded.num_samples, loaded.width) == (3, 0.2)
    torch.testing.assert_close(loaded.state_dict(), whole.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("objective", ["denoising", "multiscale", "stein"])
def test_every_parameter_moves(objective: Any, device: str) -> None:
    """The hidden biases too, which BiSM without its response leaves where they are."""
    made = VaGES(GaussianRBM(2, UNITS), objective=objective).to(device)
    before = {n: p.clone() for n, p in made.named_parameters()}
    made.fit(data(64).float(), num_steps=2, batch_size=16)
    assert all(not torch.equal(p, before[n]) for n, p in made.named_parameters())


def test_gaussian_latents_of_any_energy() -> None:
    class Energy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix = nn.Parameter(torch.tensor([[1.0], [2.0]]))

        def forward(self, v: Tensor, h: Tensor) -> Tensor:
            return 0.5 * ((v - h @ self.matrix.mT).square().sum(1) + h.square().sum(1))

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 2)

        def forward(self, v: Tensor) -> tuple[Tensor, Tensor]:
            mean, log_variance = self.linear(v).chunk(2, dim=1)
            return mean, log_variance

    made = VaGES(Energy(), GaussianPosterior(Network(), 1), divergence="fisher")
    history = made.fit(data(64).float(), num_steps=3, batch_size=16, log_every=1)
    assert history.steps == 3
    made.langevin, made.visible_shape = (1, 2, 1), (2,)
    assert made.sample(3).shape == (3, 2)


def test_two_hidden_layers() -> None:
    made = VaGES(GaussianDBM(2, (3, 2)))
    assert made.fit(data(64).float(), num_steps=2, batch_size=16).steps == 2


@pytest.mark.usefixtures("traced_only")
def test_traced_steps_equal_eager_ones() -> None:
    made = [VaGES(GaussianRBM(2, UNITS).double()) for _ in range(2)]
    for one, compiled in zip(made, (False, True), strict=True):
        one.fit(data(64), num_steps=3, batch_size=16, compile=compiled)
    torch.testing.assert_close(made[1].state_dict(), made[0].state_dict(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("solver", [Implicit(), Unrolled(2)])
def test_solvers_with_a_response_are_refused(solver: Any) -> None:
    with pytest.raises(ValueError, match=r"in `VaGES` the upper loss is a surrogate.*`Alternating"):
        sampled().fit(data(64), num_steps=1, batch_size=16, solver=solver)


def test_refusals() -> None:
    model = GaussianRBM(2, 4)
    with pytest.raises(ValueError, match="`objective` cannot be 'sliced'"):
        VaGES(model, objective="sliced")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`width` must be positive"):
        VaGES(model, objective="stein", width=0)
    with pytest.raises(ValueError, match="`RBM` are binary"):
        VaGES(RBM(4, 2))
    with pytest.raises(ValueError, match="are binary; use divergence='kl'"):
        VaGES(model, divergence="fisher")
    with pytest.raises(
        ValueError, match=r"latent_steps differentiates in h.*leave `latent_steps` 0"
    ):
        VaGES(model, latent_steps=3)
    with pytest.raises(ValueError, match=r"`variance_reduced=True` needs latents of q"):
        VaGES(model, variance_reduced=True, latent_steps=1)
    with pytest.raises(ValueError, match=r"cannot be negative, got 0, -0\.1 and"):
        VaGES(model, latent_rate=-0.1)

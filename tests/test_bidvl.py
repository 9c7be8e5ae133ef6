"""BiDVL's losses, networks and optimizers on small networks (A13-A21)."""

import copy

import pytest
import torch
from torch import nn
from torch.distributions import Normal, kl_divergence

from bilevel import Alternating, Implicit, Oracles, Unrolled, check_hypergradient, train
from bilevel.methods import BiDVL, Training
from bilevel.methods.networks import Energy, Generator, Posterior, parameter_count

SHAPE = (1, 8, 8)
VARIANTS = ["offset", "complete", "without"]


def small(**options):
    """A model in float64 whose batch norm is in evaluation mode: losses are smooth and per-image."""
    model = BiDVL.for_images(SHAPE, latent_dim=3, width=4, **options).double()
    return model.eval()


def images(n=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, *SHAPE, dtype=torch.float64, generator=generator) * 2 - 1


def batch(model, n=6):
    return model.draw(images(n), torch.Generator().manual_seed(1))


def upper_gradient(model):
    made = batch(model)
    return Alternating().hypergradient(model, made, [made]).grad


def lower_gradient(model, made=None):
    made = batch(model) if made is None else made
    oracles = Oracles(model, made, [made])
    _, grads = oracles.lower_gradient(oracles.upper, oracles.lower)
    return grads


def size(grads, prefix):
    return sum(
        float(g.norm()) for name, g in grads.items() if name.startswith(prefix) and g is not None
    )


def test_a13_upper_step_moves_the_energy_only():
    model = small()
    assert {name.split(".")[0] for name in upper_gradient(model)} == {"energy"}
    before = copy.deepcopy(model.state_dict())
    next(
        train(
            model,
            images(),
            upper_optimizer=torch.optim.SGD(model.upper.parameters(), 0.1),
            lower_steps=0,
            num_steps=1,
        )
    )
    changed = {name for name, value in model.state_dict().items() if not value.equal(before[name])}
    assert changed
    assert all(name.startswith("upper.energy") for name in changed)


def test_a14_latent_reconstruction_reaches_the_posterior_in_complete_only():
    for variant, reaches in (("offset", False), ("complete", True)):
        model = small(variant=variant, ratio=0.0)  # without the VAE, Q learns from this term alone
        grads = lower_gradient(model)
        for head in ("posterior.mean", "posterior.log_variance", "posterior.trunk"):
            assert (size(grads, head) > 0) == reaches, (variant, head)
        assert size(grads, "generator") > 0


def test_a14_latent_reconstruction_moves_the_generator():
    with_term, without = small(latent_weight=1.0), small(variant="without")
    difference = size(lower_gradient(with_term), "generator") - size(
        lower_gradient(without), "generator"
    )
    assert abs(difference) > 1e-6


def test_a15_lower_step_leaves_the_energy_alone():
    model = small().train()
    made = batch(model)
    energy = {n: p.detach().clone() for n, p in model.upper.named_parameters()}
    expected = upper_gradient(copy.deepcopy(model))
    steps = train(
        model,
        images(),
        upper_optimizer=torch.optim.SGD(model.upper.parameters(), 1e-30),
        lower_optimizer=torch.optim.SGD(model.lower.parameters(), 1e-30),
        lower_steps=3,
        num_steps=1,
    )
    next(steps)
    for name, parameter in model.upper.named_parameters():
        torch.testing.assert_close(parameter, energy[name], rtol=0, atol=1e-12)
        assert parameter.grad is None  # nothing is left to leak into the next upper step
    assert expected.keys() == Alternating().hypergradient(model, made, [made]).grad.keys()


def test_a16_coefficients_of_the_lower_loss():
    model = small(ratio=0.3)
    made = batch(model)
    loss, logs = model.lower_loss(made)
    mean, log_variance = model.network("posterior")(made.visible)
    prior = kl_divergence(
        Normal(mean, (log_variance / 2).exp()),
        Normal(torch.zeros_like(mean), torch.ones_like(mean)),
    )
    h = mean + (log_variance / 2).exp() * made.noise
    reconstruction = (model.generate(h) - made.visible).pow(2).sum((1, 2, 3)).mean()
    generated = model.generate(made.latent)
    recovered = model.network("posterior")(generated)[0]
    latent = (recovered - made.latent).pow(2).sum(1).mean() / 3
    energy = model.free_energy(generated).mean()
    expected = energy + latent + 0.3 * (reconstruction + prior.sum(1).mean())
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(logs["reconstruction"], reconstruction, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a16_duplicating_the_batch_changes_no_loss(variant):
    model = small(variant=variant, ratio_bias="sigmoid")
    made = batch(model)
    twice = type(made)(*(torch.cat([part, part]) for part in made))
    for loss in (model.upper_loss, model.lower_loss):
        torch.testing.assert_close(loss(made)[0], loss(twice)[0], rtol=1e-12, atol=1e-12)


def test_a17_complete_latent_term_has_its_variance_part():
    model = small(variant="complete")
    made = batch(model, 2)
    generated = model.generate(made.latent)
    mean, log_variance = model.network("posterior")(generated)
    generator = torch.Generator().manual_seed(3)
    total, n = 0.0, 20_000
    noise = torch.randn(n, 2, 3, dtype=torch.float64, generator=generator)
    for chunk in noise.split(2_000):
        h = mean + (log_variance / 2).exp() * chunk
        total += (h - made.latent).square().sum(2).sum(0)
    expected = (mean - made.latent).square().sum(1) + log_variance.exp().sum(1)
    # Monte Carlo: the standard error is about 0.7 % of a term of order one
    torch.testing.assert_close(total / n, expected, rtol=0.05, atol=0)
    one = model.latent_reconstruction(generated, made)
    h = mean + (log_variance / 2).exp() * made.cycle_noise
    torch.testing.assert_close(one, (h - made.latent).square().sum(1), rtol=1e-12, atol=0)


def test_a17_complete_upper_term_is_the_posteriors_kl_over_d():
    model, plain = small(variant="complete"), small(variant="without")
    made = batch(model)
    mean, log_variance = model.network("posterior")(model.generate(made.latent))
    prior = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1).mean()
    difference = model.upper_loss(made)[0] - plain.upper_loss(made)[0]
    torch.testing.assert_close(difference, prior / 3, rtol=1e-12, atol=1e-12)
    assert not any(name.startswith("generator") for name in upper_gradient(model))


def test_a18_without_ratio_the_posterior_of_offset_learns_nothing():
    assert size(lower_gradient(small(ratio=0.0)), "posterior") == 0


def test_a18_without_never_encodes_generated_samples():
    model = small(variant="without")
    calls = []
    model.network("posterior").register_forward_hook(lambda *_: calls.append(1))
    model.lower_loss(batch(model))
    assert len(calls) == 1


def test_a19_energy_is_positive_normalised_and_near_log_2_at_first():
    torch.manual_seed(0)
    energy = Energy((3, 32, 32))
    v = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        for _ in range(50):
            values = energy(v)
    assert values.min() >= 0
    assert values.mean() == pytest.approx(0.69, abs=0.02)
    layers = [m for m in energy.modules() if isinstance(m, nn.Conv2d)]
    assert len(layers) == 10
    for layer in layers:
        norm = torch.linalg.matrix_norm(layer.weight.detach().flatten(1), 2)
        assert norm == pytest.approx(1, abs=0.01)


PUBLISHED = {
    32: (2_780_024, 4_452_963, 7_385_665),
    64: (8_728_952, 16_866_147, 29_670_977),
    128: (30_063_992, 65_285_475, 118_806_081),
}


@pytest.mark.parametrize("side", PUBLISHED)
def test_a20_parameter_counts(side):
    shape = (3, side, side)
    with torch.device("meta"):  # counts need no memory; spectral norm needs real weights
        counts = parameter_count(Posterior(shape, 100)), parameter_count(Generator(shape, 100))
    assert counts == PUBLISHED[side][:2]
    if side < 128:  # the 128 pixel energy takes half a gigabyte: counted by its layer table
        assert parameter_count(Energy(shape)) == PUBLISHED[side][2]
    else:
        widths = [64, 128, 256, 512, 1024]
        count, channels = 0, 3
        for w in widths:
            count += 9 * channels * w + w + 16 * w * w + w
            channels = w
        top = 2048
        count += 9 * 1024 * top + top + 16 * top * top + top + top * top + top + top + 1
        assert count == PUBLISHED[side][2]


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32), (1, 16, 16)])
def test_a20_shapes_and_range(shape):
    model = BiDVL.for_images(shape, latent_dim=5, width=4)
    v = model.sample(3)
    assert v.shape == (3, *shape)
    assert v.abs().max() <= 1
    assert model.energy(v).shape == (3,)
    assert model.posterior(v).sample().shape == (3, 5)
    assert model.reconstruct(v).shape == v.shape


def test_a21_optimizer_settings():
    model = small()
    upper, lower = model.optimizers(Training())
    assert upper.param_groups[0]["betas"] == lower.param_groups[0]["betas"] == (0, 0.9)
    assert (upper.param_groups[0]["lr"], lower.param_groups[0]["lr"]) == (1e-4, 3e-4)
    assert upper.param_groups[0]["weight_decay"] == 0
    assert lower.param_groups[0]["weight_decay"] == 1e-4
    rates = []
    model.fit(
        images(20),
        num_steps=5,
        batch_size=10,
        optimizers=(upper, lower),
        callbacks=[lambda step: rates.append(upper.param_groups[0]["lr"])],
    )
    # two batches an epoch; the rate after step t is the one of step t + 1
    expected = [1e-4 * 0.998 ** ((t + 1) // 2) for t in range(5)]
    assert rates == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("variant", ["complete", "without"])
@pytest.mark.parametrize("solver", ["implicit", "unrolled"])
def test_solvers_of_second_order_run_where_the_gradient_is_true(variant, solver):
    model = small(variant=variant)
    made = batch(model)
    optimizer = torch.optim.Adam(model.lower.parameters(), 1e-3)
    chosen = Implicit() if solver == "implicit" else Unrolled(2)
    answer = chosen.hypergradient(model, made, [made], lower_optimizer=optimizer, throw=False)
    assert all(g.isfinite().all() for g in answer.grad.values())
    assert answer.stats.response_norm > 0


def smooth(module):
    """The module with SiLU in place of its kinked activations: finite differences need it."""
    for name, child in module.named_children():
        if isinstance(child, (nn.ReLU, nn.LeakyReLU)):
            setattr(module, name, nn.SiLU())
        smooth(child)


@pytest.mark.parametrize("variant", ["complete", "without"])
def test_unrolled_bidvl_agrees_with_finite_differences(variant):
    model = small(variant=variant, ratio=0.5, ratio_bias="sigmoid")
    smooth(model)
    if variant == "complete":  # the partial derivative, not a hypergradient: nothing to difference
        model.upper.pop("posterior")
    made = batch(model)
    optimizer = torch.optim.SGD(model.lower.parameters(), 0.05, momentum=0.5)
    check = check_hypergradient(
        model,
        Unrolled(3),
        made,
        [made],
        lower_optimizer=optimizer,
        num_directions=4,
        tolerance=1e-7,
    )
    assert check.passed, check


@pytest.mark.parametrize("solver", [Implicit(), Unrolled(1)])
def test_offset_refuses_solvers_that_need_a_true_gradient(solver):
    model = small()
    made = batch(model)
    with pytest.raises(ValueError, match=r"variant='offset'.*Eq. 13.*complete"):
        solver.hypergradient(model, made, [made])

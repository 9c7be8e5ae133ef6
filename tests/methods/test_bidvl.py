"""BiDVL's losses, networks and optimizers on small networks (A13-A21)."""

import copy

import pytest
import torch
from torch import nn
from torch.distributions import Normal, kl_divergence

from bilevel import Alternating, Implicit, Oracles, Unrolled, check_hypergradient, train
from bilevel.methods import BiDVL, Training
from bilevel.methods.bidvl import Batch
from bilevel.methods.networks.convolutional import Energy
from bilevel.methods.networks.spectral_norm import SpectralNorm

SHAPE = (1, 8, 8)
VARIANTS = ["offset", "complete", "without"]
FAMILIES = ["conv", "resnet"]


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


def twice(made):
    """The batch with every row in it twice."""
    return Batch(*(None if part is None else torch.cat([part, part]) for part in made))


def rest_power_iterations(model):
    for module in model.modules():
        if isinstance(module, SpectralNorm):
            module.eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_a13_upper_step_moves_the_energy_only(family):
    model = small(family=family)
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


@pytest.mark.parametrize("family", FAMILIES)
def test_a14_latent_reconstruction_reaches_the_posterior_in_complete_only(family):
    for variant, reaches in (("offset", False), ("complete", True)):
        # without the VAE, Q learns from this term alone
        model = small(family=family, variant=variant, ratio=0.0)
        grads = lower_gradient(model)
        for head in ("posterior.mean", "posterior.log_variance", "posterior.trunk"):
            assert (size(grads, head) > 0) == reaches, (variant, head)
        assert size(grads, "generator") > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_a14_latent_reconstruction_moves_the_generator(family):
    with_term = small(family=family, latent_weight=1.0)
    without = small(family=family, variant="without")
    difference = size(lower_gradient(with_term), "generator") - size(
        lower_gradient(without), "generator"
    )
    assert abs(difference) > 1e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_a15_lower_step_leaves_the_energy_alone(family):
    model = small(family=family).train()
    rest_power_iterations(model)
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
    again = Alternating().hypergradient(model, made, [made]).grad
    torch.testing.assert_close(again, expected, rtol=1e-12, atol=1e-12)


def test_a16_coefficients_of_the_lower_loss():
    model = small(ratio=0.3)
    made = batch(model)
    loss, logs = model.lower_loss(made)
    mean, log_variance = model.lower["posterior"](made.visible)
    prior = kl_divergence(
        Normal(mean, (log_variance / 2).exp()),
        Normal(torch.zeros_like(mean), torch.ones_like(mean)),
    )
    h = mean + (log_variance / 2).exp() * made.noise
    reconstruction = (model.latent_model.generate(h) - made.visible).pow(2).sum((1, 2, 3)).mean()
    generated = model.latent_model.generate(made.latent)
    recovered = model.lower["posterior"](generated)[0]
    latent = (recovered - made.latent).pow(2).sum(1).mean() / 3
    energy = model.latent_model.free_energy(generated).mean()
    expected = energy + latent + 0.3 * (reconstruction + prior.sum(1).mean())
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(logs["reconstruction"], reconstruction, rtol=1e-12, atol=1e-12)


def test_the_residual_family_has_the_losses_of_its_scripts():
    model = small(family="resnet")
    made = batch(model)
    assert not made.fresh_latent.equal(made.latent)

    upper, _ = model.upper_loss(made)
    real, fake = (
        model.latent_model.free_energy(made.visible),
        model.latent_model.free_energy(model.latent_model.generate(made.latent)),
    )
    hinge = (1 + real).clamp(min=0).mean() + (1 - fake).clamp(min=0).mean()
    torch.testing.assert_close(upper, hinge, rtol=1e-12, atol=1e-12)

    lower, logs = model.lower_loss(made)
    generated = model.latent_model.generate(made.fresh_latent)
    latent = (model.latent_model.encode(generated)[0] - made.fresh_latent).pow(2).sum(1).mean()
    mean, log_variance = model.latent_model.encode(made.visible)
    prior = 0.5 * (mean.pow(2) + log_variance.exp() - 1 - log_variance).sum(1).mean()
    vae = 0.05 * (logs["reconstruction"] + prior)
    expected = model.latent_model.free_energy(generated).mean() + 1e-4 * latent + vae
    torch.testing.assert_close(lower, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a16_duplicating_the_batch_changes_no_loss(variant, family):
    model = small(family=family, variant=variant, ratio_bias="sigmoid")
    made = batch(model)
    for loss in (model.upper_loss, model.lower_loss):
        torch.testing.assert_close(loss(made)[0], loss(twice(made))[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_sharing_the_samples_changes_no_loss_and_no_gradient(variant):
    model = small(variant=variant).train()
    rest_power_iterations(model)
    made = batch(model)
    shared = model.share(made)
    assert shared.generated.equal(model.latent_model.generate(made.latent))
    for level, loss in (("upper", model.upper_loss), ("lower", model.lower_loss)):
        variables = list(model.variables(level).values())
        values = [loss(made)[0], loss(shared)[0]]
        torch.testing.assert_close(*values, rtol=1e-12, atol=0)
        each = [torch.autograd.grad(v, variables, retain_graph=True) for v in values]
        for alone, together in zip(*each, strict=True):
            torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)


def test_a_fresh_latent_leaves_nothing_to_share():
    model = small(fresh_latent=True)
    made = batch(model)
    assert model.share(made) is made
    assert not model.lower_loss(made)[0].equal(
        model.lower_loss(made._replace(fresh_latent=None))[0]
    )


@pytest.mark.parametrize(("fresh", "generations"), [(False, 2), (True, 3)])
def test_a_turn_computes_no_forward_pass_twice(fresh, generations):
    model = small(fresh_latent=fresh).train()
    calls = dict.fromkeys(("energy", "posterior", "generator"), 0)

    def count(name):
        def hook(*_):
            calls[name] += 1

        (model.upper if name == "energy" else model.lower)[name].register_forward_hook(hook)

    for name in calls:
        count(name)
    upper, lower = model.optimizers(Training())
    settings = {"upper_optimizer": upper, "lower_optimizer": lower, "order": "upper_first"}
    steps = train(model, images(), num_steps=2, **settings)
    next(steps)  # the first turn was rehearsed
    before = dict(calls)
    next(steps)
    new = {name: calls[name] - before[name] for name in calls}
    assert new == {"energy": 2, "posterior": 2, "generator": generations}


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_stay_in_float32_under_autocast(family):
    model = BiDVL.for_images(SHAPE, latent_dim=3, width=8, family=family, ratio_bias="sigmoid")
    rest_power_iterations(model)
    made = model.draw(images(20).float(), torch.Generator().manual_seed(1))
    for level, loss in (("upper", model.upper_loss), ("lower", model.lower_loss)):
        exact = loss(made)[0]
        with torch.autocast("cpu", torch.bfloat16):
            value, logs = loss(made)
        assert {value.dtype, *(term.dtype for term in logs.values())} == {torch.float32}
        torch.testing.assert_close(value, exact, rtol=0.02, atol=0.002)  # bfloat16: 8 bits
        variables = list(model.variables(level).values())
        assert all(g.isfinite().all() for g in torch.autograd.grad(value, variables))


def test_a17_complete_latent_term_has_its_variance_part():
    model = small(variant="complete")
    made = batch(model, 2)
    generated = model.latent_model.generate(made.latent)
    mean, log_variance = model.lower["posterior"](generated)
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
    mean, log_variance = model.lower["posterior"](model.latent_model.generate(made.latent))
    prior = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1).mean()
    difference = model.upper_loss(made)[0] - plain.upper_loss(made)[0]
    torch.testing.assert_close(difference, prior / 3, rtol=1e-12, atol=1e-12)
    assert not any(name.startswith("generator") for name in upper_gradient(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_a18_without_ratio_the_posterior_of_offset_learns_nothing(family):
    assert size(lower_gradient(small(family=family, ratio=0.0)), "posterior") == 0


def test_a18_without_never_encodes_generated_samples():
    model = small(variant="without")
    calls = []
    model.lower["posterior"].register_forward_hook(lambda *_: calls.append(1))
    model.lower_loss(batch(model))
    assert len(calls) == 1


def test_a19_energy_is_positive_and_near_log_2_at_first():
    torch.manual_seed(0)
    with torch.no_grad():
        values = Energy((3, 32, 32))(torch.rand(4, 3, 32, 32) * 2 - 1)
    assert values.min() >= 0
    assert values.mean() == pytest.approx(0.69, abs=0.02)


@pytest.mark.parametrize(("family", "layers"), [("conv", 10), ("resnet", 11)])
def test_a19_training_normalises_every_layer_of_the_energy(family, layers):
    model = BiDVL.for_images((3, 32, 32), width=16, family=family)
    normed = [m for m in model.upper["energy"].modules() if hasattr(m, "parametrizations")]
    assert len(normed) == layers
    for layer in normed:
        # an iteration each; the published 512 channels need 50, close singular values more
        for _ in range(500):
            weight = layer.weight.detach()
        norm = torch.linalg.matrix_norm(weight.flatten(1), 2)
        assert norm == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32), (1, 16, 16)])
def test_a20_shapes_and_range(shape, family):
    model = BiDVL.for_images(shape, latent_dim=5, width=4, family=family)
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


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("variant", ["complete", "without"])
@pytest.mark.parametrize("solver", ["implicit", "unrolled"])
def test_solvers_of_second_order_run_where_the_gradient_is_true(variant, solver, family):
    model = small(variant=variant, family=family)
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


@pytest.mark.parametrize(
    ("variant", "family"), [("complete", "conv"), ("without", "conv"), ("without", "resnet")]
)
def test_unrolled_bidvl_agrees_with_finite_differences(variant, family):
    options = {"variant": variant, "family": family, "upper": "difference"}
    model = small(**options, ratio=0.5, ratio_bias="sigmoid")
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

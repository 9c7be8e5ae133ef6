"""The learning problems of BiSM and VaGES on deep energies.

Numbers in brackets are those of the assertions in the papers' fact sheet, here for a deep energy.
"""

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torchopt
from torch import Tensor

from bilevel import Alternating, Batches, Unrolled, check_hypergradient, train
from bilevel.methods.bism import BiSM
from bilevel.methods.networks.deep import DeepEnergy
from bilevel.methods.objectives.score import MultiScale
from bilevel.methods.score_matching import ScoreMatching
from bilevel.methods.vages import VaGES
from tests.devices import DEVICES, generator
from tests.methods.deep_cases import SHAPE, SMALL, TIGHT, images, normal, small

METHODS = [BiSM, VaGES]


# ---------------------------------------------------------------------- the upper level


def assert_slopes(loss: Any, parameters: dict[str, Tensor], grads: Any) -> None:
    """Every parameter's gradient along a random direction against central differences.

    Steps are short, because the losses have kinks where an ELU's argument changes sign; a loss of 50 is
    then rounded by 1e-9 of the slope.
    """
    h, largest = 1e-5, 0.0
    for number, (name, p) in enumerate(parameters.items()):
        direction, values = normal(*p.shape, seed=number), []
        direction /= direction.norm()
        for step in (h, -h):
            with torch.no_grad():
                p.add_(direction, alpha=step)
                values.append(loss())
                p.sub_(direction, alpha=step)
        slope, along = (values[0] - values[1]) / (2 * h), (grads[name] * direction).sum()
        largest = max(largest, float(along.abs()))
        torch.testing.assert_close(along, slope, rtol=1e-6, atol=1e-8, msg=f"{name}: {along}")
    assert largest > 0.1


def test_gradient_of_bism_equals_finite_differences() -> None:
    made = small(BiSM, gain=2.0)
    batch = made.draw(images(), generator())
    names, leaves = zip(*made.named_parameters(), strict=True)
    grads = torch.autograd.grad(made.upper_loss(batch), leaves)
    assert all(g.abs().max() > 0 for g in grads)  # both levels, the head's every weight
    assert_slopes(
        lambda: made.upper_loss(batch),
        dict(made.named_parameters()),
        dict(zip(names, grads, strict=True)),
    )


def test_unrolled_hypergradient_of_bism_equals_finite_differences() -> None:
    """At a batch without a kink (see `assert_slopes`) within the steps of the differences."""
    made = small(BiSM, blocks=1)
    batch = made.draw(images(2), generator(1))
    lower = [made.draw_lower(batch, generator(t), t) for t in (1, 2)]
    check = check_hypergradient(made, Unrolled(2, torchopt.sgd(1e-3)), batch, lower, tolerance=1e-6)
    assert check.passed, check


@pytest.mark.parametrize("latent_steps", [0, 3])
def test_vages_is_the_sum_and_the_covariance_written_out(latent_steps: int) -> None:
    """One latent at a time, with the energy evaluated anew for each."""
    made = small(VaGES, num_samples=3, latent_steps=latent_steps, latent_noise=0.1)
    batch = made.draw(images(), generator())
    points, energy = batch.points, made.upper["model"]
    h = made.samples(points.visible, batch.latent, batch.langevin).latent
    parameters = list(energy.parameters())

    def single(i: int) -> tuple[Tensor, Tensor]:
        v = points.visible.clone().requires_grad_()
        density = -energy(v, h[:, i])
        return density, torch.autograd.grad(density.sum(), v, create_graph=True)[0]

    drawn = [single(i) for i in range(9)]
    s = torch.stack([g for _, g in drawn[:3]]).mean(0).detach()
    z = points.gain * (points.gain * s - points.target)
    slope = torch.stack([g for _, g in drawn[3:6]]).mean(0)
    surrogate = (z * slope).flatten(1).sum(1)
    along = torch.stack([(z * g.detach()).flatten(1).sum(1) for _, g in drawn[6:]])
    for i in range(3):
        surrogate = surrogate + 0.5 * (along[i] - along.mean(0)) * drawn[6 + i][0]
    truth = torch.autograd.grad(surrogate.mean(), parameters)
    answer = Alternating().hypergradient(made, batch).grad
    for (name, _), expected in zip(energy.named_parameters(), truth, strict=True):
        assert expected.abs().max() > 0
        torch.testing.assert_close(answer[f"model.{name}"], expected, rtol=1e-10, atol=1e-12)


def test_gradient_of_vages_equals_finite_differences_of_its_surrogate() -> None:
    """z, the latents and their directions are constants; the surrogate is a function of theta."""
    made = small(VaGES, gain=2.0)
    batch = made.draw(images(), generator())
    v, energy = batch.points.visible, made.upper["model"]
    h = made.samples(v, batch.latent, batch.langevin).latent

    def parts() -> tuple[Tensor, Tensor]:
        leaf = v.clone().requires_grad_()
        with torch.enable_grad():
            density = -energy.coupled(energy.features(leaf)[:, None], h)
            scores = [
                torch.autograd.grad(density[:, i].sum(), leaf, retain_graph=True)[0]
                for i in range(6)
            ]
        return density.detach(), torch.stack(scores, 1)

    _, g = parts()
    gain = batch.points.gain
    z = (gain * (gain * g[:, :2].mean(1) - batch.points.target))[:, None]
    along = (z * g[:, 4:]).flatten(2).sum(2)
    centered = along - along.mean(1, keepdim=True)  # times L / (L - 1), over L: one

    def surrogate() -> Tensor:
        density, g = parts()
        slope = (z * g[:, 2:4]).flatten(2).sum(2).mean(1)
        return (slope + (centered * density[:, 4:]).sum(1)).mean()

    grads = Alternating().hypergradient(made, batch).grad
    parameters = {f"model.{name}": p for name, p in energy.named_parameters()}
    assert_slopes(surrogate, parameters, grads)


def test_losses_are_those_of_the_papers_in_their_units() -> None:
    """Images x = (v + 1) / 2 and half the noise: 1/16 of the upper loss, 1/2 of the lower one."""
    made = small(BiSM, sigma=0.2, sigma_range=(0.1, 2.4), grid="linear")
    batch = made.draw(images(), generator())
    noised, levels = (
        batch.points.visible,
        torch.linspace(0.05, 1.2, 6, dtype=torch.float64)[:, None],
    )
    epsilon = ((noised - images()) / 2).flatten(1) / levels
    h = made.encoder.draws(noised, batch.latent).latent.detach()
    x = ((noised + 1) / 2).detach().requires_grad_()
    log_ratio = -made.joint_energy(2 * x - 1, h) - made.encoder.log_prob(2 * x - 1, h)
    (s,) = torch.autograd.grad(log_ratio.sum(), x)
    published = 0.5 * (s.flatten(1) / levels + epsilon / 0.1**2).square().sum(1).mean()
    torch.testing.assert_close(16 * made.upper_loss(batch), published, **TIGHT)
    lower = made.draw_lower(batch, generator(), 0)
    assert lower.gain is not None
    torch.testing.assert_close(2 * lower.gain.flatten(), 1 / levels.flatten(), **TIGHT)


def test_features_of_the_visible_are_computed_once() -> None:
    """Whatever the number of latents, of groups and of Langevin steps on them."""
    calls: list[int] = []
    for made in (small(BiSM), small(VaGES, num_samples=4, latent_steps=3)):
        made.upper["model"].trunk.register_forward_pre_hook(lambda _, v: calls.append(len(v[0])))
        batch = made.draw(images(), generator())
        made.upper_loss(batch)
        assert calls == [6]
        calls.clear()
        made.lower_loss(made.draw_lower(batch, generator(), 0))
        assert calls == [6]
        calls.clear()
        made.energy(images())
        assert calls == [6]
        calls.clear()


def test_lower_gradient_never_enters_the_residual_network() -> None:
    made = small(BiSM)
    lower = made.draw_lower(made.draw(images(), generator()), generator(), 0)
    loss = made.lower_loss(lower)
    frozen = copy.deepcopy(made)
    for p in frozen.upper["model"].trunk.parameters():
        p.requires_grad_(False)
    same = frozen.lower_loss(lower)
    for one, other in zip(
        torch.autograd.grad(loss, list(made.lower.parameters())),
        torch.autograd.grad(same, list(frozen.lower.parameters())),
        strict=True,
    ):
        torch.testing.assert_close(one, other, **TIGHT)


# ---------------------------------------------------------------------- the lower level


def test_fisher_divergence_is_the_definition() -> None:
    """With log q from `torch.distributions`, differentiated at the draw, over sigma_i."""
    made = small(BiSM)
    lower = made.draw_lower(made.draw(images(), generator()), generator(1), 0)
    mean, log_variance = made.encoder.moments(lower.visible)
    h = (mean + (log_variance / 2).exp() * lower.latent).detach().requires_grad_()
    q = torch.distributions.Normal(mean, (log_variance / 2).exp())
    total = q.log_prob(h).sum(1) + made.joint_energy(lower.visible, h)
    (slope,) = torch.autograd.grad(total.sum(), h)
    levels = MultiScale(1.0, (0.5, 2.0)).levels(lower.visible).flatten()
    expected = (0.5 * slope.square().sum(1) / levels).mean()
    torch.testing.assert_close(made.lower_loss(lower), expected, **TIGHT)


@pytest.mark.parametrize("method", METHODS)
def test_lower_gradient_equals_finite_differences(method: type[Any]) -> None:
    made = small(method, gain=2.0)
    lower = made.draw_lower(made.draw(images(), generator()), generator(1), 0)
    parameters = dict(made.lower.named_parameters())
    grads = torch.autograd.grad(made.lower_loss(lower), list(parameters.values()))
    assert_slopes(
        lambda: made.lower_loss(lower), parameters, dict(zip(parameters, grads, strict=True))
    )


def test_10_lower_level_is_untouched_by_the_upper_step() -> None:
    after = []
    for solver in (Alternating(), Unrolled(2)):
        made = small(BiSM)
        upper = torch.optim.Adam(made.upper.parameters())
        lower = torch.optim.Adam(made.lower.parameters())
        list(
            train(
                made,
                Batches(images(8), 8, seed=0),
                upper_optimizer=upper,
                lower_optimizer=lower,
                num_steps=1,
                solver=solver,
                lower_steps=2,
                order="lower_first",
            )
        )
        after.append((made.lower.state_dict(), lower.state_dict()["state"]))
    torch.testing.assert_close(after[1], after[0], rtol=0, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_11_lower_steps_share_the_images_and_have_their_own_noise(
    method: type[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    original = method.lower_loss

    def spy(self: Any, batch: Any) -> Any:
        seen.append(batch)
        return original(self, batch)

    monkeypatch.setattr(method, "lower_loss", spy)
    made = small(method, sigma_range=(1e-3, 1e-3))
    made.fit(images(8), num_steps=1, batch_size=4)
    assert len(seen) == 2 + 5  # the rehearsal, twice, and K of `training_defaults`
    for one, other in itertools.combinations(seen[2:], 2):
        assert not torch.equal(one.visible, other.visible)
        assert (one.visible - other.visible).abs().max() < 0.02
        assert not torch.equal(one.latent, other.latent)


def test_7_every_parameter_of_a_deep_energy_moves() -> None:
    """Unlike a machine's hidden biases, none of them needs the response."""
    for method in METHODS:
        made = small(method)
        before = {name: p.clone() for name, p in made.named_parameters()}
        made.fit(images(16), num_steps=2, batch_size=8)
        for name, p in made.named_parameters():
            assert not torch.equal(p, before[name]), name


# ---------------------------------------------------------------------- the learners


@pytest.mark.parametrize("method", [*METHODS, ScoreMatching])
@pytest.mark.parametrize("device", DEVICES)
def test_fit_save_load_resume(method: type[Any], device: str, tmp_path: Path) -> None:
    def make() -> Any:
        options = {name: x for name, x in SMALL.items() if name in recipe}
        return method.for_images(SHAPE, grid="linear", sigma_range=(0.1, 2.4), **options).to(device)

    recipe = {"width", "langevin"} | ({"latent_dim"} if method is not ScoreMatching else set())
    whole, first, again = make(), make(), make()
    v, settings = images(16).float(), {"num_steps": 4, "batch_size": 8}
    whole.fit(v, **settings)
    first.fit(v, **settings, run=tmp_path / "run", callbacks=[lambda step: step.number == 2])
    again.fit(v, **settings, run=tmp_path / "run", resume=True)
    torch.testing.assert_close(again.state_dict(), whole.state_dict(), rtol=0, atol=0)
    whole.save(tmp_path / "model")
    loaded = method.load(tmp_path / "model").to(device)
    assert loaded.langevin == (2, 4, 2)
    torch.testing.assert_close(loaded.state_dict(), whole.state_dict(), rtol=0, atol=0)
    assert torch.equal(loaded.energy(v), whole.energy(v))
    samples = [m.sample(3, torch.Generator(device).manual_seed(0)) for m in (whole, loaded)]
    assert torch.equal(*samples)
    assert samples[0].shape == (3, *SHAPE)
    assert samples[0].abs().max() <= 1


@pytest.mark.parametrize("method", METHODS)
def test_reconstructions_are_of_the_latent_alone(method: type[Any]) -> None:
    made, v = small(method), images()
    assert torch.equal(made.reconstruct(v), made.reconstruct(v))
    with torch.no_grad():
        for head in (made.encoder.network.mean, made.encoder.network.log_std):
            head.weight.zero_()  # every image has the same latent now
    assert torch.equal(made.reconstruct(v), made.reconstruct(-v))


def test_energy_of_the_baseline_has_no_latent() -> None:
    made = small(ScoreMatching, gain=2.0)
    v = images()
    torch.testing.assert_close(made.energy(v), made.upper["model"](v).detach(), **TIGHT)
    batch = made.draw(v, generator())
    parameters = dict(made.upper.named_parameters())
    grads = torch.autograd.grad(made.upper_loss(batch), list(parameters.values()))
    assert_slopes(
        lambda: made.upper_loss(batch), parameters, dict(zip(parameters, grads, strict=True))
    )
    for refused in (made.posterior, made.reconstruct):
        with pytest.raises(
            NotImplementedError, match="`DeepEnergy` is an energy of visibles alone"
        ):
            refused(v)


@pytest.mark.slow
@pytest.mark.usefixtures("traced_only")
def test_traced_steps_equal_eager_ones() -> None:
    made = [small(VaGES, blocks=1, latent_steps=1) for _ in range(2)]
    for one, compiled in zip(made, (False, True), strict=True):
        one.fit(images(16), num_steps=2, batch_size=8, lower_steps=1, compile=compiled)
    torch.testing.assert_close(made[1].state_dict(), made[0].state_dict(), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("method", METHODS)
def test_losses_are_functions_of_the_batch(method: type[Any]) -> None:
    made = small(method)
    batches = [made.draw(images(), generator(seed)) for seed in (0, 0, 1)]
    values = [made.upper_loss(batch) for batch in batches]
    assert torch.equal(values[0], values[1])
    assert not torch.equal(values[0], values[2])
    with torch.no_grad():
        assert torch.equal(made.upper_loss(batches[0]), values[0])


def test_refusals() -> None:
    with pytest.raises(ValueError, match="square images of at least 8 pixels"):
        BiSM.for_images((1, 7, 7))
    with pytest.raises(ValueError, match="square images"):
        VaGES.for_images((1, 28, 32))
    with pytest.raises(ValueError, match="`langevin` is three numbers of steps"):
        BiSM.for_images(SHAPE, width=2, langevin=(1, 2))
    with pytest.raises(ValueError, match="`grid` cannot be 'lineal'; did you mean `linear`"):
        BiSM.for_images(SHAPE, width=2, grid="lineal")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`blocks`"):
        DeepEnergy(SHAPE, 2, 0)
    with pytest.raises(ValueError, match="`n` must be positive"):
        small(BiSM).sample(0)

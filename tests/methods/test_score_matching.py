"""Score matching: the losses against closed forms, quadrature and each other, and their learner.

Numbers in brackets are those of the assertions in BiSM's fact sheet.
"""

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bilevel import Implicit
from bilevel.methods.data.densities import density
from bilevel.methods.models import RBM, GaussianDBM, GaussianRBM
from bilevel.methods.objectives.score import (
    Denoising,
    Exact,
    MultiScale,
    Noised,
    Probed,
    Sliced,
    residual_slope,
    score,
    score_objective,
)
from bilevel.methods.score_matching import ScoreMatching
from tests.devices import DEVICES

OBJECTIVES = ("denoising", "sliced", "multiscale", "exact")
TIGHT: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def machine(seed: int = 0) -> GaussianRBM:
    """A Gaussian RBM far from its initial weights, in float64."""
    model = GaussianRBM(2, 4).double()
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(0.7 * normal(*p.shape, seed=100 * seed + i))
    return model


def learner(objective: Any = "denoising", **options: Any) -> ScoreMatching:
    return ScoreMatching(machine(), objective=objective, **options)


def closed_score(model: GaussianRBM, v: Tensor) -> Tensor:
    p = (model.latent_bias + v @ model.weight).sigmoid()
    return -(v - model.visible_bias) * (-2 * model.log_scale).exp() + p @ model.weight.mT


def closed_trace(model: GaussianRBM, v: Tensor) -> Tensor:
    p = (model.latent_bias + v @ model.weight).sigmoid()
    return (p * (1 - p)) @ model.weight.square().sum(0) - (-2 * model.log_scale).exp().sum()


def test_score_of_the_free_energy_is_the_closed_form() -> None:
    model, v = machine(), normal(7, 2, seed=1)
    _, s = score(lambda x: -model.free_energy(x), v)
    torch.testing.assert_close(s, closed_score(model, v), **TIGHT)


def test_exact_objective_is_the_closed_form() -> None:
    model, v = machine(), normal(7, 2, seed=1)
    loss = Exact().loss(lambda x: -model.free_energy(x), Probed(v, torch.zeros_like(v)))
    s = closed_score(model, v)
    torch.testing.assert_close(loss, (0.5 * s.square().sum(1) + closed_trace(model, v)).mean())


def test_sliced_objective_averaged_over_all_signs_is_the_exact_one() -> None:
    """E[u^T J u] = tr J: the off-diagonal terms of the 2^d sign vectors cancel."""
    model, v = machine(), normal(7, 2, seed=1)

    def log_density(x: Tensor) -> Tensor:
        return -model.free_energy(x)

    losses = [
        Sliced().loss(log_density, Probed(v, torch.tensor(signs).double().expand_as(v)))
        for signs in itertools.product((-1.0, 1.0), repeat=2)
    ]
    exact = Exact().loss(log_density, Probed(v, torch.zeros_like(v)))
    torch.testing.assert_close(torch.stack(losses).mean(), exact, **TIGHT)


def test_denoising_matches_the_score_of_the_noised_data() -> None:
    """Vincent's theorem: two models' losses differ as their distances from the noised data's score do.

    Expectations over the noise by Gauss-Hermite quadrature around each datum.
    """
    data, sigma = 0.5 * normal(3, 2, seed=2), 0.4
    nodes, weights = np.polynomial.hermite_e.hermegauss(50)
    pairs = torch.tensor(list(itertools.product(nodes, repeat=2)))
    weight = torch.tensor([a * b for a, b in itertools.product(weights, repeat=2)])
    weight = weight.repeat(len(data)) / weight.sum() / len(data)
    v = (data[:, None] + sigma * pairs).reshape(-1, 2)
    noise = pairs.repeat(len(data), 1)
    distances = (v[:, None] - data).square().sum(2)
    posterior = (-distances / (2 * sigma**2)).softmax(1)
    true = (posterior @ data - v) / sigma**2

    def losses(model: GaussianRBM) -> tuple[Tensor, Tensor]:
        s = closed_score(model, v)
        denoising = 0.5 * (s + noise / sigma).square().sum(1)
        return weight @ denoising, weight @ (0.5 * (s - true).square().sum(1))

    (one, far), (other, near) = losses(machine(1)), losses(machine(2))
    assert (one - other).abs() > 0.1
    # 50 nodes integrate the logistic functions within to about 1e-10
    torch.testing.assert_close(one - other, far - near, rtol=1e-9, atol=1e-9)
    points = Noised(v, -noise / sigma, None)
    each = [
        Denoising(sigma).loss(lambda x: -machine(1).free_energy(x), Noised(p[None], t[None], None))
        for p, t in zip(points.visible[:5], points.target[:5], strict=True)
    ]
    expected = 0.5 * (closed_score(machine(1), v[:5]) + noise[:5] / sigma).square().sum(1)
    torch.testing.assert_close(torch.stack(each), expected, **TIGHT)


def test_multiscale_grid_is_geometric_and_deterministic() -> None:
    objective = MultiScale(0.1, (0.05, 0.8))
    levels = objective.levels(normal(5, 2))
    expected = torch.tensor([0.05, 0.1, 0.2, 0.4, 0.8], dtype=torch.float64)
    torch.testing.assert_close(levels[:, 0], expected, **TIGHT)
    points = objective.draw(normal(5, 2), torch.Generator())
    again = objective.draw(normal(5, 2), torch.Generator().manual_seed(3))
    assert torch.equal(points.gain, again.gain)
    assert not torch.equal(points.visible, again.visible)
    images = objective.draw(torch.zeros(5, 3, 4, 4), torch.Generator())
    assert images.gain.shape == (5, 1, 1, 1)


def test_multiscale_grid_may_be_linear() -> None:
    objective = MultiScale(0.1, (0.05, 1.2), "linear")
    levels = objective.levels(normal(6, 3, 2, 2))
    expected = torch.tensor([0.05, 0.28, 0.51, 0.74, 0.97, 1.2], dtype=torch.float64)
    torch.testing.assert_close(levels.flatten(), expected, **TIGHT)
    points = objective.draw(torch.zeros(6, 3), torch.Generator())
    torch.testing.assert_close(points.gain.flatten().double(), 1 / expected, rtol=1e-6, atol=0)
    assert score_objective("multiscale", 0.1, (0.05, 1.2), "linear") == objective


def test_multiscale_at_one_level_is_denoising_over_its_variance() -> None:
    model, v, sigma = machine(), normal(6, 2, seed=3), 0.3
    one = Denoising(sigma).draw(v, torch.Generator().manual_seed(0))
    many = MultiScale(sigma, (sigma, sigma)).draw(v, torch.Generator().manual_seed(0))

    def log_density(x: Tensor) -> Tensor:
        return -model.free_energy(x)

    torch.testing.assert_close(
        MultiScale(sigma).loss(log_density, many) * sigma**2,
        Denoising(sigma).loss(log_density, one),
        **TIGHT,
    )


@pytest.mark.parametrize("objective", [Denoising(0.2), MultiScale(0.2, (0.1, 0.5))])
def test_residual_slope_is_the_derivative_of_the_loss_in_the_score(objective: Any) -> None:
    points = objective.draw(normal(4, 2), torch.Generator())
    s = normal(4, 2, seed=5).requires_grad_()
    gain = 1 if points.gain is None else points.gain
    loss = 0.5 * (gain * s - points.target).square().sum()
    (slope,) = torch.autograd.grad(loss, s)
    torch.testing.assert_close(residual_slope(s.detach(), points), slope, **TIGHT)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_gradient_equals_finite_differences(objective: str) -> None:
    made = learner(objective, sigma=0.3)
    batch = made.draw(normal(6, 2, seed=4), torch.Generator().manual_seed(1))
    parameters = list(made.upper.parameters())
    grads = torch.autograd.grad(made.upper_loss(batch), parameters)
    h = 1e-3
    for p, g in zip(parameters, grads, strict=True):
        for i in range(p.numel()):
            values = []
            for step in (-2, -1, 1, 2):
                with torch.no_grad():
                    p.view(-1)[i] += step * h
                    values.append(made.upper_loss(batch))  # type: ignore[arg-type]
                    p.view(-1)[i] -= step * h
            slope = (values[0] - 8 * values[1] + 8 * values[2] - values[3]) / (12 * h)
            # fourth order: h^4 times a fifth derivative of order 1000
            torch.testing.assert_close(g.view(-1)[i], slope, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_losses_are_functions_of_the_batch(objective: str) -> None:
    made, data = learner(objective), normal(6, 2)
    batches = [made.draw(data, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    values = [made.upper_loss(batch) for batch in batches]
    assert torch.equal(values[0], values[1])
    assert objective == "exact" or not torch.equal(values[0], values[2])
    with torch.no_grad():
        assert torch.equal(made.upper_loss(batches[0]), values[0])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_fit_save_load(objective: Any, device: str, tmp_path: Path) -> None:
    made = ScoreMatching(GaussianRBM(2, 4), objective=objective, sigma=0.1, sigma_range=(0.1, 0.5))
    made.to(device)
    data = torch.rand(64, 2, generator=torch.Generator().manual_seed(0))
    history = made.fit(data, num_steps=4, batch_size=16, log_every=1)
    assert len(history.records) == 4
    made.save(tmp_path)
    loaded = ScoreMatching.load(tmp_path).to(device)
    assert loaded.objective == made.objective
    assert torch.equal(loaded.energy(data), made.energy(data))
    assert made.sample(3, torch.Generator(device).manual_seed(0)).shape == (3, 2)
    assert made.reconstruct(data).shape == data.shape


def test_resumed_run_equals_the_uninterrupted_one(tmp_path: Path) -> None:
    data = torch.rand(64, 2, generator=torch.Generator().manual_seed(0))
    whole = ScoreMatching(GaussianRBM(2, 4))
    whole.fit(data, num_steps=6, batch_size=16)
    first = ScoreMatching(GaussianRBM(2, 4))
    first.fit(
        data, num_steps=6, batch_size=16, run=tmp_path, callbacks=[lambda step: step.number == 3]
    )
    again = ScoreMatching(GaussianRBM(2, 4))
    again.fit(data, num_steps=6, batch_size=16, run=tmp_path, resume=True)
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_machine_with_two_hidden_layers() -> None:
    made = ScoreMatching(GaussianDBM(2, (3, 2)))
    made.fit(torch.rand(64, 2), num_steps=2, batch_size=16)
    assert made.posterior(torch.rand(3, 2)).mean.shape == (3, 5)
    with pytest.raises(NotImplementedError, match="`ScoreMatching` has no variational posterior"):
        _ = made.encoder


@pytest.mark.slow
def test_likelihood_stays_below_what_is_possible() -> None:
    """[15] At most log 2 for any model; four hidden units reach 0.342 at best (48 restarts)."""
    board = density("checkerboard")
    data = board.sample(60_000, torch.Generator().manual_seed(0))
    test = board.sample(10_000, torch.Generator().manual_seed(1))
    made = ScoreMatching(GaussianRBM(2, 4), objective="sliced")
    made.fit(data, num_steps=3000, upper_lr=1e-2, schedule="cosine")
    with torch.no_grad():
        likelihood = float(made.model.log_likelihood(test).mean())
    assert 0.25 < likelihood < 0.36 < math.log(2), likelihood


@pytest.mark.usefixtures("traced_only")
def test_traced_steps_equal_eager_ones() -> None:
    data = torch.rand(64, 2, generator=torch.Generator().manual_seed(0))
    made = [ScoreMatching(GaussianRBM(2, 4), objective="sliced").double() for _ in range(2)]
    for one, compiled in zip(made, (False, True), strict=True):
        one.fit(data, num_steps=3, batch_size=16, compile=compiled)
    for a, b in zip(made[0].parameters(), made[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="those of a `RBM` are binary; use `GaussianRBM`"):
        ScoreMatching(RBM(4, 2))
    with pytest.raises(ValueError, match="`objective` cannot be 'slice'; did you mean `sliced`"):
        ScoreMatching(GaussianRBM(2, 2), objective="slice")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`sigma` must be positive and finite, got 0"):
        ScoreMatching(GaussianRBM(2, 2), sigma=0)
    with pytest.raises(ValueError, match="`sigma_range` must be positive"):
        score_objective("multiscale", 0.1, (0.0, 1.0))
    with pytest.raises(ValueError, match="a first and a last level"):
        score_objective("multiscale", 0.1, (0.1, 0.2, 0.3))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="`model` must be a module, got `str`"):
        ScoreMatching("energy")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the model must give one number per visible"):
        ScoreMatching(torch.nn.Linear(2, 3)).fit(torch.rand(9, 2), num_steps=1, batch_size=3)
    with pytest.raises(ValueError, match="needs a lower level"):
        learner().float().fit(torch.rand(64, 2), num_steps=1, batch_size=8, solver=Implicit())

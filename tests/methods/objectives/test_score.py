"""Objectives of a score: against closed forms, quadrature and each other.

Numbers in brackets are those of the assertions in BiSM's fact sheet.
"""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bilevel.methods.models import GaussianRBM
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
from tests.methods.objectives.cases import machine, normal

TIGHT: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12}


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

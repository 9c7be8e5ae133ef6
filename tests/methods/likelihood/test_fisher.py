"""The Fisher divergence with a critic, against cases where both scores are known."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bilevel.methods.likelihood import (
    fisher_divergence,
    fisher_divergence_exact,
    fisher_objective,
    rademacher,
)
from bilevel.methods.machines.enumeration import states
from bilevel.methods.models import GaussianRBM
from tests.devices import DEVICES
from tests.problems import generator, normal, spd


def data_score(v: Tensor) -> Tensor:
    """Of N(0, I)."""
    return -v


class Affine:
    """The score of a Gaussian with precision H and mean m: -H (v - m)."""

    def __init__(self, precision: Tensor, mean: Tensor) -> None:
        self.precision, self.mean = precision, mean

    def __call__(self, v: Tensor) -> Tensor:
        return -(v - self.mean) @ self.precision


def sigma_points(d: int) -> Tensor:
    """Rows with mean 0 and covariance I: quadratic expectations under N(0, I) are exact."""
    eye = math.sqrt(d) * torch.eye(d, dtype=torch.float64)
    return torch.cat([eye, -eye])


def objective(critic: Any, score: Any, v: Tensor) -> Tensor:
    """The objective with the exact trace: the mean over all sign vectors."""
    d = v.shape[1]
    signs = 2 * states(d, 0, 2**d, v) - 1
    values = [fisher_objective(critic, score, v, u.expand_as(v)).mean() for u in signs]
    return torch.stack(values).mean()


def test_bism_14_the_best_critic_is_the_difference_of_the_scores() -> None:
    v, score = sigma_points(4), Affine(spd(4, seed=1), normal(4, seed=2))
    truth = fisher_divergence_exact(score, data_score, v)

    def best(v: Tensor) -> Tensor:
        return score(v) - data_score(v)

    assert objective(best, score, v).item() == pytest.approx(truth, abs=1e-12)
    assert truth > 1
    for seed in range(5):
        a, b = normal(4, 4, seed=seed), normal(4, seed=seed + 10)

        def other(v: Tensor, a: Tensor = a, b: Tensor = b) -> Tensor:
            return best(v) + v @ a + b

        missing = 0.5 * (v @ a + b).square().sum(1).mean().item()
        found = objective(other, score, v).item()
        assert found == pytest.approx(truth - missing, abs=1e-10)
        assert found < truth


def test_bism_14_one_sign_vector_is_exact_for_a_diagonal_jacobian_only() -> None:
    v, u = normal(6, 3), rademacher(normal(6, 3), generator(1))
    assert set(u.unique().tolist()) == {-1.0, 1.0}
    for precision, exact in ((torch.diag(normal(3).exp()), True), (spd(3), False)):
        critic = Affine(precision, normal(3))
        trace = fisher_objective(critic, torch.zeros_like, v, u) + 0.5 * critic(v).square().sum(1)
        same = torch.allclose(trace, -precision.trace().expand(6), atol=1e-12)
        assert same == exact


@pytest.mark.parametrize("device", DEVICES)
def test_a_trained_critic_finds_most_of_the_divergence_and_no_more(device: str) -> None:
    score = Affine(spd(2, low=0.4, high=3.0).to(device), normal(2).to(device))
    v = normal(6000, 2, seed=3).to(device)
    truth = fisher_divergence_exact(score, data_score, v)
    g = torch.Generator(device).manual_seed(0)
    found = fisher_divergence(
        score, v, hidden=(32, 32), num_steps=1500, learning_rate=3e-3, generator=g
    )
    assert 0.85 * truth < found.value < truth + 3 * found.standard_error
    assert found.standard_error < 0.15 * truth
    assert 0 < found.step <= 1500


def test_a_perfect_model_has_no_divergence() -> None:
    v = normal(2000, 3)
    found = fisher_divergence(data_score, v, num_steps=200, generator=generator())
    assert abs(found.value) < 3 * found.standard_error + 1e-3
    assert fisher_divergence_exact(data_score, data_score, v) == 0


def test_the_estimate_is_the_seeds_and_leaves_the_rest_alone() -> None:
    v = normal(100, 2).float()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    a, b = (
        fisher_divergence(torch.zeros_like, v, num_steps=5, generator=generator(7)) for _ in "ab"
    )
    assert a == b
    assert torch.equal(torch.get_rng_state(), before)
    layer = nn.Linear(2, 2)
    fisher_divergence(layer, v, num_steps=2, generator=generator())
    assert layer.weight.grad is None


@pytest.mark.parametrize(("eps", "want"), [(0.0, 0.0), (0.2, 4.0e2), (0.6, 4.3e3)])
def test_bism_14_the_perturbed_rbm_is_as_far_from_the_normal_distribution_as_told(
    eps: float, want: float
) -> None:
    model = GaussianRBM(200, 200, learn_scale=False)
    g = generator(1234)
    with torch.no_grad():
        for name in ("weight", "visible_bias", "latent_bias"):
            p = getattr(model, name)
            p.copy_(eps * torch.randn(p.shape, generator=g))

    def score(v: Tensor) -> Tensor:
        v = v.requires_grad_()
        return -torch.autograd.grad(model.free_energy(v).sum(), v)[0]

    found = fisher_divergence_exact(score, data_score, torch.randn(2000, 200, generator=g))
    assert found == pytest.approx(want, rel=0.15, abs=1e-4)


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((9, 2), {}, r"n of at least 10.*got \(9, 2\)"),
        ((20,), {}, r"shape \(n, d\)"),
        ((20, 2), {"num_steps": 0}, "`num_steps` and `batch_size` must be at least 1, got 0"),
        ((20, 2), {"batch_size": 0}, "must be at least 1"),
    ],
)
def test_refusals(shape: tuple[int, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fisher_divergence(data_score, normal(*shape), generator=generator(), **options)

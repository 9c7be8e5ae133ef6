"""Metrics, likelihoods and brackets of what is no number: once perfect scores, now sentences."""

import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bilevel.methods import RBM, AdvIL, BiDVL
from bilevel.methods.data.images import Images
from bilevel.methods.evaluation.evaluate import evaluate, ood_auroc, pca_rmse, reconstruction_rmse
from bilevel.methods.evaluation.features import principal_components
from bilevel.methods.evaluation.fidelity import fid, frechet_distance, kid, neighbourhoods
from bilevel.methods.likelihood import (
    Bracket,
    LogPartition,
    annealed_importance_sampling,
    bracket,
    exact_samples,
    gibbs_samples,
    linear_schedule,
    log_likelihood,
    sampler_lower_bound,
    variational_lower_bound,
)
from tests.small_learners import INF, NAN, SHAPE, WIDTH, bits, pictures, rng

# ---------------------------------------------------------------------- metrics


def spoilt(value: float) -> np.ndarray[Any, np.dtype[np.float64]]:
    rows = np.random.default_rng(0).normal(size=(60, 3))
    rows[7, 2] = value
    return rows


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_no_metric_takes_features_that_are_no_numbers(value: float) -> None:
    """The FID of features with one NaN was 0.0, the best there is: `max(0.0, nan)` is 0.0."""
    good, bad = np.random.default_rng(1).normal(size=(60, 3)), spoilt(value)
    for metric in (fid, frechet_distance, kid, neighbourhoods):
        for pair in ((bad, good), (good, bad)):
            with pytest.raises(ValueError, match=r"in 1 of 60 rows \(index 7\)"):
                metric(*pair)  # type: ignore[operator]


def test_features_too_large_to_be_squared_have_no_distance() -> None:
    rows = np.random.default_rng(0).normal(size=(10, 2)) * 1e160
    with np.errstate(all="ignore"), pytest.raises(ValueError, match="too large"):
        frechet_distance(rows, rows * 2)


def images_of(v: Tensor) -> Images:
    return Images("made", "made", v, v.flip(0), None, None, "")


def test_an_evaluation_says_that_samples_are_no_numbers() -> None:
    """A model whose samples are NaN was told to have a perfect Fréchet distance."""
    images = images_of(pictures(60))
    model = BiDVL.for_images(SHAPE, latent_dim=2, width=4).eval()
    seen = principal_components(images)
    with torch.no_grad():
        for p in model.lower["generator"].parameters():
            p.mul_(1e20)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of too few images for a covariance
        with pytest.raises(
            ValueError, match="the model's samples hold NaN or infinity in 20 of 20"
        ):
            evaluate(model, images, features=seen, samples=20)
    with pytest.raises(ValueError, match="the reconstructions hold NaN"):
        reconstruction_rmse(model, images.test)
    with torch.no_grad():
        next(model.upper["energy"].parameters()).fill_(NAN)
    with pytest.raises(ValueError, match="the energies hold NaN"):
        ood_auroc(model, images.test, images.train)
    broken = images.train.clone()
    broken[3, 0, 0, 0] = NAN
    with pytest.raises(ValueError, match="the training images hold NaN"):
        pca_rmse(broken, images.test, 2)
    with pytest.raises(ValueError, match="the images hold NaN"):
        seen(broken)


# ---------------------------------------------------------------------- likelihoods


def test_estimates_that_say_nothing_do_not_meet() -> None:
    """A bracket of infinite width was said to meet."""
    vague = LogPartition(torch.tensor([0.0] * 9 + [9.0]).double(), 10)
    assert vague.effective_sample_size < 2
    assert vague.degenerate
    found = Bracket(vague, LogPartition(-vague.log_weights, 10, reverse=True), exact=True)
    assert found.width == INF
    assert not found.meet
    even = LogPartition(torch.zeros(20).double(), 10)
    assert not even.degenerate
    assert Bracket(even, LogPartition(torch.zeros(20).double(), 10, reverse=True), exact=True).meet


def test_chains_without_weights_are_refused() -> None:
    """NaN among the weights of a machine became NaN for log Z, silently."""
    for weights in ([0.0, NAN], [INF, 0.0], [-INF, -INF]):
        with pytest.raises(ValueError, match=r"of 2 chains have weights"):
            LogPartition(torch.tensor(weights).double(), 10)
    assert LogPartition(torch.tensor([-INF, 0.0]).double(), 10).value == pytest.approx(-math.log(2))
    machine, v = RBM(WIDTH, 3), bits()
    with torch.no_grad():
        machine.weight[1, 1] = NAN
    settings: dict[str, Any] = {"temperatures": linear_schedule(5), "generator": rng()}
    with pytest.raises(ValueError, match="look for NaN"):
        annealed_importance_sampling(machine, num_chains=4, **settings)
    with pytest.raises(ValueError, match="look for NaN"):
        bracket(machine, num_chains=4, **settings)
    with pytest.raises(ValueError, match="look for NaN"):
        exact_samples(machine, 3, rng())
    with pytest.raises(ValueError, match="the log-likelihood is nan"):
        log_likelihood(machine, v)
    advil = AdvIL(machine)
    with pytest.raises(ValueError, match="the bound is nan"):
        variational_lower_bound(machine, advil.encoder, v, 0.0, generator=rng())
    with pytest.raises(ValueError, match=r"log-ratio .* is nan"):
        sampler_lower_bound(machine, advil.sampler, generator=rng(), num_samples=5)


def test_chains_start_at_visibles_of_the_machine_only() -> None:
    machine = RBM(WIDTH, 3)
    for rows in (torch.full((2, WIDTH), 7.0), torch.full((2, WIDTH), NAN)):
        with pytest.raises(ValueError, match="visibles"):
            gibbs_samples(machine, rows, 3, 2, rng())

"""Distances between sets of images against their definitions."""

import importlib.util
import sys
from dataclasses import replace

import numpy as np
import pytest
from scipy.linalg import sqrtm

from bilevel.methods import BiDVL
from bilevel.methods.evaluation.evaluate import evaluate
from bilevel.methods.evaluation.fidelity import (
    fid,
    frechet_distance,
    kid,
    neighbourhoods,
    torchmetrics,
)
from tests.methods.evaluation.known import digits, digits_judge

needs_torchmetrics = pytest.mark.skipif(
    importlib.util.find_spec("torchmetrics") is None, reason="torchmetrics is not installed"
)


def test_frechet_distance_equals_the_textbook_formula() -> None:
    random = np.random.default_rng(0)
    a = random.normal(size=(400, 12)) @ random.normal(size=(12, 12))
    b = random.normal(size=(300, 12)) @ random.normal(size=(12, 12)) + 0.5
    covs = [np.cov(x.T) for x in (a, b)]
    root = sqrtm(covs[0] @ covs[1]).real
    expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(covs[0] + covs[1] - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-3)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-8)


def test_frechet_distance_of_fewer_rows_than_features() -> None:
    a = np.random.default_rng(0).normal(size=(5, 30))
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-8)
    assert frechet_distance(a, a + 1) == pytest.approx(30)
    with pytest.raises(ValueError, match=r"got \(5, 30\) and \(5, 29\)"):
        frechet_distance(a, a[:, 1:])


def test_fid_of_a_set_and_itself_is_zero() -> None:
    a = np.random.default_rng(0).normal(size=(50, 8))
    assert fid(a, a) == pytest.approx(0, abs=1e-9)


def test_too_few_images_warn_with_the_number() -> None:
    images = digits()
    model = BiDVL.for_images(images.shape, latent_dim=2, width=2)
    few = replace(images, test=images.test[:20])
    with pytest.warns(UserWarning, match="too few images .* 20 for 64 features"):
        evaluate(model, few, features=digits_judge())


@needs_torchmetrics
def test_fid_by_torchmetrics_is_the_distance_computed_here() -> None:
    random = np.random.default_rng(0)
    a = random.normal(size=(200, 6)) @ random.normal(size=(6, 6))
    b = random.gamma(2.0, size=(150, 6))
    assert torchmetrics("fid") is not None
    assert fid(a, b) == pytest.approx(frechet_distance(a, b), rel=1e-9)


@needs_torchmetrics
def test_kid_is_the_unbiased_kernel_distance() -> None:
    random = np.random.default_rng(1)
    a, b = random.normal(size=(30, 4)), random.normal(size=(30, 4)) + 1
    k = [[(x @ y.T / 4 + 1) ** 3 for y in (a, b)] for x in (a, b)]
    same = sum((k[i][i].sum() - np.trace(k[i][i])) / (30 * 29) for i in (0, 1))
    assert kid(a, b) == pytest.approx(same - 2 * k[0][1].mean(), rel=1e-9)
    drawn = [kid(a, b, seed, subset=20) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_without_torchmetrics_there_is_fid_and_no_kid(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("fid", "kid"):
        monkeypatch.setitem(sys.modules, f"torchmetrics.image.{module}", None)
    torchmetrics.cache_clear()
    a = np.random.default_rng(0).normal(size=(50, 4))
    try:
        assert fid(a, a + 1) == frechet_distance(a, a + 1)
        assert kid(a, a + 1) is None
    finally:
        torchmetrics.cache_clear()


def test_neighbourhoods_on_a_line() -> None:
    # The third neighbours of 9, 8, 7 are 3, 2, 2 away, the fifth 5, 4, 3.
    real = np.arange(10.0)[:, None]
    same = neighbourhoods(real, real)
    assert same["precision"] == same["recall"] == same["coverage"] == 1
    far = neighbourhoods(real, real + 100)
    assert set(far.values()) == {0.0}
    for place, precision, coverage in ((11.9, 1, 0.2), (12.5, 0, 0.1), (14.5, 0, 0)):
        found = neighbourhoods(real, np.full((6, 1), place))
        assert found["precision"] == precision
        assert found["coverage"] == coverage
        assert found["density"] == pytest.approx(10 * coverage / 5)
        assert found["recall"] == 0  # balls of no extent
    with pytest.raises(ValueError, match="n of at least 6"):
        neighbourhoods(real, real[:5])


def test_an_outlier_among_the_reals_fools_precision_not_density() -> None:
    random = np.random.default_rng(0)
    real = random.normal(size=(400, 2))
    real[0] = 50
    found = neighbourhoods(real, random.uniform(0, 50, size=(400, 2)))
    assert found["precision"] > 0.5
    assert found["density"] < 0.3
    assert found["coverage"] < 0.1

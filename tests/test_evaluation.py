"""Measures against their definitions, on models whose answers are known."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.linalg import sqrtm
from torch import Tensor, nn

from bilevel.methods import BiDVL
from bilevel.methods.data import load_images
from bilevel.methods.evaluation import (
    evaluate,
    frechet_distance,
    judge,
    ood_auroc,
    pca_rmse,
    reconstruction_rmse,
)
from bilevel.methods.pictures import save_curves, save_grid, save_reconstructions


class Brightness(nn.Module):
    """E(v) = mean of v."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, v: Tensor) -> Tensor:
        return self.weight * v.flatten(1).mean(dim=1)


class Copy(nn.Module):
    """The latent is the image."""

    def forward(self, v: Tensor) -> tuple[Tensor, Tensor]:
        return v.flatten(1), torch.zeros_like(v).flatten(1)


class Paste(nn.Module):
    """The image is the latent plus a constant."""

    def __init__(self, shift: float) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.tensor(shift))

    def forward(self, h: Tensor) -> Tensor:
        return h.view(-1, 1, 2, 2) + self.shift


def known(shift: float = 0.0) -> BiDVL:
    return BiDVL(Brightness(), Copy(), Paste(shift), latent_dim=4)


@pytest.mark.parametrize("shift", [0.0, 0.25])
def test_rmse_of_a_constant_offset_is_the_offset(shift: float) -> None:
    v = torch.rand(7, 1, 2, 2)
    assert reconstruction_rmse(known(shift), v) == pytest.approx(shift, abs=1e-7)


def test_auroc_turns_around() -> None:
    generator = torch.Generator().manual_seed(0)
    dark = torch.rand(200, 1, 2, 2, generator=generator) - 0.3
    light = torch.rand(150, 1, 2, 2, generator=generator)
    forth, back = ood_auroc(known(), dark, light), ood_auroc(known(), light, dark)
    assert forth + back == pytest.approx(1)
    assert 0.6 < forth < 1
    pairs = dark.flatten(1).mean(1)[:, None] < light.flatten(1).mean(1)[None]
    assert forth == pytest.approx(float(pairs.float().mean()), abs=1e-6)


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


def test_the_judge_knows_digits() -> None:
    images = load_images("digits")
    seen = judge(images)
    assert seen.accuracy > 0.95
    assert seen.features(images.test).shape == (359, 64)
    assert 0.05 < seen.smallest_share(images.test) < 0.1
    ones = images.train[images.train_labels == 1]
    assert seen.smallest_share(ones) == 0


def test_all_components_rebuild_exactly() -> None:
    v = load_images("digits").train[:200]
    assert pca_rmse(v, v, 64) == pytest.approx(0, abs=1e-6)
    assert pca_rmse(v, v, 4) > pca_rmse(v, v, 16) > 0


def test_evaluate_is_repeatable_and_leaves_the_model_alone() -> None:
    images = load_images("digits")
    model = BiDVL.for_images(images.shape, latent_dim=4, width=4)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    one, two = evaluate(model, images, 3), evaluate(model, images, 3)
    assert one == two
    assert {"frechet", "frechet_reference", "rmse", "rmse_pca", "smallest_class_share"} <= set(one)
    assert {"auroc_uniform", "auroc_inverted", "auroc_shuffled", "classifier_accuracy"} <= set(one)
    assert evaluate(model, images, 3, statistics="batch")["rmse"] != one["rmse"]
    assert model.statistics == "running"
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_evaluate_without_labels(tmp_path: Path) -> None:
    array = load_images("digits").train[:60, 0].numpy()
    np.savez(tmp_path / "set.npz", images=array)
    model = BiDVL.for_images((1, 8, 8), latent_dim=4, width=4)
    results = evaluate(model, load_images(tmp_path / "set.npz"))
    assert "smallest_class_share" not in results
    assert results["frechet"] > results["frechet_reference"]


def test_pictures_show_every_pixel(tmp_path: Path) -> None:
    v = torch.full((6, 1, 8, 8), -1.0)
    v[0] = 1
    save_grid(v, tmp_path / "grid.png", columns=3, scale=2)
    with Image.open(tmp_path / "grid.png") as picture:
        pixels = np.asarray(picture)
    gap = 2
    assert pixels.shape == (2 * 16 + 3 * gap, 3 * 16 + 4 * gap, 3)
    assert (pixels[gap : gap + 16, gap : gap + 16] == 255).all()
    assert (pixels[gap + 16 + gap :][:16, gap : gap + 16] == 0).all()
    save_reconstructions(v, v, tmp_path / "pairs.png")
    save_grid(v.repeat(1, 3, 1, 1), tmp_path / "colour.png")
    with pytest.raises(ValueError, match="one for each"):
        save_reconstructions(v, v[:2], tmp_path / "pairs.png")
    with pytest.raises(ValueError, match="1 or 3"):
        save_grid(v[:, 0], tmp_path / "grid.png")


def test_curves_of_short_and_odd_records(tmp_path: Path) -> None:
    records = [
        {"step": 1, "seconds": 0.1, "upper_loss": -1.0, "lower_loss": None, "direct_norm": 0.0},
        {"step": 2, "seconds": 0.2, "upper_loss": 1.0, "lower_loss": 3.0, "own_term": 2.0},
    ]
    save_curves(records, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="no records"):
        save_curves([], tmp_path / "curves.png")

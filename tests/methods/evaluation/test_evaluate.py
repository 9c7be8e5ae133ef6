"""Evaluation of models whose answers are known."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bilevel.methods import BiDVL, BiSM
from bilevel.methods.data.images import load_images
from bilevel.methods.evaluation.evaluate import evaluate, ood_auroc, pca_rmse, reconstruction_rmse
from bilevel.methods.evaluation.features import (
    FeatureNetwork,
    at_most,
    nearest_images,
    principal_components,
)
from tests.methods.evaluation.known import digits, digits_judge


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
    v = torch.rand(700, 1, 2, 2)  # more than are looked at together
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


def test_all_components_rebuild_exactly() -> None:
    v = digits().train[:200]
    assert pca_rmse(v, v, 64) == pytest.approx(0, abs=1e-6)
    assert pca_rmse(v, v, 4) > pca_rmse(v, v, 16) > 0
    components = principal_components(digits())(digits().train)
    assert components.square().mean(dim=0).diff().max() < 0  # in the order of their variance


def test_some_images_are_of_all_classes_and_always_the_same() -> None:
    v = torch.arange(1000.0)
    few = at_most(v, 100)
    assert torch.equal(few, at_most(v, 100))
    assert len(few.unique()) == 100
    assert few.min() < 100 < 900 < few.max()
    assert at_most(few, 100) is few


def test_evaluate_is_repeatable_and_leaves_the_model_alone() -> None:
    images, seen = digits(), digits_judge()
    model = BiDVL.for_images(images.shape, latent_dim=4, width=4)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    one, two = (evaluate(model, images, 3, features=seen) for _ in range(2))
    assert one == two
    for name in ("frechet", "precision", "recall", "density", "coverage", "smallest_class_share"):
        assert {name, f"{name}_reference"} <= one.keys()
    assert {"frechet_train", "rmse", "rmse_pca", "classifier_accuracy"} <= one.keys()
    kinds = ("uniform", "constant", "inverted", "shuffled")
    assert {f"auroc_{kind}" for kind in kinds} <= one.keys()
    batch = evaluate(model, images, 3, features=seen, statistics="batch")
    for name in ("rmse", "frechet"):
        assert batch[name] == one[f"{name}_batch"] != one[name] == batch[f"{name}_running"]
    assert batch["auroc_inverted"] == one["auroc_inverted"]
    assert model.statistics == "running"
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_a_quick_look_at_bytes_and_strangers() -> None:
    images = digits()
    as_bytes = replace(
        images,
        train=((images.train + 1) * 127.5).round().byte(),
        test=((images.test + 1) * 127.5).round().byte(),
    )
    model = BiDVL.for_images(images.shape, latent_dim=4, width=4)
    strangers = {"white": torch.full((70, 1, 8, 8), 255, dtype=torch.uint8)}
    found = evaluate(model, as_bytes, features=digits_judge(), samples=100, outside=strangers)
    assert found["auroc_white"] == ood_auroc(
        model, at_most(as_bytes.test, 100), torch.ones(70, 1, 8, 8)
    )
    assert "rmse_pca" not in found
    assert found["rmse"] == pytest.approx(
        reconstruction_rmse(model, at_most(images.test, 100)), rel=1e-2
    )
    with pytest.raises(ValueError, match="`samples` must be at least 2"):
        evaluate(model, images, samples=1)


def test_what_a_model_refuses_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> Tensor:
        raise NotImplementedError("there is no generator")

    model = BiDVL.for_images((1, 8, 8), latent_dim=4, width=4)
    monkeypatch.setattr(model, "sample", refuse)
    monkeypatch.setattr(model, "reconstruct", refuse)
    found = evaluate(model, digits(), features=digits_judge(), samples=90)
    assert "auroc_uniform" in found
    assert "frechet_reference" in found
    assert not {"frechet", "frechet_batch", "rmse", "rmse_batch", "rmse_pca"} & found.keys()


def test_evaluate_without_labels(tmp_path: Path) -> None:
    array = digits().train[:60, 0].numpy()
    np.savez(tmp_path / "set.npz", images=array)
    model = BiDVL.for_images((1, 8, 8), latent_dim=4, width=4)
    results = evaluate(model, load_images(tmp_path / "set.npz"))
    assert "smallest_class_share" not in results
    assert results["frechet"] > results["frechet_reference"]


def test_the_nearest_images_of_copies_are_the_originals() -> None:
    v = digits().train
    copies = v[[7, 3, 11]] + 0.01 * torch.rand(3, 1, 8, 8)
    pixels = FeatureNetwork("pixels", nn.Flatten(), 64)
    assert torch.equal(nearest_images(pixels, copies, v), v[[7, 3, 11]])


@pytest.mark.parametrize(("chains", "most"), [(True, 500), (False, 10_000)])
def test_models_that_draw_by_chains_are_asked_for_few(chains: bool, most: int) -> None:
    small = {"latent_dim": 2, "width": 2}
    model = (
        BiSM.for_images((1, 8, 8), langevin=(1, 1, 1), **small)
        if chains
        else BiDVL.for_images((1, 8, 8), **small)
    )
    rows: list[int] = []
    network = nn.Flatten()
    network.register_forward_pre_hook(lambda _, images: rows.append(len(images[0])))
    images = load_images("digits")
    evaluate(model, images, features=FeatureNetwork("pixels", network, 64), statistics="running")
    train, test = min(most, len(images.train)), min(most, len(images.test))
    policies = 1 if chains else 2  # batch norm has another one
    assert sum(rows) == train + test + policies * train

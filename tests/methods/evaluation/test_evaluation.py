"""Measures against their definitions, on models whose answers are known."""

import importlib.util
import sys
import warnings
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.linalg import sqrtm
from torch import Tensor, nn

from bilevel.cli import main
from bilevel.cli.features import feature_network
from bilevel.methods import BiDVL, BiSM, fidelity
from bilevel.methods.data.images import Images, load_images
from bilevel.methods.evaluation import features as features_module
from bilevel.methods.evaluation.evaluate import evaluate, ood_auroc, pca_rmse, reconstruction_rmse
from bilevel.methods.evaluation.features import (
    INCEPTION,
    FeatureNetwork,
    classifier,
    inception,
    judge,
    load_classifier,
    nearest_images,
    principal_components,
    save_classifier,
    some,
)
from bilevel.methods.evaluation.fidelity import (
    fid,
    frechet_distance,
    kid,
    neighbourhoods,
    torchmetrics,
)
from bilevel.methods.report.pictures import (
    save_curves,
    save_evaluations,
    save_grid,
    save_reconstructions,
)
from bilevel.methods.report.report import feature_space
from bilevel.methods.training.run import Run


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


needs_torchmetrics = pytest.mark.skipif(
    importlib.util.find_spec("torchmetrics") is None, reason="torchmetrics is not installed"
)


@cache
def digits() -> Images:
    return load_images("digits")


@cache
def digits_judge() -> FeatureNetwork:
    return judge(digits())


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
def test_kid_is_the_unbiased_kernel_distance(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(1)
    a, b = random.normal(size=(30, 4)), random.normal(size=(30, 4)) + 1
    k = [[(x @ y.T / 4 + 1) ** 3 for y in (a, b)] for x in (a, b)]
    same = sum((k[i][i].sum() - np.trace(k[i][i])) / (30 * 29) for i in (0, 1))
    assert kid(a, b) == pytest.approx(same - 2 * k[0][1].mean(), rel=1e-9)
    monkeypatch.setattr(fidelity, "_SUBSET", 20)
    assert kid(a, b, seed=1) == kid(a, b, seed=1)
    assert kid(a, b, seed=1) != kid(a, b, seed=2)


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


def test_the_judge_knows_digits() -> None:
    images, seen = digits(), digits_judge()
    assert seen.accuracy > 0.97
    seen_features = seen(images.test)
    assert seen_features.shape == (359, 64)
    assert 0.05 < seen.classes(seen_features).min() < 0.1
    assert seen.classes(seen_features).sum() == pytest.approx(1)
    ones = seen(images.train[images.train_labels == 1])
    assert seen.classes(ones).min() == 0
    assert seen.classes(ones)[1] > 0.98


def test_a_classifier_is_repeatable_and_keeps_the_global_generator() -> None:
    images = digits()
    before = torch.random.get_rng_state()
    labels = [classifier(images, num_steps=2, seed=seed).label for seed in (0, 0, 1)]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert labels[0] == labels[1] != labels[2]
    with pytest.raises(ValueError, match="no labels"):
        classifier(replace(images, train_labels=None))


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 28, 28), (1, 32, 32)])
def test_a_classifier_fits_every_size(shape: tuple[int, int, int]) -> None:
    v = torch.randint(256, (20, *shape), dtype=torch.uint8)
    images = Images("some", "some", v, v[:5], torch.arange(20) % 2, torch.zeros(5).long(), "")
    seen = classifier(images, num_steps=2, width=2)
    assert seen(v).shape == (20, 64)
    assert torch.equal(seen(v), seen(v.float() / 127.5 - 1))


def test_a_classifier_survives_the_disk(tmp_path: Path) -> None:
    images, path = digits(), tmp_path / "deep" / "digits.safetensors"
    seen = classifier(images, num_steps=3, width=4)
    save_classifier(seen, path)
    again = load_classifier(path)
    assert again.label == seen.label
    assert again.accuracy == seen.accuracy
    assert torch.equal(again(images.test), seen(images.test))
    with pytest.raises(ValueError, match="no classifier made here"):
        save_classifier(FeatureNetwork("pixels", nn.Flatten(), 64), path)
    with pytest.raises(FileNotFoundError, match="bilevel features DATA --out"):
        load_classifier(tmp_path / "nothing")
    (tmp_path / "bad").write_bytes(b"bad")
    with pytest.raises(ValueError, match="no feature network"):
        load_classifier(tmp_path / "bad")


def test_a_feature_network_refuses_what_it_cannot_do() -> None:
    v = torch.zeros(3, 1, 8, 8)
    with pytest.raises(ValueError, match=r"shape \(3, 60\) .* got \(3, 64\)"):
        FeatureNetwork("pixels", nn.Flatten(), 60)(v)
    with pytest.raises(ValueError, match="the line cannot take a tensor of shape"):
        FeatureNetwork("line", nn.Linear(5, 2), 2)(v)
    with pytest.raises(ValueError, match="knows no classes"):
        FeatureNetwork("pixels", nn.Flatten(), 64).classes(v)
    with pytest.raises(ValueError, match="`dim` must be positive"):
        FeatureNetwork("pixels", nn.Flatten(), 0)


def test_a_label_tells_weights_apart() -> None:
    with torch.random.fork_rng():
        nets = [
            FeatureNetwork("net", nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), 2) for _ in "ab"
        ]
    assert nets[0].label != nets[1].label
    assert nets[0].label == nets[0].label
    assert nets[0].label.startswith("net, 2 features (")


def test_a_feature_network_is_evaluated_in_evaluation_mode() -> None:
    module = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten())
    module.train()
    v = torch.rand(5, 1, 2, 2)
    assert torch.allclose(FeatureNetwork("norm", module, 4)(v), v.flatten(1), atol=1e-4)
    assert module.training
    assert module[0].num_batches_tracked == 0


def test_missing_inception_weights_say_where_to_put_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(FileNotFoundError) as missing:
        inception()
    assert str(tmp_path / "checkpoints" / INCEPTION) in str(missing.value)
    other = tmp_path / "other.pth"
    other.write_bytes(b"other")
    with pytest.raises(ValueError, match="SHA-256 starts with d9298a10"):
        inception(other)
    monkeypatch.setattr(features_module, "INCEPTION", "weights-d9298a10.pth")
    monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", None)
    with pytest.raises(ImportError, match=r"pip install 'bilevel\[images\]'"):
        inception(other)


def test_inception_is_given_bytes_in_three_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stub:
        class NoTrainInceptionV3(nn.Module):
            def __init__(self, *arguments: Any, **options: Any) -> None:
                super().__init__()
                assert options == {"antialias": False}

            def forward(self, levels: Tensor) -> Tensor:
                assert levels.dtype == torch.uint8
                return levels.float().mean(dim=(2, 3)).repeat(1, 683)[:, :2048]

    monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", Stub)  # type: ignore[arg-type]
    seen = FeatureNetwork("stub", features_module._Inception(Path("w")), 2048)
    grey = torch.tensor([-1.0, 0.2, 1.0, -1.2]).view(4, 1, 1, 1).expand(4, 1, 8, 8)
    assert seen(grey)[:, :3].tolist() == [[0] * 3, [153] * 3, [255] * 3, [0] * 3]


def test_all_components_rebuild_exactly() -> None:
    v = digits().train[:200]
    assert pca_rmse(v, v, 64) == pytest.approx(0, abs=1e-6)
    assert pca_rmse(v, v, 4) > pca_rmse(v, v, 16) > 0
    components = principal_components(digits())(digits().train)
    assert components.square().mean(dim=0).diff().max() < 0  # in the order of their variance


def test_some_images_are_of_all_classes_and_always_the_same() -> None:
    v = torch.arange(1000.0)
    few = some(v, 100)
    assert torch.equal(few, some(v, 100))
    assert len(few.unique()) == 100
    assert few.min() < 100 < 900 < few.max()
    assert some(few, 100) is few


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
        model, some(as_bytes.test, 100), torch.ones(70, 1, 8, 8)
    )
    assert "rmse_pca" not in found
    assert found["rmse"] == pytest.approx(
        reconstruction_rmse(model, some(images.test, 100)), rel=1e-2
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
    as_bytes = ((v + 1) * 127.5).byte()
    save_grid(as_bytes, tmp_path / "bytes.png", columns=3, scale=2)
    assert (tmp_path / "bytes.png").read_bytes() == (tmp_path / "grid.png").read_bytes()
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


def test_evaluations_are_drawn_whatever_they_hold(tmp_path: Path) -> None:
    records = [
        {"step": 10, "frechet": 90.0, "frechet_reference": 3.0, "rmse": 0.3, "auroc_svhn": 0.4},
        {"step": 20, "frechet": 9.0, "frechet_reference": 3.0, "auroc_uniform": 1.0},
    ]
    save_evaluations(records, tmp_path / "evaluations.png")
    assert (tmp_path / "evaluations.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="no records"):
        save_evaluations([], tmp_path / "evaluations.png")


def test_the_nearest_images_of_copies_are_the_originals() -> None:
    v = digits().train
    copies = v[[7, 3, 11]] + 0.01 * torch.rand(3, 1, 8, 8)
    pixels = FeatureNetwork("pixels", nn.Flatten(), 64)
    assert torch.equal(nearest_images(pixels, copies, v), v[[7, 3, 11]])


def test_the_features_command_and_what_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--steps", "40", "--width", "4", "--out", "f.safetensors", "--device", "cpu"]
    assert main(["features", "digits", *options]) == 0
    seen = feature_network("f.safetensors")
    assert seen.label in capsys.readouterr().out
    images = digits()
    np.savez("strangers.npz", images=np.zeros((30, 5, 5), np.uint8))
    model = BiDVL.for_images(images.shape, latent_dim=2, width=2)
    model.fit(images.train, num_steps=1, run="r", notes={"data": "digits", "name": "digits"})
    model.save(Path("r") / "model")
    evaluate_it = ["evaluate", "r", "--features", "f.safetensors", "--samples", "60"]
    assert main([*evaluate_it, "--ood", "strangers.npz"]) == 0
    out, err = capsys.readouterr()
    assert seen.label in out
    assert "images or strangers" in out
    assert "note: too few images for a Fréchet distance: 60 for 64 features" in err
    assert feature_space(Run("r")) == seen.label
    assert (tmp_path / "r" / "neighbours.png").is_file()
    assert main(["features", "strangers.npz", "--out", "g"]) == 2
    assert "no labels" in capsys.readouterr().err
    assert main(["features", "digits"]) == 2
    assert "--out FILE is missing" in capsys.readouterr().err
    assert main(["evaluate", "r", "--samples", "1"]) == 2
    with pytest.raises(FileNotFoundError, match="no Inception weights in `w"):
        feature_network("w.pth")


def test_models_that_draw_by_chains_are_asked_for_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bilevel.methods.evaluation.evaluate._MOST_CHAINS", 20)
    asked: list[int] = []

    def counted(model: Any, policy: Any, seen: Any, count: int, seed: int) -> Any:
        asked.append(count)
        raise NotImplementedError

    monkeypatch.setattr("bilevel.methods.evaluation.evaluate._features", counted)
    model = BiSM.for_images((1, 8, 8), latent_dim=2, width=2, langevin=(1, 1, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of so few images
        evaluate(model, load_images("digits"))
    assert set(asked) == {20}

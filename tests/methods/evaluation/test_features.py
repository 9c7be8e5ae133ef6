"""Feature networks: repeatable, kept on disk, told apart; Inception and its weights."""

import copy
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bilevel.methods.data.images import Images
from bilevel.methods.evaluation.features import (
    INCEPTION,
    FeatureNetwork,
    classifier,
    inception,
    load_classifier,
    save_classifier,
)
from bilevel.methods.evaluation.inception import Inception
from tests.methods.evaluation.known import digits, digits_judge


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
    assert replace(nets[0], module=copy.deepcopy(nets[0].module)).label == nets[0].label
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
    monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", None)
    with pytest.raises(ImportError, match=r"pip install 'bilevel\[images\]'"):
        inception(other, published="weights-d9298a10.pth")


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
    seen = FeatureNetwork("stub", Inception(Path("w")), 2048)
    grey = torch.tensor([-1.0, 0.2, 1.0, -1.2]).view(4, 1, 1, 1).expand(4, 1, 8, 8)
    assert seen(grey)[:, :3].tolist() == [[0] * 3, [153] * 3, [255] * 3, [0] * 3]

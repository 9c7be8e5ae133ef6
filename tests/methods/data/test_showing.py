"""`show`: the same picture from bytes, floats and arrays; what is none is refused with advice."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from bilevel.methods import show
from bilevel.methods.data import load_images

HALF = (torch.arange(6 * 64).view(6, 1, 8, 8) % 256).byte()


def pixels(images: object, **options: object) -> np.ndarray:
    return np.asarray(show(images, columns=3, scale=1, **options))


@pytest.mark.parametrize(
    "images",
    [
        HALF[:, 0],
        HALF.numpy(),
        HALF.expand(6, 3, 8, 8),
        HALF.expand(6, 3, 8, 8).permute(0, 2, 3, 1).numpy(),
        HALF.double() / 255,
        HALF.float() / 127.5 - 1,
        (HALF.float() / 255).requires_grad_(),
        list(HALF),
    ],
    ids=["no channel", "array", "colours", "colours last", "[0, 1]", "[-1, 1]", "graph", "list"],
)
def test_the_same_images_give_the_same_picture(images: object) -> None:
    expected = pixels(HALF)
    assert expected.shape == (2 * 8 + 3 * 2, 3 * 8 + 4 * 2, 3)
    assert (expected[2:10, 2:10, 0] == HALF[0, 0].numpy()).all()
    assert np.abs(pixels(images).astype(int) - expected).max() <= 1


def test_a_picture_is_saved_and_its_limits_are_cut(tmp_path: Path) -> None:
    sixteenths = HALF % 17
    shown = pixels(sixteenths.float(), limits=(0, 16))
    greys = (sixteenths[0, 0, 0].float() * 255 / 16).numpy()
    assert np.abs(shown[2, 2:10, 0] - greys).max() < 1
    assert set(np.unique(pixels(HALF > 100))) == {0, 232, 255}
    assert pixels(HALF.float(), limits=(100, 101)).max() == 255
    digits = load_images("digits")
    assert show(digits) == show(digits.train[:64])
    show(digits.train[:12]).save(tmp_path / "digits.png")
    with Image.open(tmp_path / "digits.png") as picture:
        assert picture.width > picture.height


@pytest.mark.parametrize(
    ("images", "advice"),
    [
        (torch.rand(4, 64), r"rows.reshape\(-1, 8, 8\)"),
        (torch.rand(8, 10), r"image\[None\]"),
        (torch.rand(3, 2, 8, 8), "one channel or three"),
        (torch.zeros(0, 8, 8), "n at least 1"),
        (torch.rand(2, 8, 8) * 9 + 7, r"such as `limits=\(7, 16\)`"),
        (torch.full((2, 8, 8), float("nan")), "NaN"),
        (torch.rand(2000, 2, 2), r"show `images\[:64\]`"),
    ],
)
def test_what_is_no_picture_is_refused_with_advice(images: Tensor, advice: str) -> None:
    with pytest.raises(ValueError, match=advice):
        show(images)


def test_settings_and_missing_extras_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="`columns` must be positive"):
        show(HALF, columns=0)
    with pytest.raises(ValueError, match="the smaller first"):
        show(HALF.float(), limits=(1, 0))
    with pytest.raises(TypeError, match=r"load_images"):
        show("digits")
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r"bilevel\[report\]"):
        show(HALF)

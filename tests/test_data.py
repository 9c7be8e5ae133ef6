"""Reading images: what comes out, and what is refused in which words."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bilevel.methods.data import (
    constant_images,
    inverted,
    load_images,
    scaled,
    shuffled_pixels,
    uniform_noise,
)


def random(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def npz(folder: Path, **arrays: Any) -> Path:
    path = folder / "set.npz"
    np.savez(path, **arrays)
    return path


def write(path: Path, size: tuple[int, int] = (8, 8), mode: str = "L") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (size[1], size[0]) if mode == "L" else (size[1], size[0], 3)
    pixels = random(len(path.name)).integers(0, 256, shape, dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def test_digits_are_split_once_and_for_all() -> None:
    one, two = load_images("digits"), load_images("digits")
    assert one.shape == (1, 8, 8)
    assert (len(one.train), len(one.test)) == (1438, 359)
    assert torch.equal(one.train, two.train)
    assert one.train_labels is not None
    assert set(one.train_labels.tolist()) == set(range(10))
    assert (one.train.min(), one.train.max()) == (-1, 1)


@pytest.mark.parametrize("top", [1, 16])
def test_integers_are_scaled_by_their_maximum(tmp_path: Path, top: int) -> None:
    array = random().integers(0, top, (10, 8, 8), dtype=np.uint8, endpoint=True)
    array[0, 0, :2] = 0, top
    images = load_images(npz(tmp_path, images=array))
    everything = torch.cat([images.train, images.test])
    assert (everything.min(), everything.max()) == (-1, 1)
    assert f"0..{top}" in images.note
    levels = torch.from_numpy(np.sort(array.flatten()).astype(np.float32)) * 2 / top - 1
    torch.testing.assert_close(everything.flatten().sort().values, levels)


@pytest.mark.parametrize("kind", [np.uint8, np.int64, ">i4"])
def test_values_of_bytes_stay_bytes(tmp_path: Path, kind: Any) -> None:
    array = random().integers(0, 256, (10, 8, 8)).astype(kind)
    array[0, 0, :2] = 0, 255
    images = load_images(npz(tmp_path, train_images=array[:6], test_images=array[6:]))
    assert images.train.dtype == torch.uint8
    assert images.train[:, 0].tolist() == array[:6].tolist()
    assert "0..255 kept as bytes" in images.note


def test_scaled_maps_bytes_onto_their_range_and_passes_floats_through() -> None:
    pixels = torch.arange(256, dtype=torch.uint8)
    values = scaled(pixels)
    assert values.dtype == torch.float32
    assert (values[0], values[51], values[255]) == (-1, pytest.approx(-0.6), 1)
    torch.testing.assert_close((values + 1) * 127.5, torch.arange(256.0))
    assert scaled(values) is values


@pytest.mark.parametrize(("low", "kept"), [(0.0, "[0, 1]"), (-1.0, "[-1, 1] kept")])
def test_floats_keep_or_double_their_range(tmp_path: Path, low: float, kept: str) -> None:
    array = random().uniform(low, 1, (20, 8, 8))
    images = load_images(npz(tmp_path, train_images=array[:15], test_images=array[15:]))
    expected = array if low < 0 else 2 * array - 1
    np.testing.assert_allclose(images.train[:, 0], expected[:15], atol=1e-6)
    assert kept in images.note


@pytest.mark.parametrize("shape", [(6, 8, 8), (6, 8, 8, 3), (6, 3, 8, 8)])
def test_layouts(tmp_path: Path, shape: tuple[int, ...]) -> None:
    array = random().integers(0, 256, shape, dtype=np.uint8)
    images = load_images(npz(tmp_path, tra_images=array, tes_images=array))
    assert images.train.shape == (6, 1 if len(shape) == 3 else 3, 8, 8)
    assert "own split" in images.note


def test_oblong_images_are_padded_with_their_border(tmp_path: Path) -> None:
    array = np.full((10, 28, 20), 51, np.uint8)
    array[:, 10:20, 5:15] = 255
    images = load_images(npz(tmp_path, images=array))
    assert images.shape == (1, 28, 28)
    assert images.train[:, :, :, [0, 3, 24, 27]].unique().tolist() == [51]
    assert torch.equal(images.train[0, 0, :, 4:24], torch.from_numpy(array[0]))
    assert "28x20 pixels padded to 28x28" in images.note


def test_sides_the_networks_cannot_halve_are_padded(tmp_path: Path) -> None:
    array = random().integers(0, 256, (4, 9, 9), dtype=np.uint8)
    assert load_images(npz(tmp_path, images=array)).shape == (1, 10, 10)


def test_labels_become_numbers(tmp_path: Path) -> None:
    array = random().integers(0, 256, (4, 8, 8), dtype=np.uint8)
    labels = np.array(["cat", "dog", "cat", "ant"])
    path = npz(
        tmp_path, train_images=array, train_labels=labels, test_images=array, test_labels=labels
    )
    found = load_images(path).test_labels
    assert found is not None
    assert found.tolist() == [1, 2, 1, 0]


GOOD = np.zeros((4, 8, 8), np.uint8)
HOLED = np.zeros((4, 8, 8))
HOLED[2, 1, 1] = np.nan


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": HOLED}, r"1 of 4 images hold NaN or infinity \(index 2\)"),
        ({"images": GOOD[:0]}, "holds no images"),
        ({"images": GOOD[:1]}, "holds one image"),
        ({"images": GOOD[0]}, "have shape"),
        ({"images": np.array([None, 1])}, "object array"),
        ({"images": GOOD.astype(str)}, "of type"),
        ({"images": GOOD + np.int64(300)}, r"0\.\.255"),
        ({"images": np.full((4, 8, 8), 7.0)}, "rescale them"),
        ({"pictures": GOOD}, "`pictures`; rename"),
        ({"images": GOOD, "labels": np.arange(3)}, "one label per image"),
        ({"train_images": GOOD, "test_images": np.zeros((4, 7, 7), np.uint8)}, "differ in shape"),
    ],
)
def test_bad_arrays_are_refused(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_images(npz(tmp_path, **arrays))


def test_unknown_sources_name_the_nearest(tmp_path: Path) -> None:
    npz(tmp_path, images=GOOD)
    with pytest.raises(ValueError, match="did you mean `digits`"):
        load_images("digit")
    with pytest.raises(FileNotFoundError, match=r"did you mean `.*set\.npz`"):
        load_images(tmp_path / "sets.npz")
    (tmp_path / "broken.npz").write_bytes(b"PK nothing")
    with pytest.raises(ValueError, match="cannot be read"):
        load_images(tmp_path / "broken.npz")
    (tmp_path / "images.zip").write_bytes(b"PK")
    with pytest.raises(ValueError, match="cannot be read as a zip archive"):
        load_images(tmp_path / "images.zip")
    (tmp_path / "images.tar").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="zip archive of images; convert it"):
        load_images(tmp_path / "images.tar")


def test_folder_with_split_and_classes(tmp_path: Path) -> None:
    for part, count in (("train", 4), ("test", 2)):
        for kind in ("ant", "bee"):
            for i in range(count):
                write(tmp_path / part / kind / f"{i}.png", mode="RGB" if kind == "bee" else "L")
    write(tmp_path / "train" / ".hidden" / "0.png")
    images = load_images(tmp_path)
    assert images.train.shape == (8, 3, 8, 8)
    assert images.test_labels is not None
    assert images.test_labels.tolist() == [0, 0, 1, 1]
    assert "own split" in images.note


def test_flat_grey_folder(tmp_path: Path) -> None:
    for i in range(10):
        write(tmp_path / f"{i}.jpg")
    images = load_images(tmp_path)
    assert images.train.shape == (8, 1, 8, 8)
    assert images.train_labels is None


def test_bad_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no PNG or JPEG"):
        load_images(tmp_path)
    write(tmp_path / "a.png", (8, 8))
    write(tmp_path / "b.png", (9, 7))
    with pytest.raises(ValueError, match=r"a\.png` is 8x8 pixels, `.*b\.png` 9x7; .*side=32"):
        load_images(tmp_path)
    (tmp_path / "b.png").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match=r"b\.png` cannot be read as an image"):
        load_images(tmp_path)


def test_outsiders() -> None:
    v = torch.rand(5, 3, 8, 8) * 2 - 1
    seeded = [torch.Generator().manual_seed(1) for _ in range(3)]
    shuffled = shuffled_pixels(v, seeded[0])
    assert torch.equal(shuffled.flatten(2).sort().values, v.flatten(2).sort().values)
    assert not torch.equal(shuffled, v)
    pixels = {tuple(p) for p in v[0].flatten(1).T.tolist()}
    assert {tuple(p) for p in shuffled[0].flatten(1).T.tolist()} == pixels  # channels together
    assert torch.equal(shuffled_pixels(v, seeded[1]), shuffled)
    assert torch.equal(inverted(v), -v)
    noise = uniform_noise(v, seeded[2])
    assert noise.shape == v.shape
    assert noise.abs().max() <= 1

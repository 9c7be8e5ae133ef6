"""Images from arrays: ranges, layouts, sides, limits, and what is refused in which words."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bilevel.cli.runs import images_of
from bilevel.methods.data.images import load_images, scaled
from bilevel.methods.training.run import Run
from tests.methods.data.files import npz, random, write


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
    assert values[[0, 51, 255]].tolist() == pytest.approx([-1, -0.6, 1])
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


def test_arrays_are_resized_as_files_are(tmp_path: Path) -> None:
    array = random().integers(0, 256, (2, 30, 24, 3), dtype=np.uint8)
    (tmp_path / "train").mkdir()
    for i, pixels in enumerate(array):
        Image.fromarray(pixels).save(tmp_path / "train" / f"{i}.png")
    (tmp_path / "test").symlink_to(tmp_path / "train")
    stored = load_images(npz(tmp_path, train_images=array, test_images=array), crop=20, side=8)
    files = load_images(tmp_path, crop=20, side=8)
    assert (stored.train.int() - files.train.int()).abs().max() <= 1  # a grey level of rounding
    with Image.open(tmp_path / "train" / "0.png") as image:
        cut = image.crop((2, 5, 22, 25)).resize((8, 8), Image.Resampling.BILINEAR)
    assert torch.equal(files.train[0], torch.from_numpy(np.array(cut)).permute(2, 0, 1))


def test_smaller_images_are_padded_to_the_side_and_nothing_is_enlarged(tmp_path: Path) -> None:
    array = random().integers(1, 256, (10, 28, 28), dtype=np.uint8)
    array[:, [0, -1]] = array[:, :, [0, -1]] = 0
    path = npz(tmp_path, train_images=array, test_images=array)
    images = load_images(path, side=32)
    assert torch.equal(images.train[:, 0, 2:30, 2:30], torch.from_numpy(array))
    assert images.train.int().sum() == array.astype(int).sum()
    assert "28x28 pixels padded to 32x32 with the colour of their border" in images.note
    digits = load_images("digits", side=16)
    assert torch.equal(digits.test[:, :, 4:12, 4:12], load_images("digits").test)


def test_channels_are_changed_only_if_asked_for(tmp_path: Path) -> None:
    array = random().integers(0, 256, (4, 8, 8), dtype=np.uint8)
    coloured = np.stack([array] * 3, axis=3)
    grey = load_images(npz(tmp_path, train_images=array, test_images=array), channels=3)
    assert torch.equal(grey.train, torch.from_numpy(coloured).permute(0, 3, 1, 2))
    assert "grey repeated in 3 channels" in grey.note
    colour = load_images(npz(tmp_path, train_images=coloured, test_images=coloured), channels=1)
    assert torch.equal(colour.train[:, 0], torch.from_numpy(array))
    write(tmp_path / "a" / "train" / "0.png")
    write(tmp_path / "a" / "test" / "0.png")
    files = [load_images(tmp_path / "a", channels=channels).train for channels in (None, 3)]
    assert files[0].shape == (1, 1, 8, 8)
    assert torch.equal(files[1], files[0].expand(-1, 3, -1, -1))


def test_a_limit_takes_the_same_images_always_and_their_classes(tmp_path: Path) -> None:
    array = np.arange(200, dtype=np.uint8)[:, None, None].repeat(8, 1).repeat(8, 2)
    path = npz(
        tmp_path,
        train_images=array,
        train_labels=np.arange(200),
        test_images=array[:5],
        test_labels=np.arange(5),
    )
    images, again = load_images(path, limit=50), load_images(path, limit=50)
    assert (len(images.train), len(images.test)) == (50, 5)
    assert torch.equal(images.train, again.train)
    assert images.train_labels is not None
    assert images.train_labels.tolist() == images.train[:, 0, 0, 0].tolist()
    assert images.train_labels.max() > 100


@pytest.mark.parametrize(
    "options", [{"side": 0}, {"crop": -1}, {"side": 8.0}, {"channels": 2}, {"limit": 0}]
)
def test_options_that_mean_nothing_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"`{next(iter(options))}` is"):
        load_images("digits", **options)


def test_a_run_loads_its_images_with_its_options(tmp_path: Path) -> None:
    array = random().integers(0, 256, (10, 12, 12), dtype=np.uint8)
    path = npz(tmp_path, images=array)
    images = load_images(path, side=16, channels=3, limit=8)
    notes = {"data": images.source, "name": images.name, "data_options": images.options}
    run = Run(tmp_path / "run")
    run.begin({"notes": notes, "data": {"shape": list(images.train.shape)}})
    for source in (None, str(path)):
        assert torch.equal(images_of(run, source).train, images.train)
    assert images_of(run, "digits").shape == (3, 16, 16)

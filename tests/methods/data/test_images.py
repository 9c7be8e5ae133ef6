"""Reading images: what comes out, and what is refused in which words."""

import sys
import zipfile
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bilevel import Batches
from bilevel.cli.runs import images_of
from bilevel.methods import BiDVL
from bilevel.methods.data.images import (
    constant_images,
    inverted,
    load_images,
    scaled,
    shuffled_pixels,
    uniform_noise,
)
from bilevel.methods.training.run import Run


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


def as_zip(folder: Path, path: Path, prefix: str = "") -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*.*")):
            archive.write(file, prefix + file.relative_to(folder).as_posix())
        archive.writestr("__MACOSX/._0.png", b"no image")
    return path


def photos(folder: Path, parts: tuple[str, ...] = ("train", "test")) -> Path:
    for part in parts:
        for kind in ("ant", "bee"):
            for i in range(3):
                write(folder / part / kind / f"{part}{kind}{'x' * i}.png", mode="RGB")
    return folder


@pytest.mark.parametrize("prefix", ["", "photos/"])
def test_an_archive_is_read_as_the_folder_it_was_made_of(tmp_path: Path, prefix: str) -> None:
    folder = load_images(photos(tmp_path / "photos"))
    archive = load_images(as_zip(tmp_path / "photos", tmp_path / "photos.zip", prefix))
    assert torch.equal(archive.train, folder.train)
    assert torch.equal(archive.test, folder.test)
    assert archive.train_labels is not None
    assert archive.train_labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert (archive.name, archive.note) == ("photos", folder.note)
    assert archive.train.dtype == torch.uint8
    with Image.open(tmp_path / "photos" / "test" / "bee" / "testbee.png") as image:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    assert torch.equal(archive.test[3], pixels)


def test_train_and_test_may_be_two_archives(tmp_path: Path) -> None:
    both = load_images(photos(tmp_path / "both"))
    as_zip(photos(tmp_path / "a", ("train",)), tmp_path / "set_train.zip")
    alone = load_images(tmp_path / "set_train.zip")
    assert (len(alone.train), len(alone.test)) == (5, 1)
    assert "20%" in alone.note
    as_zip(photos(tmp_path / "b", ("test",)), tmp_path / "set_test.zip")
    pair = load_images(tmp_path / "set_train.zip")
    assert torch.equal(pair.train, both.train)
    assert torch.equal(pair.test, both.test)
    assert pair.test_labels is not None
    assert pair.test_labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert "test images of `set_test.zip`; the set's own split" in pair.note
    assert load_images(tmp_path / "set_test.zip").test.shape[0] == 1  # not the other way round


def test_many_files_keep_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bilevel.methods.data.folders._AHEAD", 4)
    monkeypatch.setattr("bilevel.methods.data.folders._TOGETHER", 3)
    for i in range(30):
        for part in ("train", "test"):
            (tmp_path / part).mkdir(exist_ok=True)
            Image.fromarray(np.full((8, 8), i, np.uint8)).save(tmp_path / part / f"{i:02}.png")
    assert load_images(tmp_path).train[:, 0, 0, 0].tolist() == list(range(30))


def test_an_unreadable_file_is_named_and_skipped_only_if_told_so(tmp_path: Path) -> None:
    folder = photos(tmp_path / "photos")
    (folder / "train" / "ant" / "a.jpg").write_bytes(b"no image")
    whole = (folder / "train" / "bee" / "trainbee.png").read_bytes()
    (folder / "train" / "bee" / "cut.png").write_bytes(whole[:-40])
    archive = as_zip(folder, tmp_path / "photos.zip")
    for source in (folder, archive):
        with pytest.raises(ValueError, match=r"train/ant/a\.jpg` cannot.*skip_unreadable=True"):
            load_images(source)
        images = load_images(source, skip_unreadable=True)
        assert "2 files that cannot be read skipped, the first `train/ant/a.jpg`" in images.note
        assert images.options == {"skip_unreadable": True}
        assert images.train_labels is not None
        assert images.train_labels.tolist() == [0, 0, 0, 1, 1, 1]
    for file in (folder / "test").rglob("*.png"):
        file.write_bytes(b"no image")
    with pytest.raises(ValueError, match="none of the 6 images"):
        load_images(folder, skip_unreadable=True)


def test_a_damaged_entry_of_an_archive_is_named(tmp_path: Path) -> None:
    archive = as_zip(photos(tmp_path / "photos"), tmp_path / "photos.zip")
    content = bytearray(archive.read_bytes())
    content[content.index(b"IDAT") + 8] ^= 0xFF  # the checksum of the first entry is wrong now
    archive.write_bytes(content)
    with pytest.raises(ValueError, match=r"testant\.png` cannot be read as an image: Bad CRC"):
        load_images(archive)


def test_mixed_sizes_become_one_with_a_side(tmp_path: Path) -> None:
    write(tmp_path / "a.png", (20, 10), "RGB")
    write(tmp_path / "b.png", (12, 30), "RGB")
    write(tmp_path / "c.png", (5, 6), "RGB")
    images = load_images(tmp_path, side=8)
    assert images.shape == (3, 8, 8)
    assert "images of several sizes brought to 8x8" in images.note
    with pytest.raises(ValueError, match=r"c\.png`: `crop=8` is larger than an image of 5x6"):
        load_images(tmp_path, crop=8)


def test_the_centre_is_cut_out_exactly(tmp_path: Path) -> None:
    array = random().integers(0, 256, (4, 18, 14, 3), dtype=np.uint8)
    for i, pixels in enumerate(array):
        (tmp_path / "train").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "train" / f"{i}.png")
    (tmp_path / "test").symlink_to(tmp_path / "train")
    stored = load_images(npz(tmp_path, train_images=array, test_images=array), crop=8)
    files = load_images(tmp_path, crop=8)
    expected = torch.from_numpy(array[:, 5:13, 3:11]).permute(0, 3, 1, 2)
    assert torch.equal(stored.train, expected)
    assert torch.equal(files.train, expected)
    assert "18x14 pixels cut to the centre's 8x8" in stored.note


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


# ---------------------------------------------------------------------- runs


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


# ---------------------------------------------------------------------- bytes and models


def model(channels: int = 1) -> BiDVL:
    return BiDVL.for_images((channels, 8, 8), latent_dim=2, width=2)


def some_bytes(n: int = 20, channels: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (n, channels, 8, 8), generator=generator, dtype=torch.uint8)


def test_a_model_takes_bytes_for_what_they_are_scaled_to() -> None:
    learner, v = model().double(), some_bytes()
    learner.eval()
    assert torch.equal(learner.energy(v), learner.energy(scaled(v)))
    assert torch.equal(learner.reconstruct(v), learner.reconstruct(scaled(v)))
    assert learner.check(v).dtype == torch.float64
    assert learner.admit(v).dtype == torch.uint8


def test_training_on_bytes_is_training_on_the_floats() -> None:
    learners = [model(), model()]
    for learner, v in zip(learners, (some_bytes(), scaled(some_bytes())), strict=True):
        learner.fit(v, num_steps=3, batch_size=5)
    one, two = (learner.state_dict() for learner in learners)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_batches_convert_the_drawn_rows_only() -> None:
    seen: list[torch.Size] = []

    def convert(rows: torch.Tensor) -> torch.Tensor:
        assert rows.dtype == torch.uint8
        seen.append(rows.shape)
        return scaled(rows)

    batches, floats = Batches(some_bytes(), 5, convert=convert), Batches(scaled(some_bytes()), 5)
    assert all(torch.equal(next(batches), next(floats)) for _ in range(6))
    assert seen == [(5, 1, 8, 8)] * 6


@pytest.mark.parametrize(
    ("shape", "remedy"),
    [((9, 1, 8, 8), "channels=3`"), ((9, 3, 9, 9), "`side=8`"), ((9, 1, 9, 9), "=3, side=8`")],
)
def test_images_of_another_shape_are_refused_with_the_option_that_mends_it(
    shape: tuple[int, ...], remedy: str
) -> None:
    with pytest.raises(ValueError, match=remedy):
        model(3).fit(torch.zeros(shape, dtype=torch.uint8))


# ---------------------------------------------------------------------- published sets


class Published:
    """Sets as torchvision's classes hold them: arguments, attributes, layouts and types."""

    def __init__(self, root: str, part: str, download: bool, error: Exception | None) -> None:
        assert download
        if error is not None:
            raise error
        self.root, self.n = Path(root), {"train": 20, "test": 6, "all": 9}[part]
        self.pixels = random(self.n).integers(0, 256, (self.n, 32, 32, 3), dtype=np.uint8)

    def mnist(self) -> None:
        self.data: Any = torch.from_numpy(self.pixels[:, :28, :28, 0].copy())
        self.targets: Any = torch.arange(self.n) % 10

    def cifar(self) -> None:
        self.data, self.targets = self.pixels, [i % 10 for i in range(self.n)]

    def svhn(self) -> None:
        stored = self.pixels.transpose(1, 2, 3, 0).copy()  # as in the file: (32, 32, 3, n)
        self.data, self.labels = np.transpose(stored, (3, 2, 0, 1)), np.arange(self.n) % 10

    def faces(self) -> None:
        folder = self.root / "celeba" / "img_align_celeba"
        for i in range(self.n):
            write(folder / f"{i:06}{'x' * i}.jpg", (178, 218), "RGB")


@pytest.fixture
def torchvision(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SimpleNamespace:
    """A stand-in for torchvision.datasets, over an empty cache folder; `error` stops downloads."""
    state = SimpleNamespace(error=None, cache=tmp_path / "cache")

    def maker(fill: str, by_split: bool) -> Any:
        def make(
            root: str, train: bool = True, split: str = "train", download: bool = False
        ) -> Published:
            part = split if by_split else "train" if train else "test"
            held = Published(root, part, download, state.error)
            getattr(held, fill)()
            return held

        return make

    module: Any = ModuleType("torchvision.datasets")
    module.MNIST = module.FashionMNIST = maker("mnist", False)
    module.CIFAR10, module.SVHN = maker("cifar", False), maker("svhn", True)
    module.CelebA = maker("faces", True)
    monkeypatch.setitem(sys.modules, "torchvision", ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.datasets", module)
    monkeypatch.setenv("BILEVEL_CACHE", str(state.cache))
    return state


@pytest.mark.usefixtures("torchvision")
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("mnist", (1, 28, 28)),
        ("fashion-mnist", (1, 28, 28)),
        ("cifar10", (3, 32, 32)),
        ("svhn", (3, 32, 32)),
    ],
)
def test_published_sets_come_as_bytes(name: str, shape: tuple[int, int, int]) -> None:
    images = load_images(name)
    assert images.train.shape == (20, *shape)
    assert images.test.shape == (6, *shape)
    assert images.train.dtype == torch.uint8
    assert images.train.is_contiguous()
    pixels = random(20).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
    expected = torch.from_numpy(pixels).permute(0, 3, 1, 2)[:, : shape[0], : shape[1], : shape[2]]
    assert torch.equal(images.train, expected)
    assert images.test_labels is not None
    assert images.test_labels.tolist() == list(range(6))
    assert (images.name, images.source) == (name, name)


def test_faces_are_cut_and_split_as_bidvl_does(
    torchvision: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bilevel.methods.data.published._FACES_SPLIT", (6, 2))
    images = load_images("celeba32")
    assert (len(images.train), len(images.test)) == (6, 2)
    assert images.shape == (3, 32, 32)
    assert "218x178 pixels cut to the centre's 160x160, resized to 32x32" in images.note
    assert "6 training and 2 test images drawn with seed 0" in images.note
    files = sorted((torchvision.cache / "celeba" / "img_align_celeba").iterdir())
    drawn = torch.randperm(9, generator=torch.Generator().manual_seed(0))[0]
    with Image.open(files[drawn]) as image:
        first = image.crop((9, 29, 169, 189)).resize((32, 32), Image.Resampling.BILINEAR)
    assert torch.equal(images.train[0], torch.from_numpy(np.array(first)).permute(2, 0, 1))
    archive = torchvision.cache / "celeba" / "img_align_celeba.zip"
    as_zip(archive.with_suffix(""), archive, "img_align_celeba/")
    torchvision.error = OSError("nothing is to be downloaded again")
    assert torch.equal(load_images("celeba32").train, images.train)
    assert len(load_images("celeba64", limit=3).train) == 3
    with pytest.raises(ValueError, match="leave `side=64` out"):
        load_images("celeba32", side=64)


def test_a_set_that_is_not_whole_is_refused(torchvision: SimpleNamespace) -> None:
    with pytest.raises(ValueError, match="holds 9 images, fewer than the 51,000"):
        load_images("celeba64")
    assert torchvision.cache.exists()


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("mnist", "MNIST/raw/t10k-labels-idx1-ubyte.gz"),
        ("cifar10", "cifar-10-python.tar.gz"),
        ("svhn", "test_32x32.mat"),
        ("celeba64", "celeba/img_align_celeba.zip"),
    ],
)
@pytest.mark.parametrize("error", [OSError("no route"), RuntimeError("no route\nat all")])
def test_an_impossible_download_names_the_files_to_place(
    torchvision: SimpleNamespace, name: str, file: str, error: Exception
) -> None:
    torchvision.error = error
    with pytest.raises(FileNotFoundError, match=r"cannot be downloaded \(no route\)") as caught:
        load_images(name)
    assert str(torchvision.cache / file) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, r"is not installed; install it with `pip install 'bilevel\[images\]'`"),
        ("raise RuntimeError('operator torchvision::nms does not exist')", "nms does not exist"),
        ("import torchvision_extension", "does not load with torch .*torchvision_extension"),
    ],
)
def test_a_missing_or_broken_torchvision_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None, words: str
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    if content is None:
        monkeypatch.setitem(sys.modules, "torchvision", None)
    else:
        (tmp_path / "torchvision").mkdir()
        (tmp_path / "torchvision" / "__init__.py").write_text(content)
        monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match=words):
        load_images("cifar10")


# ---------------------------------------------------------------------- out of distribution


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


def test_outsiders_of_bytes_are_floats() -> None:
    v = some_bytes(5, 3)
    seeded = [torch.Generator().manual_seed(1) for _ in range(6)]
    for index, make in enumerate((shuffled_pixels, uniform_noise, constant_images)):
        outside = make(v, seeded[2 * index])
        assert torch.equal(outside, make(scaled(v), seeded[2 * index + 1]))
        assert outside.shape == v.shape
        assert outside.abs().max() <= 1
    assert torch.equal(inverted(v), -scaled(v))


def test_constant_images_have_one_colour_each() -> None:
    images = constant_images(torch.zeros(50, 3, 8, 8), torch.Generator().manual_seed(0))
    colours = images[:, :, 0, 0]
    assert torch.equal(images, colours[:, :, None, None].expand(-1, -1, 8, 8))
    assert len(colours.unique()) == 150
    assert colours.min() < -0.9
    assert colours.max() > 0.9

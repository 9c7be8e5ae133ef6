"""Images from folders and archives: order, sizes, and files that cannot be read."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bilevel.methods.data.images import load_images
from tests.methods.data.files import as_zip, npz, random, write


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


def test_many_files_keep_their_order(tmp_path: Path) -> None:
    """Threads take 32 files at a time, and 32 times before the pixels are written to their place."""
    numbers = np.arange(1100)
    for i in numbers:
        pixels = np.full((8, 8), i // 256, np.uint8)
        pixels[0, 0] = i % 256
        (tmp_path / "train").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "train" / f"{i:04}.png", compress_level=0)
    (tmp_path / "test").mkdir()
    Image.fromarray(pixels).save(tmp_path / "test" / "0.png")
    found = load_images(tmp_path).train.numpy().astype(int)
    assert (256 * found[:, 0, 1, 1] + found[:, 0, 0, 0]).tolist() == numbers.tolist()


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

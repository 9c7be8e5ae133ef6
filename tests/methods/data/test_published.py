"""Published sets by name: what comes out of torchvision, and what is said where it cannot be had."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bilevel.methods.data import published
from bilevel.methods.data.images import load_images
from bilevel.methods.data.pixels import Frame, Raw
from tests.methods.data.files import as_zip, random, write


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


def test_faces_are_cut_and_split_as_bidvl_does(torchvision: SimpleNamespace) -> None:
    def faces(name: str = "celeba32", limit: int | None = None) -> Raw:
        return published.read(name, Frame(), limit, faces=(6, 2))

    raw = faces()
    train, test = raw.parts
    assert train.shape == (6, 3, 32, 32)
    assert test.shape == (2, 3, 32, 32)
    assert any(
        "218x178 pixels cut to the centre's 160x160, resized to 32x32" in n for n in raw.notes
    )
    assert "6 training and 2 test images drawn with seed 0" in raw.notes
    files = sorted((torchvision.cache / "celeba" / "img_align_celeba").iterdir())
    drawn = torch.randperm(9, generator=torch.Generator().manual_seed(0))[0]
    with Image.open(files[drawn]) as image:
        first = image.crop((9, 29, 169, 189)).resize((32, 32), Image.Resampling.BILINEAR)
    assert torch.equal(train[0], torch.from_numpy(np.array(first)).permute(2, 0, 1))
    archive = torchvision.cache / "celeba" / "img_align_celeba.zip"
    as_zip(archive.with_suffix(""), archive, "img_align_celeba/")
    torchvision.error = OSError("nothing is to be downloaded again")
    assert torch.equal(faces().parts[0], train)
    assert [len(part) for part in faces("celeba64", limit=3).parts] == [3, 2]
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

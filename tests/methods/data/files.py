"""Image files and arrays on disk."""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image


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


def as_zip(folder: Path, path: Path, prefix: str = "") -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*.*")):
            archive.write(file, prefix + file.relative_to(folder).as_posix())
        archive.writestr("__MACOSX/._0.png", b"no image")
    return path


def some_bytes(n: int = 20, channels: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (n, channels, 8, 8), generator=generator, dtype=torch.uint8)

"""Pictures: every pixel is shown, and short or odd records are drawn."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bilevel.methods.report.pictures import (
    save_curves,
    save_evaluations,
    save_grid,
    save_reconstructions,
)


def ink(path: Path) -> int:
    """Pixels that are not white."""
    with Image.open(path) as picture:
        return int((np.asarray(picture.convert("L")) < 255).sum())


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
    save_reconstructions(v, -v, tmp_path / "pairs.png", columns=3, scale=2)
    with Image.open(tmp_path / "pairs.png") as picture:
        pixels = np.asarray(picture)
    first = pixels[gap : gap + 2 * 16 + 1, gap : gap + 16]  # half a gap within a pair
    assert (first[:16] == 255).all()
    assert (first[17:] == 0).all()
    colours = torch.cat([v, -v, v], dim=1)
    save_grid(colours, tmp_path / "colour.png", columns=3, scale=2)
    with Image.open(tmp_path / "colour.png") as picture:
        assert picture.getpixel((gap, gap)) == (255, 0, 255)
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
    for name in ("lower_loss", "own_term"):  # a line, and a panel of a name of the loss's own
        less = [{k: v for k, v in record.items() if k != name} for record in records]
        save_curves(less, tmp_path / "less.png")
        assert ink(tmp_path / "less.png") < ink(tmp_path / "curves.png"), name
    with pytest.raises(ValueError, match="no records"):
        save_curves([], tmp_path / "curves.png")


def test_evaluations_are_drawn_whatever_they_hold(tmp_path: Path) -> None:
    records = [
        {"step": 10, "frechet": 90.0, "frechet_reference": 3.0, "rmse": 0.3, "auroc_svhn": 0.4},
        {"step": 20, "frechet": 9.0, "frechet_reference": 3.0, "auroc_uniform": 1.0},
    ]
    save_evaluations(records, tmp_path / "evaluations.png")
    for name in ("frechet_reference", "rmse", "auroc_svhn"):
        less = [{k: v for k, v in record.items() if k != name} for record in records]
        save_evaluations(less, tmp_path / "less.png")
        assert ink(tmp_path / "less.png") < ink(tmp_path / "evaluations.png"), name
    with pytest.raises(ValueError, match="no records"):
        save_evaluations([], tmp_path / "evaluations.png")

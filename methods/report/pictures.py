"""Pictures of a run: grids of images, reconstructions beside their originals, training curves."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from bilevel.extras import MISSING
from bilevel.files import replacing
from bilevel.methods.data.grids import above, beside, framed, grid, tiles
from bilevel.methods.training.curves import draw_panels, evaluation_panels, loss_panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def save_grid(
    images: Tensor,
    path: str | os.PathLike[str],
    *,
    columns: int | None = None,
    scale: int | None = None,
) -> None:
    """Images in rows, left to right and top to bottom, as one PNG.

    Args:
        images: bytes or in [-1, 1], shape (n, 1 or 3, height, width).
        path: file to write.
        columns: images in a row; as many as make the picture a little wider than high by default.
        scale: whole factor each pixel is enlarged by; small images are made visible by default.

    Raises:
        ValueError: if there are no images, or not of 1 or 3 channels.
        ImportError: if Pillow is not installed.
    """
    _write(grid(images, columns, scale), path)


def save_reconstructions(
    originals: Tensor,
    reconstructions: Tensor,
    path: str | os.PathLike[str],
    *,
    columns: int = 12,
    scale: int | None = None,
) -> None:
    """Pairs as one PNG: each original with its reconstruction right below it.

    Args:
        originals: bytes or in [-1, 1], shape (n, 1 or 3, height, width).
        reconstructions: likewise, in the same order.
        path: file to write.
        columns: pairs in a row.
        scale: whole factor each pixel is enlarged by.

    Raises:
        ValueError: if the shapes differ.
        ImportError: if Pillow is not installed.
    """
    if originals.shape != reconstructions.shape:
        raise ValueError(
            f"there are originals of shape {tuple(originals.shape)} but reconstructions of shape "
            f"{tuple(reconstructions.shape)}; give one for each"
        )
    first, second = tiles(originals, scale), tiles(reconstructions, scale)
    columns = max(1, min(columns, len(first)))
    gap = max(2, first.shape[1] // 16)
    pairs = []
    for i in range(0, len(first), columns):
        both = [beside(part[i : i + columns], gap, columns) for part in (first, second)]
        pairs.append(above(both, max(1, gap // 2)))
    _write(framed(above(pairs, 3 * gap), gap), path)


def save_curves(records: Sequence[dict[str, Any]], path: str | os.PathLike[str]) -> None:
    """What training recorded against the step, one panel per kind of number, as one PNG.

    Args:
        records: lines of a run's metrics, each a dict with `step`.
        path: file to write.

    Raises:
        ValueError: if there are no records.
        ImportError: if matplotlib is not installed.
    """
    _save(draw_panels(records, loss_panels(records)), path)


def save_evaluations(records: Sequence[dict[str, Any]], path: str | os.PathLike[str]) -> None:
    """What evaluations during training found against the step, one panel per kind of number, as one PNG.

    Args:
        records: lines of a run's evaluations, each a dict with `step` and what `evaluate` returned.
        path: file to write.

    Raises:
        ValueError: if there are no records.
        ImportError: if matplotlib is not installed.
    """
    _save(draw_panels(records, evaluation_panels(records)), path)


def _save(figure: "Figure", path: str | os.PathLike[str]) -> None:
    with replacing(path) as file:
        figure.savefig(cast(Any, file), format="png")


def _write(picture: NDArray[np.uint8], path: str | os.PathLike[str]) -> None:
    try:
        from PIL import Image
    except ImportError:
        raise ImportError(MISSING.format("Pillow")) from None
    with replacing(path) as file:
        Image.fromarray(picture).save(cast(Any, file), format="PNG", optimize=True)

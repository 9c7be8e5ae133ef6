"""Pictures of a run: grids of images, reconstructions beside their originals, training curves."""

import math
import os
from collections.abc import Sequence
from typing import Any, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from bilevel.files import replacing
from bilevel.methods.data.images import scaled

_SMALLEST = 48  # pixels of an image's side in a picture, at least
_GAP = 232  # light grey: images on black and on white stand out from it
_MISSING = "drawing needs {}; install it with `pip install 'bilevel[report]'`"


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
    tiles = _tiles(images, scale)
    columns = columns if columns is not None else math.ceil(math.sqrt(1.6 * len(tiles)))
    columns = max(1, min(columns, len(tiles)))
    gap = max(2, tiles.shape[1] // 16)
    rows = [_beside(tiles[i : i + columns], gap, columns) for i in range(0, len(tiles), columns)]
    _write(_framed(_above(rows, gap), gap), path)


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
    above, below = _tiles(originals, scale), _tiles(reconstructions, scale)
    columns = max(1, min(columns, len(above)))
    gap = max(2, above.shape[1] // 16)
    pairs = []
    for i in range(0, len(above), columns):
        both = [_beside(tiles[i : i + columns], gap, columns) for tiles in (above, below)]
        pairs.append(_above(both, max(1, gap // 2)))
    _write(_framed(_above(pairs, 3 * gap), gap), path)


def save_curves(records: Sequence[dict[str, Any]], path: str | os.PathLike[str]) -> None:
    """What training recorded against the step, one panel per kind of number, as one PNG.

    Args:
        records: lines of a run's metrics, each a dict with `step`.
        path: file to write.

    Raises:
        ValueError: if there are no records.
        ImportError: if matplotlib is not installed.
    """
    names = {name for record in records for name, value in record.items() if value is not None}
    drawn = {name for _, lines, _ in _PANELS for name in lines.values()} | _NOT_DRAWN
    rest = [(name.replace("_", " "), {name: name}, False) for name in sorted(names - drawn)]
    _save_panels(records, [*_PANELS, *rest], path)


def save_evaluations(records: Sequence[dict[str, Any]], path: str | os.PathLike[str]) -> None:
    """What evaluations during training found against the step, one panel per kind of number, as one PNG.

    Args:
        records: lines of a run's evaluations, each a dict with `step` and what `evaluate` returned.
        path: file to write.

    Raises:
        ValueError: if there are no records.
        ImportError: if matplotlib is not installed.
    """
    kinds = dict.fromkeys(
        name for record in records for name in record if name.startswith("auroc_")
    )
    energies = {name.removeprefix("auroc_").replace("_", " "): name for name in kinds}
    panels = [*_EVALUATIONS, ("AUROC of the energy against", energies, False)]
    _save_panels(records, panels, path)


_Panel: TypeAlias = tuple[str, dict[str, str], bool]  # title, lines (label to name), logarithmic


def _save_panels(
    records: Sequence[dict[str, Any]], panels: Sequence[_Panel], path: str | os.PathLike[str]
) -> None:
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter
    except ImportError:
        raise ImportError(_MISSING.format("matplotlib")) from None
    if not records:
        raise ValueError("there are no records to draw; train for at least `log_every` steps")
    panels = _with_values(records, panels)
    columns = max(1, min(3, len(panels)))
    rows = max(1, math.ceil(len(panels) / columns))
    figure = Figure(figsize=(4.2 * columns, 3.0 * rows), dpi=120, layout="constrained")
    for index, (title, lines, logarithmic) in enumerate(panels):
        axes = figure.add_subplot(rows, columns, index + 1)
        for number, (label, name) in enumerate(lines.items()):
            points = [(r["step"], r[name]) for r in records if r.get(name) is not None]
            steps, values = zip(*points, strict=True)
            marker, colour = "o" if len(points) < 3 else None, _COLOURS[number % len(_COLOURS)]
            axes.plot(steps, values, label=label, color=colour, linewidth=1.6, marker=marker)
        axes.set_title(title, fontsize=11, loc="left")
        axes.set_xlabel("step", fontsize=9)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if logarithmic:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
        if len(lines) > 1:
            axes.legend(fontsize=8, frameon=False)
    with replacing(path) as file:
        figure.savefig(cast(Any, file), format="png")


_COLOURS = ("#1f6fb4", "#d9652b", "#3c9a5f", "#8a5fb0", "#b04a63", "#5b6670")
_PANELS: tuple[_Panel, ...] = (
    ("energy", {"data": "energy_data", "samples": "energy_samples"}, False),
    ("losses", {"upper": "upper_loss", "lower": "lower_loss"}, False),
    ("squared error of an image", {"reconstruction": "reconstruction"}, True),
    ("squared error of a latent", {"latent reconstruction": "latent_reconstruction"}, True),
    ("gradient norm", {"direct term": "direct_norm", "response term": "response_norm"}, True),
)
_EVALUATIONS: tuple[_Panel, ...] = (
    (
        "Fréchet distance of samples",
        {
            "to held-out images": "frechet",
            "batch statistics": "frechet_batch",
            "running averages": "frechet_running",
            "training images": "frechet_reference",
        },
        True,
    ),
    (
        "samples among images, images among samples",
        {name: name for name in ("precision", "recall", "coverage")},
        False,
    ),
    ("share of the rarest class", {"samples": "smallest_class_share"}, False),
    (
        "RMSE of reconstructions",
        {"RMSE": "rmse", "batch statistics": "rmse_batch", "running averages": "rmse_running"},
        False,
    ),
)
_NOT_DRAWN = {"step", "seconds"}


def _with_values(records: Sequence[dict[str, Any]], panels: Sequence[_Panel]) -> list[_Panel]:
    """The panels and lines there are values for; logarithmic only where that helps."""

    def values(name: str) -> list[float]:
        return [record[name] for record in records if record.get(name) is not None]

    found = []
    for title, lines, logarithmic in panels:
        kept = {label: name for label, name in lines.items() if values(name)}
        if logarithmic:  # a term that is exactly 0, such as a dropped one, has no place on it
            kept = {label: name for label, name in kept.items() if min(values(name)) > 0}
        if kept:
            everything = [value for name in kept.values() for value in values(name)]
            wide = logarithmic and max(everything) > 5 * min(everything)
            found.append((title, kept, wide))
    return found


def _tiles(images: Tensor, scale: int | None) -> NDArray[np.uint8]:
    """Enlarged images as bytes, shape (n, height, width, 3)."""
    if images.ndim != 4 or len(images) == 0 or images.shape[1] not in (1, 3):
        raise ValueError(
            "a picture is made of images of shape (n, 1 or 3, height, width), n at least 1, "
            f"got {tuple(images.shape)}"
        )
    if scale is None:
        scale = max(1, math.ceil(_SMALLEST / max(images.shape[2:])))
    values = (
        scaled(images).detach().cpu().float().clamp(-1, 1).add(1).mul(127.5).round().byte().numpy()
    )
    values = np.broadcast_to(
        values.transpose(0, 2, 3, 1), (*values.shape[:1], *values.shape[2:], 3)
    )
    return values.repeat(scale, axis=1).repeat(scale, axis=2)


def _beside(tiles: NDArray[np.uint8], gap: int, columns: int) -> NDArray[np.uint8]:
    """A row, filled up with nothing to `columns` tiles."""
    _, height, width, _ = tiles.shape
    row = np.full((height, columns * (width + gap) - gap, 3), _GAP, np.uint8)
    for k, tile in enumerate(tiles):
        row[:, k * (width + gap) : k * (width + gap) + width] = tile
    return row


def _above(rows: Sequence[NDArray[np.uint8]], gap: int) -> NDArray[np.uint8]:
    space = np.full((gap, rows[0].shape[1], 3), _GAP, np.uint8)
    return np.concatenate([part for row in rows for part in (row, space)][:-1])


def _framed(picture: NDArray[np.uint8], gap: int) -> NDArray[np.uint8]:
    return np.pad(picture, ((gap, gap), (gap, gap), (0, 0)), constant_values=_GAP)


def _write(picture: NDArray[np.uint8], path: str | os.PathLike[str]) -> None:
    try:
        from PIL import Image
    except ImportError:
        raise ImportError(_MISSING.format("Pillow")) from None
    with replacing(path) as file:
        Image.fromarray(picture).save(cast(Any, file), format="PNG", optimize=True)

"""Figures of a suite: likelihood against steps and seconds, densities, filters, samples."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import numpy as np
import torch
from numpy.typing import NDArray

from bilevel.extras import MISSING
from bilevel.files import replacing
from bilevel.methods.eblvm import EBLVM
from bilevel.methods.suite.job import Job
from bilevel.methods.suite.judge import log_density
from bilevel.methods.suite.tables import CellRecord, Group

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_Array: TypeAlias = NDArray[np.float64]
_COLOURS = (
    *("#1f6fb4", "#d9652b", "#3c9a5f", "#8a5fb0", "#b8860b", "#c2407d"),
    *("#3aa6b9", "#7a4a2b", "#6b7f1a", "#8c1d18", "#4b4f9e", "#777777"),
)
_DASHES = ("-", "--", ":")
_GRID = 160  # points of a heat map along a side
_MARGIN = 0.12  # of the data's range, around it
_TILES = 16  # filters or samples of a method


def draw_curves(group: Group, records: Sequence[CellRecord], path: Path) -> None:
    """Test log-likelihood against steps and against seconds, mean and range over the seeds.

    Args:
        group: the table whose methods are drawn.
        records: at least those of the group.
        path: PNG file to write.
    """
    figure = _figure(11, 4.2)
    left, right = figure.subplots(1, 2, sharey=True)
    ends: list[float] = []
    for index, row in enumerate(group.rows):
        traces = [
            np.array([[math.nan if x is None else x for x in point] for point in record["trace"]])
            for record in records
            if record["data"]["name"] == group.data
            and record["model"]["name"] == group.model
            and record["method"]["name"] == row.method
            and record["status"] == "finished"
        ]
        traces = [trace[trace[:, 0] > 0] for trace in traces if len(trace) > 1]
        if not traces:
            continue
        style = {
            "color": _COLOURS[index % len(_COLOURS)],
            "linestyle": _DASHES[index // len(_COLOURS) % len(_DASHES)],
        }
        for axes, column in ((left, 0), (right, 1)):
            ends.append(_band(axes, traces, column, row.method, style))
    for axes, name in ((left, "step"), (right, "seconds of training")):
        _logarithmic(axes)
        axes.set_xlabel(name)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    _limit((left, right), ends, group.ceiling)
    for axes in (left, right):
        if group.ceiling is not None:
            axes.axhline(group.ceiling, color="#555555", linewidth=1, linestyle=(0, (1, 2)))
    left.set_ylabel("test log-likelihood in nats")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=9)
    figure.suptitle(group.title, fontsize=11, x=0.01, ha="left")
    with replacing(path) as file:
        figure.savefig(cast(Any, file), format="png")


def _band(
    axes: "Axes", traces: Sequence[_Array], column: int, label: str, style: Mapping[str, Any]
) -> float:
    """Draw the mean over the seeds and their range; return where the mean ends."""
    grid = np.median(np.stack([t[: min(map(len, traces)), column] for t in traces]), axis=0)
    if column == 0:
        values = np.stack([t[: len(grid), 2] for t in traces])
    else:  # the same steps take other times from other seeds
        values = np.stack([np.interp(grid, t[:, 1], t[:, 2]) for t in traces])
    mean = values.mean(0)
    axes.plot(grid, mean, label=label, linewidth=1.7, **style)
    if len(traces) > 1:
        axes.fill_between(
            grid, values.min(0), values.max(0), color=style["color"], alpha=0.15, linewidth=0
        )
    return float(mean[-1])


def _logarithmic(axes: "Axes") -> None:
    """A logarithmic horizontal axis with plain numbers."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _limit(both: "Sequence[Axes]", ends: Sequence[float], ceiling: float | None) -> None:
    """Axes on which the ends of the curves are far apart: early values may be left out."""
    finite = [end for end in ends if math.isfinite(end)]
    if not finite:
        return
    top, low = (max(finite) if ceiling is None else ceiling), float(np.quantile(finite, 0.1))
    room = (
        2.0 if ceiling is None else 0.9
    )  # a ceiling that no curve reaches leaves room above already
    bottom = low - room * max(top - low, 0.5)
    for axes in both:
        axes.set_ylim(bottom, top + 0.08 * (top - bottom))
        seen = [np.asarray(line.get_data(), float) for line in axes.get_lines()]
        visible = np.concatenate([x[(y > bottom) & (x > 0)] for x, y in seen])
        if len(visible):
            axes.set_xlim(left=0.8 * visible.min())


def draw_densities(jobs: Mapping[str, Job], title: str, path: Path) -> None:
    """Heat maps of the data and of every method's model, exact, on one scale.

    Args:
        jobs: trained cells on the same data from a density on the plane, by method.
        title: of the figure.
        path: PNG file to write.
    """
    table = next(iter(jobs.values())).table
    assert table.density is not None
    low, high = float(table.test.min()), float(table.test.max())
    low, high = low - _MARGIN * (high - low), high + _MARGIN * (high - low)
    axis = torch.linspace(low, high, _GRID)
    points = torch.cartesian_prod(axis, axis)
    maps = {"data": table.density.log_prob(points).exp().view(_GRID, _GRID).numpy()}
    maps |= {
        name: log_density(job, points).exp().view(_GRID, _GRID).numpy()
        for name, job in jobs.items()
    }
    brightest = max(float(np.quantile(values, 0.999)) for values in maps.values())
    figure, panels = _panels(len(maps))
    for panel, (name, values) in zip(panels, maps.items(), strict=False):
        panel.imshow(values.T, origin="lower", cmap="magma", vmin=0, vmax=brightest)
        panel.set_title(name, fontsize=10, loc="left")
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    with replacing(path) as file:
        figure.savefig(cast(Any, file), format="png")


def draw_filters(jobs: Mapping[str, Job], title: str, path: Path) -> bool:
    """Weights of the first hidden units as images, the strongest first; red is positive.

    Args:
        jobs: trained cells on the same images, by method.
        title: of the figure.
        path: PNG file to write.

    Returns:
        Whether there was a machine with weights to draw.
    """
    rows = {}
    for name, job in jobs.items():
        if job.learner.latent_model.machine is None:
            continue
        filters = job.machine.first_weight.detach().cpu().mT
        order = filters.square().sum(1).argsort(descending=True)
        rows[name] = filters[order[:_TILES]].double().numpy()
    if rows:
        scales = {name: float(np.abs(tiles).max()) or 1.0 for name, tiles in rows.items()}
        _mosaic(rows, _image(jobs), title, path, "RdBu_r", {n: (-s, s) for n, s in scales.items()})
    return bool(rows)


def draw_samples(jobs: Mapping[str, Job], title: str, path: Path) -> None:
    """Samples of every method as images, below some rows of the data.

    Args:
        jobs: trained cells on the same images, by method.
        title: of the figure.
        path: PNG file to write.
    """
    job = next(iter(jobs.values()))
    spread = torch.linspace(0, len(job.table.test) - 1, _TILES).long()
    rows = {"data": job.table.test[spread].double().numpy()}
    for name, job in jobs.items():
        rows[name] = _samples(job.learner).double().numpy()
    low, high = float(rows["data"].min()), float(rows["data"].max())
    limits = dict.fromkeys(rows, (low, high))
    _mosaic(rows, _image(jobs), title, path, "gray", limits)


def _samples(learner: EBLVM) -> torch.Tensor:
    generator = torch.Generator(learner.device).manual_seed(0)
    return learner.sample(_TILES, generator).cpu()


def _image(jobs: Mapping[str, Job]) -> tuple[int, int]:
    shape = next(iter(jobs.values())).cell.data.image
    assert shape is not None
    return shape


def _mosaic(
    rows: Mapping[str, _Array],
    shape: tuple[int, int],
    title: str,
    path: Path,
    colours: str,
    limits: Mapping[str, tuple[float, float]],
) -> None:
    """A row of images per name."""
    height, width = shape
    columns = max(map(len, rows.values()))
    figure = _figure(11, 1.0 + len(rows) * 9.6 / columns * height / width)
    panels = figure.subplots(len(rows), 1, squeeze=False)[:, 0]
    for panel, (name, tiles) in zip(panels, rows.items(), strict=True):
        low, high = limits[name]
        strip = np.full((height, columns * (width + 1) - 1), np.nan)
        for k, tile in enumerate(tiles):
            strip[:, k * (width + 1) : k * (width + 1) + width] = tile.reshape(shape)
        panel.imshow(strip, cmap=colours, vmin=low, vmax=high, interpolation="nearest")
        panel.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
        _bare(panel)
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    with replacing(path) as file:
        figure.savefig(cast(Any, file), format="png")


def _panels(count: int) -> "tuple[Figure, list[Axes]]":
    columns = min(5, count)
    rows = math.ceil(count / columns)
    figure = _figure(11, 0.5 + rows * 2.4)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for panel in panels[count:]:
        panel.set_visible(False)
    for panel in panels:
        _bare(panel)
    return figure, panels


def _bare(panel: "Axes") -> None:
    panel.set_xticks([])
    panel.set_yticks([])
    panel.spines[:].set_visible(False)


def _figure(width: float, height: float) -> "Figure":
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError(MISSING.format("matplotlib")) from None
    return Figure(figsize=(width, height), dpi=110, layout="constrained")

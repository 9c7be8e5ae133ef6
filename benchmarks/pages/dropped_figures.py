"""The figures of `benchmarks.dropped_term`, from its records."""

from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.figure import Figure

from benchmarks.pages.dropped_records import SOLVERS, BySolver, per_seed, title

COLOURS = ("#1f6fb4", "#b9a13a", "#3c9a5f", "#8a5fb0", "#d9652b", "#555555")
SHOWN = ("tables-kl-1", "limited-symmetric-10", "rbm-kl", "bism-checkerboard-exact")
KEPT, WHOLE = COLOURS[0], COLOURS[4]
FAINT = {"color": "black", "linewidth": 0.8, "linestyle": ":"}


def panels(found: dict[str, BySolver], height: float, rows: int) -> tuple[Figure, dict[str, Any]]:
    """A figure, and a column of axes for every problem that is shown."""
    shown = [name for name in SHOWN if name in found]
    figure = Figure(figsize=(3.4 * len(shown), height), dpi=120, layout="constrained")
    columns = dict(zip(shown, figure.subplots(rows, len(shown), squeeze=False).T, strict=True))
    for name, column in columns.items():
        column[0].set_title(title(found[name]), fontsize=9, loc="left")
    return figure, columns


def draw_likelihoods(found: dict[str, BySolver], path: Path) -> None:
    """Likelihood against steps (above) and against seconds (below)."""
    figure, columns = panels(found, 5.6, 2)
    drawn = {}
    for name, column in columns.items():
        for coordinate, label in enumerate(("upper step", "seconds")):
            panel = column[coordinate]
            likelihood_curves(panel, found[name], coordinate)
            finish(panel, label)
            if column is next(iter(columns.values())):
                panel.set_ylabel("exact log-likelihood", fontsize=9)
        drawn.update(dict(zip(*reversed(column[0].get_legend_handles_labels()), strict=True)))
    labels = [name for name in SOLVERS if name in drawn]
    figure.legend(
        [drawn[name] for name in labels],
        labels,
        loc="outside lower center",
        ncols=len(labels),
        fontsize=9,
        frameon=False,
    )
    figure.savefig(path)


def likelihood_curves(panel: Any, solvers: BySolver, coordinate: int) -> None:
    """Mean and range over the seeds under every solver, and the ceiling.

    Args:
        panel: axes.
        solvers: the records of one problem.
        coordinate: 0 for steps, 1 for seconds.
    """
    bottoms, tops = [], []
    for solver, colour in zip(SOLVERS, COLOURS, strict=True):
        if solver not in solvers:
            continue
        curves = per_seed(solvers[solver], "log_likelihood")
        xs = [point[coordinate] for point in curves[0]]
        values = list(zip(*[[v for _, _, v in curve] for curve in curves], strict=True))
        centre = [mean(v) for v in values]
        panel.plot(xs, centre, color=colour, label=solver, linewidth=1.6)
        low, high = [min(v) for v in values], [max(v) for v in values]
        panel.fill_between(xs, low, high, color=colour, alpha=0.13, linewidth=0)
        bottoms.append(min(centre))
        tops.append(max(high))
    ceiling = next(iter(solvers.values()))["ceiling"]
    if ceiling is not None:
        panel.axhline(ceiling, **FAINT)
        tops.append(ceiling)
    top, bottom = max(tops), min(bottoms)
    panel.set_ylim(bottom - 0.05 * (top - bottom), top + 0.08 * (top - bottom))


def draw_probe(found: dict[str, BySolver], path: Path) -> None:
    """Along the run of `Alternating`: the dropped term's size and angle, and what it is good for."""
    figure, columns = panels(found, 7.2, 3)
    for name, (sizes, angles, use) in columns.items():
        curves = per_seed(found[name]["Alternating"], "probe")
        probe_curves(sizes, curves, "ratio", KEPT, positive=True)
        probe_curves(angles, curves, "angle_cosine", KEPT)
        probe_curves(use, curves, "kept_along", KEPT, label="kept term")
        probe_curves(use, curves, "whole_along", WHOLE, label="kept + dropped")
        for panel in (sizes, angles, use):
            finish(panel, "upper step")
        sizes.set_yscale("log")
        sizes.axhline(1, **FAINT)
        for panel in (angles, use):
            panel.set_ylim(-1.08, 1.08)
            panel.axhline(0, **FAINT)
    first = next(iter(columns.values()))
    for panel, label in zip(
        first,
        ("norm of dropped / kept", "cosine between the two", "cosine with the exact gradient"),
        strict=True,
    ):
        panel.set_ylabel(label, fontsize=9)
    first[2].legend(fontsize=8, loc="lower right")
    figure.savefig(path)


def probe_curves(
    panel: Any,
    curves: list[list[tuple[int, float, Any]]],
    quantity: str,
    colour: str,
    *,
    label: str | None = None,
    positive: bool = False,
) -> None:
    """One curve for every seed; the label is the first one's."""
    for seed, curve in enumerate(curves):
        points = [(step, probe[quantity]) for step, _, probe in curve]
        known = [(s, v) for s, v in points if v is not None and (v > 0 or not positive)]
        steps, values = zip(*known, strict=True)
        style: dict[str, Any] = {"linewidth": 1.2, "marker": ".", "markersize": 4, "alpha": 0.8}
        panel.plot(steps, values, color=colour, label=None if seed else label, **style)


def finish(panel: Any, label: str) -> None:
    panel.set_xscale("log")
    panel.set_xlabel(label, fontsize=9)
    panel.tick_params(labelsize=8)
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)

"""The figure of `benchmarks.convex`: error against oracle calls and against time."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.pages.convex import runs

COLOURS = (
    "#d9652b", "#3c9a5f", "#1f6fb4", "#8a5fb0", "#b9a13a", "#555555",
    "#c44e8a", "#4fb3bf", "#9c6b3f", "#7a9a2f", "#999999",
)  # fmt: skip


def draw(records: Path, path: Path) -> None:
    """Medians over the seeds, and the error of the solution in single precision."""
    found = runs(records)
    figure = Figure(figsize=(9, 3.8), dpi=120, layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    floor = float(np.median([r["floor"] for of in found.values() for r in of]))
    for panel, place, label in zip(
        panels, (1, 2), ("calls to oracles", "processor seconds"), strict=True
    ):
        for (solver, of), colour in zip(found.items(), COLOURS, strict=False):
            curve(panel, [r["points"] for r in of], place, label=solver, color=colour)
        panel.axhline(floor, color="black", linewidth=0.8, linestyle=":")
        panel.set_yscale("log")
        panel.set_xlabel(label, fontsize=9)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("squared norm of the hypergradient", fontsize=9)
    panels[0].annotate(
        "the solution in single precision", (0.02, floor), xycoords=("axes fraction", "data"),
        fontsize=7, va="bottom",
    )  # fmt: skip
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        loc="outside right center",
        fontsize=8,
        frameon=False,
    )
    figure.savefig(path)


def curve(panel: Any, points: Sequence[Any], place: int, **style: Any) -> None:
    """The median over runs that have equally many points."""
    length = min(map(len, points))
    whole = np.array([p[:length] for p in points])
    panel.plot(np.median(whole[:, :, place], 0), np.median(whole[:, :, 3], 0), lw=1.3, **style)

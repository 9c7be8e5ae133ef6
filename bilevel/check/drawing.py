"""The figure of a comparison: relative error against time, and the memory of each solver."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from bilevel.check.comparison import SolverRow, memory_in_words
from bilevel.extras import shown_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = ("#1f6fb4", "#d9652b", "#3c9a5f", "#8a5fb0", "#b04a63", "#5b6670")
_MARKERS = "osD^v"  # a colour comes again with another marker
_NAME = 34  # characters of a name


def draw_comparison(rows: Sequence[SolverRow]) -> "Figure":
    """A panel with a point for each solver, and one that names them and shows their memory.

    Args:
        rows: of the comparison.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    figure_class = shown_figure()
    height = max(3.2, 1.5 + 0.27 * len(rows))
    figure = figure_class(figsize=(9.6, height), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.3, 1))
    # the best first, those without an answer last
    order = sorted(rows, key=lambda r: (r.relative_error is None, r.relative_error or 0.0))
    looks = {
        row.name: {
            "color": _COLOURS[k % len(_COLOURS)],
            "marker": _MARKERS[k // len(_COLOURS) % len(_MARKERS)],
        }
        for k, row in enumerate(order)
    }
    _draw_errors(left, order, looks)
    _draw_memory(right, order, looks)
    return figure


def _draw_errors(axes: "Axes", rows: Sequence[SolverRow], looks: dict[str, Any]) -> None:
    """Error against time, both logarithmic. A hollow point lies at what its error is below."""
    axes.set_title("relative error against time of a call", fontsize=11, loc="left")
    hollow = False
    shown = [
        r
        for r in rows
        if r.seconds and r.relative_error_interval and r.relative_error_interval[1] > 0
    ]
    for row in shown:
        low, high = row.relative_error_interval or (0.0, 0.0)
        value, time = row.relative_error or 0.0, 1000 * (row.seconds or 0.0)
        look, known = looks[row.name], high - value < value
        face = look["color"] if known else "white"
        place = value if known else high
        if known:
            axes.plot(
                [time, time], [max(low, value / 100), high], color=look["color"], linewidth=1.2
            )
        axes.plot(
            [time], [place], look["marker"], color=look["color"], markerfacecolor=face, markersize=8
        )
        hollow |= not known
        if not known:  # an arrow to smaller errors
            axes.annotate(
                "",
                (time, place),
                xytext=(0, -22),
                textcoords="offset points",
                arrowprops={"arrowstyle": "<-", "color": look["color"], "shrinkA": 0, "shrinkB": 5},
            )
    ylabel = "relative error" + (" (hollow: below this)" if hollow else "")
    axes.set(xlabel="milliseconds", ylabel=ylabel, xscale="log", yscale="log")
    axes.margins(x=0.12, y=0.18)
    _plain(axes)
    if shown:
        axes.set(xlim=_decade(axes.get_xlim()), ylim=_decade(axes.get_ylim()))
    else:
        axes.text(0.5, 0.5, "no error is known", transform=axes.transAxes, ha="center")


def _draw_memory(axes: "Axes", rows: Sequence[SolverRow], looks: dict[str, Any]) -> None:
    """A bar for each solver, which also says which point is whose."""
    axes.set_title("peak memory of a call", fontsize=11, loc="left")
    most = max((r.peak_bytes or 0 for r in rows), default=0) or 1
    for place, row in enumerate(rows):
        look, share = looks[row.name], (row.peak_bytes or 0) / most
        axes.barh(place, share, height=0.62, color=look["color"], alpha=0.35)
        words = memory_in_words(row.peak_bytes)
        if row.reason:
            words += "  failed" if row.seconds is None else "  ! see the text"
        axes.text(share + 0.02, place, words.strip(), va="center", fontsize=8)
        axes.plot(
            [-0.06], [place], look["marker"], color=look["color"], markersize=6, clip_on=False
        )
    names = [r.name if len(r.name) <= _NAME else f"{r.name[: _NAME - 3]}..." for r in rows]
    axes.set_yticks(range(len(rows)), names, fontsize=8)
    axes.set(xlim=(-0.12, 1.5), xticks=[], ylim=(max(len(rows), 5) - 0.4, -0.6))
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "bottom", "left"]].set_visible(False)


def _decade(ends: tuple[float, float]) -> tuple[float, float]:
    """Ends of a logarithmic axis that lie at least two decades apart."""
    wider = max(1.0, (100 * ends[0] / ends[1]) ** 0.5)
    return ends[0] / wider, ends[1] * wider


def _plain(axes: "Axes") -> None:
    from matplotlib.ticker import NullFormatter

    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_fontsize(9)

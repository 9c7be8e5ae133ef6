"""Charts of a page: a small picture for each quantity, of one run or of several over each other."""

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, final

from bilevel.extras import MISSING
from bilevel.methods.report.page import image, titled

COLOURS = ("#1f6fb4", "#d9652b", "#3c9a5f", "#8a5fb0", "#b04a63", "#5b6670")
DASHES = {"solid": "-", "dashed": "--", "dotted": ":"}
_WIDE = 5.0  # a range of values this many times its smallest is drawn on a logarithmic axis

Record: TypeAlias = Mapping[str, Any]


@final
@dataclass(frozen=True)
class Curve:
    """A curve.

    Attributes:
        label: whose it is.
        points: where and what; values that are not finite are left out.
        number: chooses the colour and the dashes.
    """

    label: str
    points: tuple[tuple[float, float], ...]
    number: int

    @property
    def style(self) -> tuple[str, str]:
        """Colour and dashes, by their names in style sheets."""
        dashes = list(DASHES)
        return (
            COLOURS[self.number % len(COLOURS)],
            dashes[self.number // len(COLOURS) % len(dashes)],
        )


def curve(label: str, records: Sequence[Record], name: str, number: int, against: str) -> Curve:
    """What records hold of one quantity.

    Args:
        label: whose it is.
        records: lines of metrics or of evaluations.
        name: of the quantity.
        number: chooses colour and dashes.
        against: "step" or "seconds".
    """
    points = [
        (record[against], record[name])
        for record in records
        if record.get(name) is not None and record.get(against) is not None
    ]
    return Curve(label, tuple(p for p in points if math.isfinite(p[1])), number)


def charts(
    quantities: Mapping[str, Sequence[Curve]],
    against: str,
    *,
    legends: bool = True,
    logarithmic: bool = True,
) -> str:
    """Charts beside each other, as many as fit the screen.

    Args:
        quantities: by title, the lines of a chart; a chart without a value is left out.
        against: what runs to the right, in words.
        legends: whether charts of several lines name them.
        logarithmic: whether values that are all positive and far apart may have such an axis.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    drawn = []
    for title, lines in quantities.items():
        lines = [one for one in lines if one.points]
        if lines:
            picture = _chart(lines, against, legends and len(lines) > 1, logarithmic)
            shown = image(picture, _told(title, lines, against), "chart")
            drawn.append(titled(title[:1].upper() + title[1:], shown))
    return f'<div class="charts">{"".join(drawn)}</div>' if drawn else ""


def _told(title: str, lines: Sequence[Curve], against: str) -> str:
    """A chart in words."""
    ends = [
        f"{one.label}: {_number(one.points[0][1])} to {_number(one.points[-1][1])}"
        if len(one.points) > 1
        else f"{one.label}: {_number(one.points[0][1])}"
        for one in lines
    ]
    return f"{title} against {against}, from first to last. {'; '.join(ends)}."


def _number(value: float) -> str:
    return f"{value:.3g}"


def _chart(lines: Sequence[Curve], against: str, legend: bool, logarithmic: bool) -> bytes:
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter
    except ImportError:
        raise ImportError(MISSING.format("matplotlib")) from None
    values = [value for one in lines for _, value in one.points]
    drawing = Figure(figsize=(4.4, 2.9), dpi=150)
    drawing.subplots_adjust(left=0.16, right=0.98, bottom=0.17, top=0.97)
    axes = drawing.add_subplot()
    for one in lines:
        colour, dash = one.style
        across, up = zip(*one.points, strict=True)
        marker = "o" if len(up) < 4 else None
        axes.plot(
            across, up, label=one.label, color=colour, linestyle=DASHES[dash], marker=marker, lw=1.8
        )
    axes.set_xlabel(against, fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=against == "step"))
    axes.tick_params(labelsize=9)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if logarithmic and min(values) > 0 and max(values) > _WIDE * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    if legend:
        axes.legend(fontsize=9, frameon=False)
    buffer = io.BytesIO()
    drawing.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()

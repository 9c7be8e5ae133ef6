"""Curves of a training: what was recorded against the step, a panel for each kind of number."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from bilevel.extras import shown_figure
from bilevel.methods.training.measures import direction_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Panel: TypeAlias = tuple[str, dict[str, str], bool]
"""Title, lines (label to name), and whether the axis is logarithmic where that helps."""


def loss_panels(records: Sequence[dict[str, Any]]) -> list[Panel]:
    """The panels of what training recorded: the known ones, then one for each other name."""
    names = {name for record in records for name, value in record.items() if value is not None}
    drawn = {name for _, lines, _ in _PANELS for name in lines.values()} | _NOT_DRAWN
    rest = [(name.replace("_", " "), {name: name}, False) for name in sorted(names - drawn)]
    return [*_PANELS, *rest]


def evaluation_panels(records: Sequence[dict[str, Any]]) -> list[Panel]:
    """The panels of what evaluations during training found."""
    kinds = dict.fromkeys(
        name for record in records for name in record if name.startswith("auroc_")
    )
    energies = {name.removeprefix("auroc_").replace("_", " "): name for name in kinds}
    own = dict.fromkeys(name for record in records for name in record if _is_strange(name))
    rest = [(name.replace("_", " "), {name: name}, False) for name in own]
    return [*_EVALUATIONS, ("AUROC of the energy against", energies, False), *rest]


def _is_strange(name: str) -> bool:
    """Whether it is none of the numbers that `evaluate` gives."""
    beside = name.endswith(("_reference", "_pca", "_accuracy")) or name.startswith("auroc_")
    return not beside and name not in _NOT_DRAWN and direction_of(name) is None


def draw_panels(records: Sequence[dict[str, Any]], panels: Sequence[Panel]) -> "Figure":
    """A figure with a panel for each kind of number that the records hold, against the step.

    Raises:
        ValueError: if there are no records.
        ImportError: if matplotlib is not installed.
    """
    figure_class = shown_figure()
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

    if not records:
        raise ValueError("there are no records to draw; train for at least `log_every` steps")
    panels = _with_values(records, panels)
    columns = max(1, min(3, len(panels)))
    rows = max(1, math.ceil(len(panels) / columns))
    figure = figure_class(figsize=(4.2 * columns, 3.0 * rows), dpi=120, layout="constrained")
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
    return figure


_COLOURS = ("#1f6fb4", "#d9652b", "#3c9a5f", "#8a5fb0", "#b04a63", "#5b6670")
_PANELS: tuple[Panel, ...] = (
    ("energy", {"data": "energy_data", "samples": "energy_samples"}, False),
    ("losses", {"upper": "upper_loss", "lower": "lower_loss"}, False),
    ("squared error of an image", {"reconstruction": "reconstruction"}, True),
    ("squared error of a latent", {"latent reconstruction": "latent_reconstruction"}, True),
    ("gradient norm", {"direct term": "direct_norm", "response term": "response_norm"}, True),
)
_EVALUATIONS: tuple[Panel, ...] = (
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
_NOT_DRAWN = {"step", "seconds", "result"}


def _with_values(records: Sequence[dict[str, Any]], panels: Sequence[Panel]) -> list[Panel]:
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

"""Tables and figures of curves, from their records: one JSON object for each point of a training."""

import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from bilevel.extras import shown_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Record: TypeAlias = Mapping[str, Any]
Run: TypeAlias = Sequence[Record]  # its points; the last one says how it ended
GOALS = (1e-1, 1e-2, 1e-4)
_COLOURS = ("#1f6fb4", "#d9652b", "#3c9a5f", "#8a5fb0", "#b04a63", "#5b6670")
_DASHES = ("-", "--", ":", "-.")
NOTES = (
    "The error is the norm of the value function's gradient, over that at the start; seconds (of the "
    "processor, where it does the work) and oracle calls (gradients and products, each by itself) to "
    "the first point at which it is as small. Each solver is shown with the best of the learning rates "
    "it tried; of several seeds, medians."
)


def runs_of(records: Sequence[Record], problem: str) -> dict[str, list[Run]]:
    """The trainings on a problem by solver: of each seed the one with the best learning rates."""
    runs: dict[tuple[str, int, int], list[Record]] = {}
    for record in records:
        if record["problem"] == problem:
            runs.setdefault((record["solver"], record["seed"], record["attempt"]), []).append(
                record
            )
    best: dict[tuple[str, int], Run] = {}
    for (solver, seed, _), points in runs.items():
        run: Run = points
        if (solver, seed) not in best or _score(run) < _score(best[solver, seed]):
            best[solver, seed] = run
    found: dict[str, list[Run]] = {}
    for (solver, _), run in best.items():
        found.setdefault(solver, []).append(run)
    return found


def _score(run: Run) -> tuple[bool, float]:
    """What the best learning rates are chosen by: whether it failed; the last error, or upper loss."""
    last = run[-1]
    kept: float = last["loss"] if last["error"] is None else last["error"]
    return last["end"] not in ("time", "solved"), kept


def training_table(
    records: Sequence[Record], problem: str
) -> tuple[tuple[str, ...], list[list[str]]]:
    """The head and the lines of a problem's table, a solver each, the best first."""
    found = runs_of(records, problem)
    known = any(run[-1]["error"] is not None for runs in found.values() for run in runs)
    names = list(next(iter(found.values()))[0][-1]["measures"]) if found else []
    if known:
        reach = [f"{what} to {goal:g}" for goal in GOALS for what in ("s", "calls")]
        head = ("solver", "error", *reach, "calls a step")
    else:
        head = ("solver", "upper loss", *names, "seconds", "calls", "calls a step")
    order = sorted(found, key=lambda name: statistics.median_low(map(_score, found[name])))
    lines = []
    for name in order:
        runs = found[name]
        lasts = [run[-1] for run in runs]
        if all(last["step"] == 0 for last in lasts):
            lines.append([name, "no step", *[""] * (len(head) - 2)])
            continue
        a_step = f"{statistics.median(r['calls'] / max(r['step'], 1) for r in lasts):.3g}"
        if known:
            middle = [text for goal in GOALS for text in _reached(runs, goal)]
            lines.append([name, f"{_median(lasts, 'error'):.1e}", *middle, a_step])
        else:
            measured = [f"{statistics.median(r['measures'][n] for r in lasts):.2f}" for n in names]
            spent = [f"{_median(lasts, 'seconds'):.2f}", f"{_median(lasts, 'calls'):.0f}"]
            lines.append([name, f"{_median(lasts, 'loss'):.4g}", *measured, *spent, a_step])
    return head, lines


def _median(records: Sequence[Record], name: str) -> float:
    middle: float = statistics.median(record[name] for record in records)
    return middle


def _reached(runs: Sequence[Run], goal: float) -> list[str]:
    """Seconds and calls to a goal, where most runs reach it."""
    firsts = [next((p for p in run if p["error"] <= goal), None) for run in runs]
    there = [point for point in firsts if point is not None]
    if 2 * len(there) <= len(runs):
        return ["", ""]
    return [f"{_median(there, 'seconds'):.3g}", f"{_median(there, 'calls'):.0f}"]


def sentences_of(records: Sequence[Record], problem: str) -> list[str]:
    """Why solvers failed on a problem, and what was warned of."""
    said: dict[str, None] = {}
    for name, runs in runs_of(records, problem).items():
        for last in (run[-1] for run in runs):
            if last["end"] not in ("time", "solved"):
                said[f"{name}: {last['end']}"] = None
            if last["remark"]:
                said[f"{name}: {last['remark']}"] = None
    return list(said)


def draw_trainings(records: Sequence[Record], problem: str) -> "Figure":
    """Errors against time and oracle calls, and the value coming down to the truth; or the measures.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    found = runs_of(records, problem)
    first = next(iter(found.values()))[0][-1]
    if first["error"] is None:
        panels = [(f"measures.{name}", "seconds") for name in first["measures"]]
        panels += [("loss", "seconds")]
    else:
        panels = [("error", "seconds"), ("error", "calls"), ("value", "calls")]
    figure = shown_figure()(figsize=(4.4 * len(panels), 4.4), dpi=120, layout="constrained")
    every = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (what, against) in zip(every, panels, strict=True):
        for k, (name, runs) in enumerate(found.items()):
            look = {"color": _COLOURS[k % 6], "linestyle": _DASHES[k // 6 % 4], "linewidth": 1.4}
            for number, run in enumerate(runs):
                label = name if not number else None
                _draw(axes, run, what, against, label=label, **look)
        if what == "value" and first["least"] is not None:
            axes.axhline(first["least"], color="black", linewidth=0.9, linestyle=(0, (1, 2)))
            axes.annotate("least value", (0.99, first["least"]), xycoords=("axes fraction", "data"),
                          ha="right", va="bottom", fontsize=8)  # fmt: skip
        axes.set(xlabel=_AXES[against], xscale="log", title=what.removeprefix("measures."))
        axes.set_yscale("log" if what == "error" else "linear")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*every[0].get_legend_handles_labels(), loc="outside lower center", ncols=5,
                  fontsize=8, frameon=False)  # fmt: skip
    figure.suptitle(problem, fontsize=11)
    return figure


_AXES = {"seconds": "seconds", "calls": "oracle calls"}


def _draw(axes: "Axes", run: Run, what: str, against: str, **look: Any) -> None:
    points = [p for p in run if p[against] > 0]
    name = what.removeprefix("measures.")
    heights = [p["measures"][name] if what.startswith("measures.") else p[what] for p in points]
    axes.plot([p[against] for p in points], heights, **look)

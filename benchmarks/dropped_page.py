"""The table and the figures of `benchmarks.dropped_term`, from its records.

    python -m benchmarks.dropped_page

draws `docs/images/dropped_term.png` (likelihoods) and `docs/images/dropped_term_probe.png`.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import mean, median
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
IMAGES = RESULTS.parent.parent / "docs" / "images"
REFERENCE = "no lower level"
SOLVERS = ("Alternating", "Unrolled(1)", "Unrolled(5)", "Unrolled(20)", "Implicit", REFERENCE)
COLOURS = ("#1f6fb4", "#b9a13a", "#3c9a5f", "#8a5fb0", "#d9652b", "#555555")
ORDER = (
    "tables-kl-1",
    "tables-kl-10",
    "tables-symmetric-1",
    "tables-symmetric-10",
    "limited-kl-1",
    "limited-kl-10",
    "limited-symmetric-1",
    "limited-symmetric-10",
    "rbm-kl",
    "rbm-symmetric",
    "bism-checkerboard-exact",
    "bism-checkerboard-sampled",
    "bism-moons-exact",
)
SHOWN = ("tables-kl-1", "limited-symmetric-10", "rbm-kl", "bism-checkerboard-exact")

Records = dict[str, dict[str, Any]]


def newest(path: Path) -> dict[str, Records]:
    """The newest record of every problem and solver."""
    found: dict[str, Records] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        found.setdefault(record["case"], {})[record["solver"]] = record
    return {name: found[name] for name in ORDER if "Alternating" in found.get(name, {})}


def per_seed(record: dict[str, Any], field: str) -> list[list[tuple[int, float, Any]]]:
    """(step, seconds, value) of each seed, wherever it was trained."""
    curves = []
    for points in record["runs"]:
        for seed in range(len(points[0][field])):
            curves.append([(p["step"], p["seconds"], p[field][seed]) for p in points])
    return curves


def likelihood_cell(record: dict[str, Any] | None) -> str:
    """Mean and range of the last log-likelihood over the seeds."""
    if record is None:
        return "-"
    if record["diverged"]:
        return f"NaN at step {record['diverged']['step']}"
    last = [curve[-1][2] for curve in per_seed(record, "log_likelihood")]
    return f"{mean(last):.2f} ({min(last):.2f} to {max(last):.2f})"


def probe_cell(record: dict[str, Any], name: str) -> str:
    """The median over seeds and over the looks in the second half of the logarithmic scale."""
    return middle(probe[name] for probe in late(record))


def share_cell(record: dict[str, Any], tensor: str) -> str:
    return middle(probe["shares"][tensor] for probe in late(record))


def late(record: dict[str, Any]) -> list[dict[str, Any]]:
    curves = per_seed(record, "probe")
    return [probe for c in curves for step, _, probe in c if step**2 >= record["steps"]]


def middle(values: Iterable[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{median(known):.2f}" if known else "-"


def reached(record: dict[str, Any] | None, within: float = 0.01) -> str:
    """The first look at which the mean over seeds is near the ceiling, and the seconds until then."""
    if record is None or record["diverged"]:
        return "-"
    curves = per_seed(record, "log_likelihood")
    for look in zip(*curves, strict=True):
        if mean(value for *_, value in look) >= record["ceiling"] - within:
            return f"{look[0][0]} ({look[0][1]:.1f} s)"
    return "not yet"


def milliseconds(record: dict[str, Any] | None) -> str:
    """Of one upper step with its lower steps."""
    if record is None or record["diverged"]:
        return "-"
    return f"{1e3 * mean(p[-1]['seconds'] / p[-1]['step'] for p in record['runs']):.2f}"


def grid(caption: str, columns: tuple[str, ...], rows: dict[str, list[str]]) -> list[str]:
    """A Markdown table with its caption; nothing if it has no rows."""
    if not rows:
        return []
    return [
        "",
        caption,
        "",
        f"| problem | {' | '.join(columns)} |",
        "| --- |" + " ---: |" * len(columns),
        *(f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()),
    ]


def dropped_table(path: Path) -> str:
    """Final likelihoods, times, and what the probe saw along the run of `Alternating`."""
    found = {title(solvers): solvers for solvers in newest(path).values()}

    def by_solver(cell: Callable[[Any], str], names: Iterable[str]) -> dict[str, list[str]]:
        return {name: [cell(found[name].get(solver)) for solver in SOLVERS] for name in names}

    some = {name: next(iter(solvers.values())) for name, solvers in found.items()}
    final = {
        name: [
            str(one["steps"]),
            "-" if one["ceiling"] is None else f"{one['ceiling']:.2f}",
            *cells,
        ]
        for (name, one), cells in zip(
            some.items(), by_solver(likelihood_cell, found).values(), strict=True
        )
    }
    known = [name for name, one in some.items() if one["case"].startswith("tables")]
    along = {name: solvers["Alternating"] for name, solvers in found.items()}
    quantities = ("ratio", "angle_cosine", "kept_along", "whole_along")
    first = next(iter(some.values()))
    tensors = ("weight", "latent_bias", "visible_bias", "log_scale")
    lines = [
        f"torch {first['versions']['torch']}; {first['device']}, {first['threads']} thread(s)",
        *grid(
            "Exact log-likelihood at the end: mean (smallest to largest) of three seeds.",
            ("steps", "ceiling", *SOLVERS),
            final,
        ),
        *grid(
            "Where the ceiling is reached: the first of 15 looks within 0.01 nats of it, and seconds.",
            SOLVERS,
            by_solver(reached, known),
        ),
        *grid(
            "Milliseconds of the processor per upper step, its K lower steps included (tables: eager, "
            "three seeds together; the others: compiled).",
            SOLVERS,
            by_solver(milliseconds, found),
        ),
        *grid(
            "What the probe saw along the run of `Alternating`: medians over seeds and over the looks "
            "from the square root of the number of steps on.",
            ("dropped / kept", "cosine between them", "kept along exact", "both along exact"),
            {name: [probe_cell(one, q) for q in quantities] for name, one in along.items()},
        ),
        *grid(
            "The norm of the dropped term relative to the whole gradient, tensor by tensor (likewise).",
            tensors,
            {
                name: [share_cell(one, f"model.{tensor}") for tensor in tensors]
                for name, one in along.items()
                if "shares" in one["runs"][0][0]["probe"][0]
            },
        ),
    ]
    return "\n".join(lines)


# ---------------------------------------------------------------- figures


def draw_likelihoods(found: dict[str, Records], path: Path) -> None:
    """Likelihood against steps (above) and against seconds (below)."""
    from matplotlib.figure import Figure

    shown = [name for name in SHOWN if name in found]
    figure = Figure(figsize=(3.4 * len(shown), 5.6), dpi=120, layout="constrained")
    axes = figure.subplots(2, len(shown), squeeze=False)
    for column, name in enumerate(shown):
        for row in (0, 1):
            panel = axes[row][column]
            bottoms, tops = [], []
            for solver, colour in zip(SOLVERS, COLOURS, strict=True):
                record = found[name].get(solver)
                if record is None:
                    continue
                curves = per_seed(record, "log_likelihood")
                xs = [point[row] for point in curves[0]]
                values = list(zip(*[[v for _, _, v in curve] for curve in curves], strict=True))
                centre = [mean(v) for v in values]
                panel.plot(xs, centre, color=colour, label=solver, linewidth=1.6)
                low, high = [min(v) for v in values], [max(v) for v in values]
                panel.fill_between(xs, low, high, color=colour, alpha=0.13, linewidth=0)
                bottoms.append(min(centre))
                tops.append(max(high))
            ceiling = next(iter(found[name].values()))["ceiling"]
            if ceiling is not None:
                panel.axhline(ceiling, color="black", linewidth=0.8, linestyle=":")
                tops.append(ceiling)
            top, bottom = max(tops), min(bottoms)
            panel.set_ylim(bottom - 0.05 * (top - bottom), top + 0.08 * (top - bottom))
            finish(panel, "upper step" if row == 0 else "seconds")
        axes[0][column].set_title(title(found[name]), fontsize=9, loc="left")
    axes[0][0].set_ylabel("exact log-likelihood", fontsize=9)
    axes[1][0].set_ylabel("exact log-likelihood", fontsize=9)
    drawn = {}
    for panel in axes[0]:
        drawn.update(dict(zip(*reversed(panel.get_legend_handles_labels()), strict=True)))
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


def draw_probe(found: dict[str, Records], path: Path) -> None:
    """Along the run of `Alternating`: the dropped term's size and angle, and what it is good for."""
    from matplotlib.figure import Figure

    shown = [name for name in SHOWN if name in found]
    figure = Figure(figsize=(3.4 * len(shown), 7.2), dpi=120, layout="constrained")
    axes = figure.subplots(3, len(shown), squeeze=False)
    for column, name in enumerate(shown):
        curves = per_seed(found[name]["Alternating"], "probe")
        for row, quantities in enumerate(
            (("ratio",), ("angle_cosine",), ("kept_along", "whole_along"))
        ):
            panel = axes[row][column]
            for quantity, colour in zip(quantities, ("#1f6fb4", "#d9652b"), strict=False):
                label = {"kept_along": "kept term", "whole_along": "kept + dropped"}.get(quantity)
                for seed, curve in enumerate(curves):
                    points = [(s, v[quantity]) for s, _, v in curve if v[quantity] is not None]
                    points = [(s, v) for s, v in points if row > 0 or v > 0]
                    steps, values = zip(*points, strict=True)
                    panel.plot(
                        steps,
                        values,
                        color=colour,
                        linewidth=1.2,
                        marker=".",
                        markersize=4,
                        alpha=0.8,
                        label=label if seed == 0 else None,
                    )
            finish(panel, "upper step")
            if row == 0:
                panel.set_yscale("log")
                panel.axhline(1, color="black", linewidth=0.8, linestyle=":")
            else:
                panel.set_ylim(-1.08, 1.08)
                panel.axhline(0, color="black", linewidth=0.8, linestyle=":")
        axes[0][column].set_title(title(found[name]), fontsize=9, loc="left")
    axes[0][0].set_ylabel("norm of dropped / kept", fontsize=9)
    axes[1][0].set_ylabel("cosine between the two", fontsize=9)
    axes[2][0].set_ylabel("cosine with the exact gradient", fontsize=9)
    axes[2][0].legend(fontsize=8, loc="lower right")
    figure.savefig(path)


def title(solvers: Records) -> str:
    text: str = next(iter(solvers.values()))["title"]
    return text


def finish(panel: Any, label: str) -> None:
    panel.set_xscale("log")
    panel.set_xlabel(label, fontsize=9)
    panel.tick_params(labelsize=8)
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)


def main() -> None:
    path = RESULTS / "dropped_term.jsonl"
    found = newest(path)
    IMAGES.mkdir(exist_ok=True)
    draw_likelihoods(found, IMAGES / "dropped_term.png")
    draw_probe(found, IMAGES / "dropped_term_probe.png")
    print(dropped_table(path))


if __name__ == "__main__":
    main()

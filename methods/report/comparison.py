"""The page of several runs: samples and numbers side by side, curves laid over each other."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bilevel.files import write_text
from bilevel.methods.report import page as html
from bilevel.methods.report.charts import Curve, charts, curve
from bilevel.methods.report.origin import (
    all_settings,
    flat,
    how_it_was_made,
    title_of,
    what_was_trained,
)
from bilevel.methods.report.saved import feature_space, saved_pictures, saved_results
from bilevel.methods.training.measures import Measure, measures_of
from bilevel.methods.training.run import Run

_CURVES = (
    "What training recorded, all runs in one chart. Losses of different methods are different "
    "quantities: compare their shape, not their height."
)
_EVALUATIONS = "What smaller evaluations found during training, all runs in one chart."

_COST = {"seconds", "steps_per_second"}

_Config = Mapping[str, Any]
_Results = Mapping[str, float]


def write_comparison(runs: Sequence[Run], path: str | os.PathLike[str]) -> Path:
    """One page about several runs: a row each, pictures side by side, curves over each other.

    Args:
        runs: runs with a configuration; what they have been evaluated to is read from them.
        path: file to write.

    Returns:
        `path`.

    Raises:
        ValueError: if there are no runs.
        FileNotFoundError: if a folder holds no run.
    """
    if not runs:
        raise ValueError("there are no runs to compare; name at least one")
    target = Path(path)
    names = _names(runs)
    configs = [run.config() for run in runs]
    results = [saved_results(run) or {} for run in runs]
    pictures = [saved_pictures(run) for run in runs]
    titles = list(dict.fromkeys(title for found in pictures for title in found))
    shown = [title for title in titles if title not in ("curves", "evaluations")]
    parts = (
        [html.section("Samples", _side(names, "samples", pictures))] if "samples" in shown else []
    )
    parts.append(html.section("Numbers", _numbers(runs, names, configs, results, target)))
    parts.append(html.section("What differs", _differences(names, configs)))
    parts += _curves(runs, names)
    for title in shown:
        if title != "samples":
            parts.append(html.folded(title.capitalize(), _side(names, title, pictures)))
    parts.append("<h2>The runs</h2>")
    for run, name, config in zip(runs, names, configs, strict=True):
        body = f"<p>{what_was_trained(config)}</p>{how_it_was_made(run, config, target)}"
        parts.append(html.folded(name, body + all_settings(config), title_of(config)))
    write_text(target, html.page(f"{len(runs)} runs compared", "\n".join(parts)))
    return target


def _names(runs: Sequence[Run]) -> list[str]:
    """Names of the folders; with those above them where two are called alike."""
    paths = [run.folder.resolve() for run in runs]
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(set(paths)):
            return names
    return [str(path) for path in paths]


def _side(names: Sequence[str], title: str, pictures: Sequence[Mapping[str, Path]]) -> str:
    """One kind of picture of every run that has it."""
    figures = "".join(
        html.figure(html.image(found[title], f"{title.capitalize()} of {name}", "pixels"), name)
        for name, found in zip(names, pictures, strict=True)
        if title in found
    )
    return f'<div class="side">{figures}</div>'


# ---------------------------------------------------------------------- numbers


def _numbers(
    runs: Sequence[Run],
    names: Sequence[str],
    configs: Sequence[_Config],
    results: Sequence[_Results],
    target: Path,
) -> str:
    measures = measures_of({name: value for values in results for name, value in values.items()})
    one_data_set = len({json.dumps(c.get("notes", {}).get("data")) for c in configs}) == 1
    spaces = {feature_space(run) for run, values in zip(runs, results, strict=True) if values}
    best = {
        name: _best(name, measure, results)
        for name, measure in measures.items()
        if one_data_set and len(runs) > 1 and (len(spaces) == 1 or not measure.by_features)
    }
    heads = [
        f'{_head(run, name, target)}<br><span class="soft">{html.text(title_of(config))}</span>'
        for run, name, config in zip(runs, names, configs, strict=True)
    ]
    steps = [_steps(run, config) for run, config in zip(runs, configs, strict=True)]

    def table(kept: Mapping[str, Measure]) -> str:
        rows = [
            [head, taken, *(_cell(key, kept[key], values, best.get(key)) for key in kept)]
            for head, taken, values in zip(heads, steps, results, strict=True)
        ]
        columns = ["run", "steps", *(measure.label for measure in kept.values())]
        return html.scrolling("Numbers of all runs", html.numbers_table(columns, rows))

    few = {name: measure for name, measure in measures.items() if not measure.detail}
    parts = [
        table(few),
        _notes(
            names, runs, spaces, one_data_set, any(value is not None for value in best.values())
        ),
    ]
    if len(few) < len(measures):
        parts.append(html.folded("All numbers", table(measures)))
    if measures:
        meanings = html.terms(
            (measure.label, html.text(f"{measure.meaning} ({measure.better}er is better)"))
            for measure in measures.values()
        )
        parts.append(html.folded("How to read the numbers", meanings))
    return "".join(parts)


def _head(run: Run, name: str, target: Path) -> str:
    page = run.folder / "report.html"
    return html.link(page, target, name) if page.exists() else html.text(name)


def _steps(run: Run, config: _Config) -> str:
    metrics, asked = run.metrics(), config.get("training", {}).get("num_steps")
    taken = metrics[-1]["step"] if metrics else 0
    return f"{taken:,}" if asked in (None, taken) else f"{taken:,} of {asked:,}"


def _best(name: str, measure: Measure, results: Sequence[_Results]) -> float | None:
    """The best value, where several runs have one and not all the same."""
    found = [values[name] for values in results if name in values]
    return (min if measure.better == "low" else max)(found) if len(set(found)) > 1 else None


def _cell(name: str, measure: Measure, values: _Results, best: float | None) -> str:
    if name not in values:
        return "-"
    written = html.text(measure.written(values[name]))
    return f'<b class="best">{written}</b>' if values[name] == best else written


def _notes(
    names: Sequence[str],
    runs: Sequence[Run],
    spaces: set[str | None],
    one_data_set: bool,
    marked: bool,
) -> str:
    """What the marks mean, and what must not be compared."""
    notes = ["The best value of a column is bold and has a star."] if marked else []
    if not one_data_set:
        notes.append("The runs were trained on different data: compare with care.")
    if len(spaces) > 1:
        judged = "; ".join(
            f"{name} by {feature_space(run) or 'unknown'}"
            for name, run in zip(names, runs, strict=True)
            if saved_results(run)
        )
        notes.append(
            "Their samples were judged by different feature networks, so distances and shares cannot be "
            f"compared: {judged}. `bilevel evaluate RUN --features FILE` judges all by one."
        )
    elif spaces and None not in spaces:
        notes.append(f"Samples are judged by: {spaces.copy().pop()}.")
    return "".join(f'<p class="soft">{html.text(note)}</p>' for note in notes)


def _differences(names: Sequence[str], configs: Sequence[_Config]) -> str:
    settings = [flat(config) for config in configs]
    every = list(dict.fromkeys(name for found in settings for name in found))
    differing = [name for name in every if len({str(found.get(name)) for found in settings}) > 1]
    if not differing:
        return "<p>Nothing: the runs have the same configuration.</p>"
    head = "".join(f'<th scope="col">{html.text(name)}</th>' for name in ("setting", *names))
    lines = "".join(
        f'<tr><th scope="row">{html.breakable(name)}</th>'
        + "".join(f'<td class="text">{html.text(found.get(name, "-"))}</td>' for found in settings)
        + "</tr>"
        for name in differing
    )
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>"
    return html.scrolling("Settings that differ", table)


# ---------------------------------------------------------------------- curves


def _curves(runs: Sequence[Run], names: Sequence[str]) -> list[str]:
    """The curves of all runs over each other; none without matplotlib."""
    metrics = [run.metrics() for run in runs]
    evaluations = [run.evaluations() for run in runs]
    measures = measures_of(
        {
            key: value
            for records in evaluations
            for record in records
            for key, value in record.items()
        }
    )
    few = {
        key: measure.label
        for key, measure in measures.items()
        if not measure.detail and key not in _COST
    }
    losses = {
        key: key.replace("_", " ")
        for records in metrics
        for record in records
        for key, value in record.items()
        if key not in {"step", *_COST} and isinstance(value, int | float)
    }
    try:
        measured = charts(_quantities(names, evaluations, few, "step"), "step", legends=False)
        timed = charts(
            _quantities(names, evaluations, few, "seconds"), "seconds of training", legends=False
        )
        recorded = charts(_quantities(names, metrics, losses, "step"), "step", legends=False)
    except ImportError:
        return []
    parts = []
    if measured:
        by_time = html.folded("By time", timed)
        body = f"{_legend(names)}<p>{html.text(_EVALUATIONS)}</p>{measured}{by_time}"
        parts.append(html.section("Evaluations", body))
    if recorded:
        body = f"{_legend(names)}<p>{html.text(_CURVES)}</p>{recorded}"
        parts.append(html.section("Curves", body))
    return parts


def _quantities(
    names: Sequence[str],
    recorded: Sequence[Sequence[Mapping[str, Any]]],
    titles: Mapping[str, str],
    against: str,
) -> dict[str, list[Curve]]:
    """By title, a line of every run."""
    return {
        title: [
            curve(name, records, key, number, against)
            for number, (name, records) in enumerate(zip(names, recorded, strict=True))
        ]
        for key, title in titles.items()
    }


def _legend(names: Sequence[str]) -> str:
    items = "".join(
        f"<li>{html.swatch(*Curve(name, (), number).style)}{html.text(name)}</li>"
        for number, name in enumerate(names)
    )
    return f'<ul class="legend" aria-label="Runs">{items}</ul>'

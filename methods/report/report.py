"""Reports: one self-contained HTML page about a run, or about several side by side."""

import base64
import html
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bilevel.files import read_bytes, write_text
from bilevel.methods.report.page import page
from bilevel.methods.training.json_lines import read_document, write_document
from bilevel.methods.training.measures import measures_of, result_rows
from bilevel.methods.training.run import Run
from bilevel.methods.training.schemas import Evaluated


def save_results(run: Run, results: Mapping[str, float], **how: Any) -> Path:
    """Keep what `evaluate` returned, and how it was asked, in the run's `evaluation.json`.

    Args:
        run: the run that was evaluated.
        results: what `evaluate` returned.
        **how: plain values; `features`, the label of the feature network, is shown beside the numbers.
    """
    path = run.folder / "evaluation.json"
    write_document(path, {**how, "results": dict(results)})
    return path


def saved_results(run: Run) -> dict[str, float] | None:
    """What `save_results` kept, `None` if the run was not evaluated yet."""
    saved = _evaluation(run)
    return saved["results"] if saved else None


def feature_space(run: Run) -> str | None:
    """The label of the feature network its samples were judged by, if it is known."""
    label: str | None = _evaluation(run).get("features")
    return label


def _evaluation(run: Run) -> dict[str, Any]:
    path = run.folder / "evaluation.json"
    return read_document(path, Evaluated) if path.exists() else {}


def saved_pictures(run: Run) -> dict[str, Path]:
    """The PNG files in the run's folder, by title: samples first, curves last."""
    folder = run.folder
    order = {"samples": 0, "reconstructions": 1, "evaluations": 8, "curves": 9}
    found = sorted(folder.glob("*.png"), key=lambda p: (order.get(p.stem, 5), p.stem))
    return {path.stem.replace("_", " "): path for path in found}


def write_report(
    run: Run, results: Mapping[str, float] | None, pictures: Mapping[str, Path]
) -> Path:
    """One page about one run.

    Args:
        run: a run with a configuration.
        results: what `evaluate` returned, or `None` if it was not asked.
        pictures: PNG files by title; they are put into the page.

    Returns:
        The path of the page, `report.html` in the run's folder.

    Raises:
        FileNotFoundError: if the folder holds no run, or a picture is missing.
    """
    config = run.config()
    parts = [f'<p class="lead">{_what(run, config)}</p>', "<h2>Results</h2>"]
    if results:
        parts.append(_results_table(results, feature_space(run)))
    else:
        parts.append("<p>Not evaluated yet: <code>bilevel evaluate RUN</code> does it.</p>")
    for title, path in pictures.items():
        note = _CAPTIONS.get(title, "")
        parts.append(f"<h2>{_text(title.capitalize())}</h2>{_picture(title, path)}<p>{note}</p>")
    parts.append(f"<h2>Configuration</h2>{_configuration(config)}")
    target = run.folder / "report.html"
    write_text(target, page(_title(config), "\n".join(parts)))
    return target


def write_comparison(runs: Sequence[Run], path: str | os.PathLike[str]) -> Path:
    """One page about several runs: a table with a row each, pictures side by side.

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
    configs = [run.config() for run in runs]
    results = [saved_results(run) or {} for run in runs]
    parts = ["<h2>Results</h2>", _comparison_table(runs, configs, results)]
    parts.append(f"<dl>{_meanings(results)}</dl>")
    parts.append(f"<h2>What differs</h2>{_differences(runs, configs)}")
    pictures = [saved_pictures(run) for run in runs]
    for title in dict.fromkeys(title for found in pictures for title in found):
        figures = "".join(
            f"<figure>{_picture(title, found[title])}"
            f"<figcaption>{_text(_name(run))}</figcaption></figure>"
            for run, found in zip(runs, pictures, strict=True)
            if title in found
        )
        parts.append(f'<h2>{_text(title.capitalize())}</h2><div class="side">{figures}</div>')
    for run, config in zip(runs, configs, strict=True):
        parts.append(f"<h2>{_text(_name(run))}</h2><p>{_what(run, config)}</p>")
        parts.append(_configuration(config))
    target = Path(path)
    write_text(target, page(f"{len(runs)} runs compared", "\n".join(parts)))
    return target


_CAPTIONS = {
    "samples": "Drawn from the model in one pass.",
    "reconstructions": "Held-out images above, what the model makes of their latents below.",
    "neighbours": "Samples above, below each the training image nearest to it in features: copies would "
    "be learned by heart.",
    "evaluations": "What a smaller evaluation found during training.",
    "curves": "What training recorded. The energies of data and samples approach each other when "
    "samples get hard to tell from data.",
}


def _text(value: object) -> str:
    return html.escape(str(value))


def _name(run: Run) -> str:
    return run.folder.resolve().name


def _title(config: Mapping[str, Any]) -> str:
    data = config.get("notes", {}).get("name")
    return f"{config['method']} on {data}" if data else str(config["method"])


def _what(run: Run, config: Mapping[str, Any]) -> str:
    """What was trained, on what, for how long."""
    metrics, notes = run.metrics(), config.get("notes", {})
    shape = " x ".join(map(str, config["data"]["shape"][1:]))
    sentences = [
        f"{config['method']} trained on {config['data']['shape'][0]:,} images of {shape}"
        + (
            f" (<code>{_text(notes['data'])}</code>: {_text(notes['note'])})"
            if "note" in notes
            else ""
        )
    ]
    if metrics:
        last, asked = metrics[-1], config["training"]["num_steps"]
        of = "" if last["step"] == asked else f" of {asked:,}"
        sentences.append(
            f"{last['step']:,}{of} steps in {last['seconds']:.0f} seconds on "
            f"{_text(config['versions']['device'])}"
        )
    sentences.append(f"solver <code>{_text(config['solver'])}</code>")
    return "; ".join(sentences) + "."


def _results_table(results: Mapping[str, float], space: str | None) -> str:
    lines = "".join(
        f'<tr><th scope="row">{_text(row.label)}</th><td class="number">{row.value}</td>'
        f'<td class="soft">{_text(row.beside)}</td><td class="soft">{_text(row.meaning)}</td></tr>'
        for row in result_rows(results)
    )
    head = "<tr><th>measure</th><th>value</th><th>for comparison</th><th>how to read it</th></tr>"
    table = f"<table><thead>{head}</thead><tbody>{lines}</tbody></table>"
    note = "" if space is None else f"<p>Samples are judged by: {_text(space)}.</p>"
    return f'<div class="wide">{table}</div>{note}'


def _comparison_table(
    runs: Sequence[Run],
    configs: Sequence[Mapping[str, Any]],
    results: Sequence[Mapping[str, float]],
) -> str:
    measures = measures_of({name: value for values in results for name, value in values.items()})
    one_data_set = len({json.dumps(c.get("notes", {}).get("data")) for c in configs}) == 1
    spaces = {feature_space(run) for run, values in zip(runs, results, strict=True) if values}
    best = {}
    for name, measure in measures.items():
        comparable = (
            one_data_set and len(runs) > 1 and (len(spaces) == 1 or not measure.by_features)
        )
        found = [values[name] for values in results if name in values]
        best[name] = (min if measure.better == "low" else max)(found) if comparable else None
    head = "".join(f"<th>{_text(measure.label)}</th>" for measure in measures.values())
    lines = []
    for run, config, values in zip(runs, configs, results, strict=True):
        metrics = run.metrics()
        line = (
            f'<th scope="row" class="run">{_text(_name(run))}</th><td>{_text(_title(config))}</td>'
        )
        line += f'<td class="number">{metrics[-1]["step"] if metrics else 0:,}</td>'
        for name, measure in measures.items():
            value = measure.written(values[name]) if name in values else "-"
            if best[name] is not None and values.get(name) == best[name]:
                value = f"<b>{value}</b>"
            line += f'<td class="number">{value}</td>'
        lines.append(f"<tr>{line}</tr>")
    top = f"<tr><th>run</th><th>model</th><th>steps</th>{head}</tr>"
    table = f"<table><thead>{top}</thead><tbody>{''.join(lines)}</tbody></table>"
    return f'<div class="wide">{table}</div>{_warnings(runs, spaces, one_data_set)}'


def _warnings(runs: Sequence[Run], spaces: set[str | None], one_data_set: bool) -> str:
    """What must not be compared."""
    notes = []
    if not one_data_set:
        notes.append("The runs were trained on different data: compare with care.")
    if len(spaces) > 1:
        judged = "; ".join(f"{_name(run)} by {feature_space(run) or 'unknown'}" for run in runs)
        notes.append(
            "Their samples were judged by different feature networks, so distances and shares cannot be "
            f"compared: {judged}. `bilevel evaluate RUN --features FILE` judges all by one."
        )
    elif spaces and None not in spaces:
        notes.append(f"Samples are judged by: {spaces.copy().pop()}.")
    return "".join(f"<p>{_text(note)}</p>" for note in notes)


def _meanings(results: Sequence[Mapping[str, float]]) -> str:
    measures = measures_of({name: value for values in results for name, value in values.items()})
    return "".join(
        f"<dt>{_text(measure.label)}</dt><dd>{_text(measure.meaning)} "
        f"({measure.better}er is better)</dd>"
        for measure in measures.values()
    )


def _differences(runs: Sequence[Run], configs: Sequence[Mapping[str, Any]]) -> str:
    flat = [_flat(config) for config in configs]
    names = list(dict.fromkeys(name for settings in flat for name in settings))
    differing = [name for name in names if len({str(settings.get(name)) for settings in flat}) > 1]
    if not differing:
        return "<p>Nothing: the runs have the same configuration.</p>"
    head = "".join(f"<th>{_text(_name(run))}</th>" for run in runs)
    lines = "".join(
        f'<tr><th scope="row">{_text(name)}</th>'
        + "".join(f"<td>{_text(settings.get(name, '-'))}</td>" for settings in flat)
        + "</tr>"
        for name in differing
    )
    return (
        f'<div class="wide"><table><thead><tr><th>setting</th>{head}</tr></thead>'
        f"<tbody>{lines}</tbody></table></div>"
    )


def _configuration(config: Mapping[str, Any]) -> str:
    lines = "".join(
        f'<tr><th scope="row">{_text(name)}</th><td>{_text(value)}</td></tr>'
        for name, value in _flat(config).items()
    )
    return (
        '<details><summary>All settings and versions</summary><div class="wide"><table>'
        f"<tbody>{lines}</tbody></table></div></details>"
    )


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted name."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def _picture(title: str, path: Path) -> str:
    data = base64.b64encode(read_bytes(path)).decode()
    kind = "curves" if path.stem == "curves" else "pixels"
    return f'<img class="{kind}" alt="{_text(title)}" src="data:image/png;base64,{data}">'

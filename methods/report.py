"""Reports: one self-contained HTML page about a run, or about several side by side."""

import base64
import html
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bilevel.methods.page import page
from bilevel.methods.run import Run, write_text


@dataclass(frozen=True)
class Row:
    """One line of the results table.

    Attributes:
        name: key of the value in the results.
        label: what is measured.
        value: as text.
        beside: what to compare it with, as text; may be empty.
        meaning: how to read it, in a sentence.
    """

    name: str
    label: str
    value: str
    beside: str
    meaning: str


@dataclass(frozen=True)
class _Measure:
    label: str
    meaning: str
    better: str  # "low" or "high"
    reference: str = ""  # name of the value to compare with
    beside: str = ""  # what that is
    percent: bool = False


_AUROC = "chance that a real image has lower energy than {}: 1 always, 0.5 a coin toss"
_MEASURES = {
    "frechet": _Measure(
        "Samples: Fréchet distance",
        "distance between samples and held-out images, in features fitted to the training images; the "
        "real training images show what can be reached",
        "low",
        "frechet_reference",
        "training images",
    ),
    "smallest_class_share": _Measure(
        "Samples: rarest class",
        "share of the class that the fewest samples are judged to be of; near 0, a class is missing",
        "high",
        "smallest_class_share_reference",
        "training images",
        percent=True,
    ),
    "rmse": _Measure(
        "Reconstruction: RMSE",
        "error of a pixel (white - black = 2) when held-out images go through the latent; principal "
        "components are the best linear way with as many numbers",
        "low",
        "rmse_pca",
        "principal components",
    ),
    "auroc_uniform": _Measure("Energy: images or noise", _AUROC.format("uniform noise"), "high"),
    "auroc_inverted": _Measure(
        "Energy: images or negatives", _AUROC.format("its negative"), "high"
    ),
    "auroc_shuffled": _Measure(
        "Energy: images or shuffled", _AUROC.format("one with its pixels shuffled"), "high"
    ),
    "seconds": _Measure("Training: seconds", "time spent in training steps", "low"),
    "steps_per_second": _Measure(
        "Training: steps per second", "upper-level steps, each with its lower-level steps", "high"
    ),
}


def result_rows(results: Mapping[str, float]) -> list[Row]:
    """What `evaluate` returned, as lines of a table a newcomer can read."""
    rows = []
    for name, measure in _MEASURES.items():
        if name in results:
            beside = ""
            if measure.reference in results:
                beside = f"{measure.beside}: {_number(measure, results[measure.reference])}"
            value = _number(measure, results[name])
            rows.append(Row(name, measure.label, value, beside, measure.meaning))
    return rows


def save_results(run: Run, results: Mapping[str, float], **how: Any) -> Path:
    """Keep what `evaluate` returned, and how it was asked, in the run's `evaluation.json`."""
    path = run.folder / "evaluation.json"
    write_text(path, json.dumps({**how, "results": dict(results)}, indent=2) + "\n")
    return path


def saved_results(run: Run) -> dict[str, float] | None:
    """What `save_results` kept, `None` if the run was not evaluated yet."""
    path = run.folder / "evaluation.json"
    if not path.exists():
        return None
    results: dict[str, float] = json.loads(path.read_text())["results"]
    return results


def saved_pictures(run: Run) -> dict[str, Path]:
    """The PNG files in the run's folder, by title: samples first, curves last."""
    folder = run.folder
    order = {"samples": 0, "reconstructions": 1, "curves": 9}
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
        parts.append(_results_table(results))
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
    target.parent.mkdir(parents=True, exist_ok=True)
    write_text(target, page(f"{len(runs)} runs compared", "\n".join(parts)))
    return target


_CAPTIONS = {
    "samples": "Drawn from the model in one pass.",
    "reconstructions": "Held-out images above, what the model makes of their latents below.",
    "curves": "What training recorded. The energies of data and samples approach each other when "
    "samples get hard to tell from data.",
}


def _number(measure: _Measure, value: float) -> str:
    if measure.percent:
        return f"{value:.1%}"
    return f"{value:.4f}" if measure.label.startswith("Energy") else f"{value:.3g}"


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


def _results_table(results: Mapping[str, float]) -> str:
    lines = "".join(
        f'<tr><th scope="row">{_text(row.label)}</th><td class="number">{row.value}</td>'
        f'<td class="soft">{_text(row.beside)}</td><td class="soft">{_text(row.meaning)}</td></tr>'
        for row in result_rows(results)
    )
    head = "<tr><th>measure</th><th>value</th><th>for comparison</th><th>how to read it</th></tr>"
    accuracy = results.get("classifier_accuracy")
    note = ""
    if accuracy is not None:
        note = (
            "<p>Classes and features are those of a classifier trained on the real training images; it "
            f"gets {accuracy:.1%} of the held-out ones right.</p>"
        )
    return (
        f'<div class="wide"><table><thead>{head}</thead><tbody>{lines}</tbody></table></div>{note}'
    )


def _comparison_table(
    runs: Sequence[Run],
    configs: Sequence[Mapping[str, Any]],
    results: Sequence[Mapping[str, float]],
) -> str:
    names = [name for name in _MEASURES if any(name in values for values in results)]
    one_data_set = len({json.dumps(c.get("notes", {}).get("data")) for c in configs}) == 1
    best = {}
    for name in names:
        choose = min if _MEASURES[name].better == "low" else max
        best[name] = choose(values[name] for values in results if name in values)
    head = "".join(f"<th>{_text(_MEASURES[name].label)}</th>" for name in names)
    lines = []
    for run, config, values in zip(runs, configs, results, strict=True):
        metrics = run.metrics()
        cells = [_text(_title(config)), f"{metrics[-1]['step']:,}" if metrics else "0"]
        line = f'<th scope="row" class="run">{_text(_name(run))}</th>'
        line += f'<td>{cells[0]}</td><td class="number">{cells[1]}</td>'
        for name in names:
            value = _number(_MEASURES[name], values[name]) if name in values else "-"
            if one_data_set and len(runs) > 1 and values.get(name) == best[name]:
                value = f"<b>{value}</b>"
            line += f'<td class="number">{value}</td>'
        lines.append(f"<tr>{line}</tr>")
    note = (
        "" if one_data_set else "<p>The runs were trained on different data: compare with care.</p>"
    )
    top = f"<tr><th>run</th><th>model</th><th>steps</th>{head}</tr>"
    table = f"<table><thead>{top}</thead><tbody>{''.join(lines)}</tbody></table>"
    return f'<div class="wide">{table}</div>{note}'


def _meanings(results: Sequence[Mapping[str, float]]) -> str:
    known = [name for name in _MEASURES if any(name in values for values in results)]
    return "".join(
        f"<dt>{_text(_MEASURES[name].label)}</dt><dd>{_text(_MEASURES[name].meaning)} "
        f"({_MEASURES[name].better}er is better)</dd>"
        for name in known
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
    data = base64.b64encode(path.read_bytes()).decode()
    kind = "curves" if path.stem == "curves" else "pixels"
    return f'<img class="{kind}" alt="{_text(title)}" src="data:image/png;base64,{data}">'

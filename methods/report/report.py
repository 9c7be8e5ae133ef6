"""The page of a run: its samples, five numbers and what they are worth, and the rest to be opened."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bilevel.files import write_text
from bilevel.methods.report import page as html
from bilevel.methods.report.charts import charts, curve
from bilevel.methods.report.origin import (
    all_settings,
    from_command_line,
    how_it_was_made,
    title_of,
    typed,
    what_was_trained,
)
from bilevel.methods.report.saved import feature_space
from bilevel.methods.report.verdicts import Length, Verdict, five_numbers, length_of
from bilevel.methods.training.curves import evaluation_panels, loss_panels
from bilevel.methods.training.measures import result_rows
from bilevel.methods.training.run import Run

_FIRST = "samples"
_CAPTIONS = {
    _FIRST: "Drawn from the model.",
    "reconstructions": "Held-out images above, what the model makes of their latents below.",
    "neighbours": "Samples above, below each the training image nearest to it in features: copies would "
    "be learned by heart.",
    "evaluations": "What a smaller evaluation found during training.",
    "curves": "What training recorded. The energies of data and samples approach each other when "
    "samples get hard to tell from data.",
}
_IN_WORDS = {
    _FIRST: "Samples drawn from the model, in a grid",
    "reconstructions": "Held-out images, each with its reconstruction below it",
    "neighbours": "Samples, each with the training image nearest to it below",
}


def write_report(
    run: Run,
    results: Mapping[str, float] | None,
    pictures: Mapping[str, Path],
    path: str | os.PathLike[str] | None = None,
) -> Path:
    """One page about one run.

    Args:
        run: a run with a configuration.
        results: what `evaluate` returned, or `None` if it was not asked.
        pictures: PNG files by title; they are put into the page. Where "curves" and "evaluations" are
            among them, they are drawn from the records, larger.
        path: file to write, `report.html` in the run's folder by default. Links lead from there to the
            files of the run.

    Returns:
        The path of the page.

    Raises:
        FileNotFoundError: if the folder holds no run, or a picture is missing.
    """
    config, metrics = run.config(), run.metrics()
    target = run.folder / "report.html" if path is None else Path(path)
    length = length_of(config, metrics)
    parts = [f'<p class="lead">{what_was_trained(config)}</p>']
    if length is not None and length.ended_early:
        parts.append(_early(run, config, length))
    if _FIRST in pictures:
        parts.append(html.section("Samples", _picture(_FIRST, pictures[_FIRST])))
    parts.append(_numbers(run, five_numbers(length, results or {}), results))
    for title, file in pictures.items():
        if title != _FIRST:
            drawn = _drawn(run, metrics, title, file)
            parts.append(html.folded(title.capitalize(), drawn))
    if results:
        parts.append(html.folded("All numbers", _all_numbers(results, feature_space(run))))
    parts.append(html.section("How it was made", how_it_was_made(run, config, target)))
    parts.append(all_settings(config))
    write_text(target, html.page(title_of(config), "\n".join(parts)))
    return target


def _early(run: Run, config: Mapping[str, Any], length: Length) -> str:
    """That steps are missing, and how they can be taken."""
    told = length.how_it_ended
    if run.checkpoint_path.exists() and from_command_line(config):
        clock = f" --max-seconds {length.limit:g}" if length.by_clock else ""
        told += f" To go on: `bilevel train --run {typed(run)} --resume{clock}`."
    elif run.checkpoint_path.exists():
        told += " To go on: `fit(..., run=..., resume=True)`."
    return f'<p class="warn" role="note">{html.text(told)}</p>'


def _numbers(run: Run, verdicts: Sequence[Verdict], results: Mapping[str, float] | None) -> str:
    cards = "".join(
        f'<div><dt>{html.text(verdict.label)}</dt><dd class="value">{html.text(verdict.value)}</dd>'
        f"<dd>{html.text(verdict.sentence)}</dd></div>"
        for verdict in verdicts
    )
    parts = [f'<dl class="five">{cards}</dl>'] if cards else []
    if not results:
        told = f"Not evaluated yet: `bilevel evaluate {typed(run)}` does it."
        parts.append(f"<p>{html.text(told)}</p>")
    return html.section("In numbers", "".join(parts))


def _all_numbers(results: Mapping[str, float], space: str | None) -> str:
    lines = "".join(
        f'<tr><th scope="row">{html.text(row.label)}</th>'
        f'<td class="number">{html.text(row.value)}</td>'
        f'<td class="soft">{html.text(row.beside)}</td>'
        f'<td class="soft">{html.text(row.meaning)}</td></tr>'
        for row in result_rows(results)
    )
    head = "".join(
        f'<th scope="col">{name}</th>'
        for name in ("measure", "value", "for comparison", "how to read it")
    )
    note = "" if space is None else f"<p>Samples are judged by: {html.text(space)}.</p>"
    return (
        f'<table class="results"><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>{note}'
    )


def _drawn(run: Run, metrics: Sequence[Mapping[str, Any]], title: str, file: Path) -> str:
    """A picture; curves as charts of their own size, where they can be drawn."""
    records, panels = {
        "curves": (metrics, loss_panels),
        "evaluations": (run.evaluations(), evaluation_panels),
    }.get(title, ([], None))
    if records and panels is not None:
        quantities = {
            name: [
                curve(label, records, key, k, "step") for k, (label, key) in enumerate(of.items())
            ]
            for name, of, _ in panels([dict(record) for record in records])
        }
        try:
            drawn = charts(quantities, "step")
        except ImportError:
            drawn = ""
        if drawn:
            return f"<p>{html.text(_CAPTIONS[title])}</p>{drawn}"
    return _picture(title, file)


def _picture(title: str, file: Path) -> str:
    kind = "figure" if title in ("curves", "evaluations") else "pixels"
    shown = html.image(file, _IN_WORDS.get(title, f"Picture of the run: {title}"), kind)
    if kind == "figure":
        shown = html.scrolling(title, shown)
    return html.figure(shown, _CAPTIONS.get(title, title.capitalize()))

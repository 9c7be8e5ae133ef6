"""The report of a suite: tables, figures and one self-contained HTML page, from its folder."""

import json
import os
from pathlib import Path
from typing import Any

from bilevel.files import write_text
from bilevel.methods.catalogue import NOTHING, Own
from bilevel.methods.data.tables import Table
from bilevel.methods.report import page as html
from bilevel.methods.suite import figures
from bilevel.methods.suite.config import Cell, SuiteConfig
from bilevel.methods.suite.folder import SuiteFolder
from bilevel.methods.suite.job import Job, at_hand, make_table
from bilevel.methods.suite.ranking import rankings, rankings_html, rankings_markdown
from bilevel.methods.suite.runner import trained
from bilevel.methods.suite.tables import Group, as_html, groups, markdown, meanings

Picture = tuple[str, Path, str]  # title, PNG file, caption

_CURVES = (
    "The line is the mean over the seeds, the band reaches from the lowest to the highest. The clock "
    "counts training alone, without the first step, in which steps may be compiled. Early values may "
    "lie below the picture."
)
_CEILING = (
    " The dotted line is the negative entropy of the data, which no model exceeds on average."
)
_DENSITIES = (
    "Exact densities on one scale of colours; data: the density that the rows are drawn from."
)
_FILTERS = (
    "Weights of hidden units as images, the strongest first; red is positive, blue negative, the scale "
    "that of each method's largest weight."
)
_SAMPLES = (
    "Above rows of the test data, then what each method draws: in one pass where it learned a sampler, "
    "else by Gibbs sampling from random latents. Grey data stand for probabilities; samples of binary "
    "machines are bits."
)


def write_suite_report(
    home: SuiteFolder, own: Own = NOTHING, path: str | os.PathLike[str] | None = None
) -> Path:
    """Write `tables.md`, the figures and `report.html` into a suite's folder.

    Curves and tables need the records alone; what shows a model is drawn from the first seed whose
    model is still in `cells/`.

    Args:
        home: the suite; it may be half finished.
        own: what of its configuration is not of this package; without it, cells that need it are not
            drawn.
        path: file to write the page to, instead of `report.html`.

    Returns:
        The path of the page.

    Raises:
        FileNotFoundError: if the folder holds no suite.
        ValueError: if it holds no records yet.
        ImportError: if matplotlib is missing; the tables are written before.
    """
    config, records = home.config(), home.records()
    if not records:
        raise ValueError(
            f"the suite in `{home.folder}` has no finished cells yet; run it with `bilevel bench eblvm`"
        )
    found = groups(records, [cell.name for cell in config.cells()])
    ranked = rankings(records)
    write_text(home.folder / "tables.md", markdown(found) + rankings_markdown(ranked))
    target = home.folder / "report.html" if path is None else Path(path)
    parts = [f'<p class="lead">{html.text(_what(config, records))}</p>']
    tables: dict[str, Table] = {}
    for group in found:
        pictures = _draw(home, config, group, records, tables, own)
        shown = [_picture(group, number, *picture) for number, picture in enumerate(pictures)]
        parts.append(
            html.section(group.title, "".join([_notes(config, group), as_html(group), *shown]))
        )
    parts.append(rankings_html(ranked))
    pairs = [(title, html.text(meaning)) for title, meaning in meanings(found).items()]
    parts.append(html.section("How to read the tables", html.terms(pairs)))
    parts.append(html.section("How it was made", _origin(home, records, target)))
    parts.append(_methods(records))
    write_text(target, html.page(f"Suite {config.name}", "\n".join(parts)))
    return target


def _picture(group: Group, number: int, title: str, file: Path, caption: str) -> str:
    """A figure of a group; the first, its curves, is seen at once."""
    kind = "chart figure" if number == 0 else "figure"
    seen = html.image(file, f"{title} of {group.title}. {caption}", kind)
    drawn = html.figure(html.scrolling(f"{title} of {group.title}", seen), caption)
    return f"<h3>{html.text(title)}</h3>{drawn}"


def _origin(home: SuiteFolder, records: list[dict[str, Any]], page: Path) -> str:
    """Dates, versions and links."""
    times = sorted(record["time"] for record in records if "time" in record)
    span = " to ".join(dict.fromkeys(html.date(time) for time in times[:1] + times[-1:]))
    versions = dict.fromkeys(
        f"bilevel {record['versions'].get('bilevel', '?')}, commit {record['commit'] or 'unknown'}, "
        f"torch {record['versions'].get('torch', '?')}"
        for record in records
    )
    machines = dict.fromkeys(f"{r['device']}, threads: {r['threads']}" for r in records)
    files = [
        html.link(home.folder / name, page, name)
        for name in ("suite.json", "records.jsonl", "tables.md")
    ]
    return html.terms(
        [
            ("Cells ended", span or html.date(None)),
            ("Versions", html.text("; ".join(versions))),
            ("Machine", html.text("; ".join(machines))),
            ("Files", ", ".join(files)),
        ]
    )


def _what(config: SuiteConfig, records: list[dict[str, Any]]) -> str:
    failed = sum(record["status"] == "failed" for record in records)
    sentences = [
        config.note,
        f"{len(records)} of {len(config.cells())} cells ended"
        + (f", {failed} of them failed." if failed else "."),
        "Run on " + ", ".join(dict.fromkeys(record["device"] for record in records)) + ".",
    ]
    return " ".join(sentence for sentence in sentences if sentence)


def _notes(config: SuiteConfig, group: Group) -> str:
    notes = [
        block.note
        for block in config.blocks
        if group.data in [data.name for data in block.data]
        and group.model in [model.name for model in block.models]
    ]
    return "".join(f"<p>{html.text(note)}</p>" for note in notes if note)


def _draw(
    home: SuiteFolder,
    config: SuiteConfig,
    group: Group,
    records: list[dict[str, Any]],
    tables: dict[str, Table],
    own: Own,
) -> list[Picture]:
    """The pictures there can be of one group."""
    stem = f"{group.data}-{group.model}"
    pictures: list[Picture] = []

    def add(kind: str, caption: str) -> Path:
        path = home.folder / f"{kind}-{stem}.png"
        pictures.append((kind.capitalize(), path, caption))
        return path

    caption = _CURVES if group.ceiling is None else _CURVES + _CEILING
    figures.draw_curves(group, records, add("curves", caption))
    jobs = _trained(home, config, group, records, tables, own)
    if not jobs:
        return pictures
    job = next(iter(jobs.values()))
    if job.table.density is not None and job.machine.enumerable:
        figures.draw_densities(jobs, group.title, add("densities", _DENSITIES))
    if job.cell.data.image is not None:
        if not figures.draw_filters(jobs, group.title, add("filters", _FILTERS)):
            pictures.pop()
        figures.draw_samples(jobs, group.title, add("samples", _SAMPLES))
    return pictures


def _trained(
    home: SuiteFolder,
    config: SuiteConfig,
    group: Group,
    records: list[dict[str, Any]],
    tables: dict[str, Table],
    own: Own,
) -> dict[str, Job]:
    """By method: the first seed that finished and whose model is there."""
    finished = {record["cell"] for record in records if record["status"] == "finished"}
    found: dict[str, Job] = {}
    for cell in config.cells():
        here = cell.parts[:2] == (group.data, group.model) and cell.name in finished
        if here and cell.method.name not in found and _is_kept(home, cell) and at_hand(cell, own):
            if cell.data.name not in tables:
                tables[cell.data.name] = make_table(cell.data, own)
            job = trained(cell, tables[cell.data.name], home.cell_folder(cell), own)
            if job is not None:
                found[cell.method.name] = job
    return found


def _is_kept(home: SuiteFolder, cell: Cell) -> bool:
    return (home.cell_folder(cell) / "model" / "weights.safetensors").exists()


def _methods(records: list[dict[str, Any]]) -> str:
    """What every method was, with all its settings, once per group."""
    parts = []
    seen: dict[str, dict[str, Any]] = {}
    for record in records:
        seen.setdefault(record["cell"].rpartition("/")[0], record)
    for name, record in seen.items():
        method = record["method"]
        options = ", ".join(f"{key}={value!r}" for key, value in method["options"].items())
        settings = {
            "method": f"{method['method']}({options})",
            "solver": record["solver"],
            "data": json.dumps(record["data"]),
            "model": json.dumps(record["model"]),
            **{key: value for key, value in record["training"].items() if key != "seed"},
            "commit": record["commit"],
            **record["versions"],
        }
        parts.append(html.folded(name, html.settings_table(settings)))
    return html.folded("Methods and settings", "\n".join(parts))

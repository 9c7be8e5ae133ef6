"""What a page says of a run besides numbers: what was trained, how and when, where its files are."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bilevel.methods.report.page import (
    UNKNOWN,
    code,
    date,
    folded,
    link,
    settings_table,
    terms,
    text,
)
from bilevel.methods.training.run import Run

Settings = Mapping[str, Any]

_FILES = {
    "config.json": "all settings",
    "metrics.jsonl": "what training recorded",
    "evaluations.jsonl": "evaluations during training",
    "evaluation.json": "the evaluation at the end",
    "model/model.json": "the trained model",
    "best/best.json": "the best model",
    "report.html": "the page of this run",
}
#: of a configuration: when and how a run was begun, which is told elsewhere and no setting
_NO_SETTINGS = {"began", "resumed", "stopped", "notes.command"}


def typed(run: Run) -> str:
    """Its folder, as it can be typed after a command."""
    return shlex.quote(str(run.folder))


def from_command_line(config: Settings) -> bool:
    """Whether it was begun by a command, which can go on with it."""
    notes = config.get("notes", {})
    return "solver" in notes or bool(notes.get("command"))


def title_of(config: Settings) -> str:
    """Method and data."""
    data = config.get("notes", {}).get("name")
    method = config.get("method") or "A run"
    return f"{method} on {data}" if data else str(method)


def what_was_trained(config: Settings) -> str:
    """A sentence as HTML: the method, the data, the solver."""
    notes, shape = config.get("notes", {}), (config.get("data") or {}).get("shape", [])
    many = f"{shape[0]:,} {_things(shape[1:])}" if shape else "unknown data"
    source = notes.get("name") or notes.get("data")
    told = f" of {text(source)}" if source else ""
    aside = f" ({text(notes['note'])})" if notes.get("note") else ""
    solver = f", with the solver {code(config['solver'])}" if "solver" in config else ""
    return f"{text(config.get('method') or 'A model')} trained on {many}{told}{aside}{solver}."


def _things(shape: Sequence[int]) -> str:
    if len(shape) == 3:
        channels, height, width = shape
        kind = {1: "grey images", 3: "colour images"}.get(
            channels, f"images of {channels} channels"
        )
        return f"{kind} of {height} x {width} pixels"
    return f"rows of {' x '.join(map(str, shape))} numbers"


def how_it_was_made(run: Run, config: Settings, page: Path) -> str:
    """Date, command, versions and links, as HTML."""
    versions = config.get("versions", {})
    notes = config.get("notes", {})
    command = notes.get("command")
    begun_by = code(command) if command else "from Python" if "began" in config else UNKNOWN
    library = versions.get("bilevel", UNKNOWN)
    commit = config.get("commit")
    machine = [str(versions["device"])] if "device" in versions else []
    if notes.get("device"):
        machine = [str(notes["device"]), *(f"({name})" for name in machine)]
    if "threads" in versions:
        many = str(versions["threads"])
        machine.append(f"with {many} thread{'' if many == '1' else 's'}")
    pairs = [
        ("Begun", date(config.get("began"))),
        ("Command", begun_by),
        ("Library", text(f"bilevel {library}" + (f", commit {commit}" if commit else ""))),
        (
            "Python, PyTorch",
            text(f"{versions.get('python', UNKNOWN)}, {versions.get('torch', UNKNOWN)}"),
        ),
        ("Machine", text(" ".join(machine) or UNKNOWN)),
        ("Files", _links(run, page)),
    ]
    if config.get("resumed"):
        steps = ", ".join(f"{step:,}" for step in config["resumed"])
        pairs.insert(1, ("Taken up again", text(f"after step {steps}")))
    return terms(pairs)


def all_settings(config: Settings) -> str:
    """Every setting, to be opened."""
    return folded("All settings and versions", settings_table(flat(config)))


def flat(config: Settings, prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted name, without what is no setting."""
    found: dict[str, Any] = {}
    for name, value in config.items():
        full = prefix + name
        if full in _NO_SETTINGS:
            continue
        found |= flat(value, f"{full}.") if isinstance(value, dict) else {full: value}
    return found


def _links(run: Run, page: Path) -> str:
    found = [
        f"<span>{link(run.folder / name, page, name)} ({text(what)})</span>"
        for name, what in _FILES.items()
        if (run.folder / name).exists() and (run.folder / name).resolve() != page.resolve()
    ]
    return "<br>".join(found) or "none"

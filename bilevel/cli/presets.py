"""`bilevel presets`: a list of all presets, or one of them in full."""

import shutil
import textwrap
from collections.abc import Mapping
from typing import Any

from bilevel.cli.options import Parser, UsageError, model_settings
from bilevel.methods.presets import PRESETS, Preset
from bilevel.methods.training.settings import nearest

SUMMARY = "list the presets: published experiments and small ones"
_EXAMPLES = """  bilevel presets
  bilevel presets cifar10
  bilevel train --preset cifar10 --data cifar10.zip
"""


def command(arguments: list[str]) -> int:
    """Read the arguments and print."""
    parser = Parser("presets", SUMMARY, "[NAME]", _EXAMPLES)
    parser.add_argument("name", nargs="?", metavar="NAME", help="print this one in full")
    args = parser.read(arguments)
    name = getattr(args, "name", None)
    if name is not None and name.lower() not in PRESETS:
        raise UsageError(f"there is no preset `{name}`; {nearest(name.lower(), PRESETS)}")
    print(_list() if name is None else _in_full(PRESETS[name.lower()]))
    return 0


def _list() -> str:
    rows = [(p.name, p.method.__name__, p.data, p.about, p.source) for p in PRESETS.values()]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = []
    for *cells, about, source in rows:
        start = "  ".join(f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True))
        lines += [f"{start}  {about}", f"    {source.split('; ')[0]}"]
    hint = "`bilevel presets NAME` prints one in full, `bilevel train --preset NAME` trains it"
    return "\n".join([*lines, "", hint])


def _in_full(preset: Preset) -> str:
    channels, side, _ = preset.shape
    model = {setting.name: setting.default for setting in model_settings(preset.method)}
    data = {"data": preset.data, "channels": channels, "side": side, **preset.loading}
    parts = [
        f"{preset.name}: {preset.about}",
        _wrapped("source: " + preset.source),
        *([_wrapped("note: " + preset.note)] if preset.note else []),
        _block("data", data),
        _block(preset.method.__name__, {**model, **preset.model}),
        _block("training", preset.settings().model_dump()),
    ]
    return "\n\n".join(parts)


def _block(title: str, values: Mapping[str, Any]) -> str:
    width = max(map(len, values))
    rows = [f"  {name:<{width}}  {_plain(value)}" for name, value in values.items()]
    return "\n".join([title, *rows])


def _plain(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(map(_plain, value))
    return "-" if value is None else str(value)


def _wrapped(text: str) -> str:
    return textwrap.fill(text, min(100, shutil.get_terminal_size((100, 24)).columns))

"""`bilevel presets`: a list of all presets with size and time, or one of them in full."""

import json
import shutil
import textwrap
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch.nn.functional import conv2d

from bilevel.cli.options import Parser, UsageError, model_settings
from bilevel.cli.placing import device_of
from bilevel.cli.progress import duration
from bilevel.methods.presets import PRESETS, Preset
from bilevel.methods.presets.costs import COSTS
from bilevel.methods.training.settings import nearest

SUMMARY = "list the presets: published experiments and small ones"
_EXAMPLES = """  bilevel presets
  bilevel presets cifar10
  bilevel presets --json > presets.json
  bilevel train --preset cifar10 --data cifar10.zip
"""
_FAST = 20e12  # operations a second of the second estimate
_DAY = 24 * 3600
_NOTE = (
    "HERE: the whole training at the speed of convolutions on {device}, {speed:.2g} TFLOP/s, and so a "
    "lower bound; `bilevel train --preset NAME --dry-run` times two steps. AT 20 TFLOP/s: the same on a "
    "device as fast as that."
)


def command(arguments: list[str]) -> int:
    """Read the arguments and print."""
    parser = Parser("presets", SUMMARY, "[NAME] [--json]", _EXAMPLES)
    parser.add_argument("name", nargs="?", metavar="NAME", help="print this one in full")
    parser.add_argument("--json", action="store_true", help="print JSON, for scripts")
    args = parser.read(arguments)
    name = getattr(args, "name", None)
    if name is not None and name.lower() not in PRESETS:
        raise UsageError(f"there is no preset `{name}`; {nearest(name.lower(), PRESETS)}")
    chosen = list(PRESETS.values()) if name is None else [PRESETS[name.lower()]]
    device = device_of(None)
    speed = _speed(device)
    if "json" in args:
        print(json.dumps([_record(preset, device, speed) for preset in chosen], indent=2))
    else:
        print(_list(device, speed) if name is None else _in_full(chosen[0], device, speed))
    return 0


def _speed(device: str, seconds: float = 0.2) -> float:
    """Operations a second of a convolution and its gradients, in float32."""
    v = torch.ones(32, 64, 16, 16, device=device, requires_grad=True)
    filters = torch.ones(64, 64, 3, 3, device=device, requires_grad=True)
    each, count = 3 * 2 * v.numel() * 64 * 9, -1  # the first one warms up
    began = time.perf_counter()
    while count < 1 or time.perf_counter() - began < seconds:
        found = torch.autograd.grad(conv2d(v, filters, padding=1).sum(), [v, filters])
        float(found[1].sum())  # waits for the device
        count += 1
        began = time.perf_counter() if count == 0 else began
    return each * count / (time.perf_counter() - began)


def _record(preset: Preset, device: str, speed: float) -> dict[str, Any]:
    """A preset in numbers."""
    cost, training = COSTS[preset.name], preset.settings()
    operations = cost.operations * training.num_steps
    return {
        "name": preset.name,
        "about": preset.about,
        "method": preset.method.__name__,
        "data": preset.data,
        "shape": preset.shape,
        "parameters": cost.parameters,
        "num_steps": training.num_steps,
        "operations_per_step": cost.operations,
        "meant_for": preset.meant_for,
        "seconds_at_least": {device: operations / speed, "20 TFLOP/s": operations / _FAST},
        "source": preset.source,
    }


def _list(device: str, speed: float) -> str:
    rows: list[tuple[str, ...]] = [
        ("PRESET", "METHOD", "SIZE", "STEPS", "FOR", "HERE", "AT 20 TFLOP/s")
    ]
    for preset in PRESETS.values():
        record = _record(preset, device, speed)
        rows.append(
            (
                preset.name,
                preset.method.__name__,
                _size(record["parameters"]),
                f"{record['num_steps']:,}",
                preset.meant_for,
                *(_about(seconds) for seconds in record["seconds_at_least"].values()),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row, about in zip(rows, (None, *PRESETS.values()), strict=True):
        cells = [
            f"{cell:<{width}}" if column in (0, 1, 4) else f"{cell:>{width}}"
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
        if about is not None:
            source = about.source.split("; ")[0].split(", Bi-level")[0]
            lines.append(_indented(f"{about.about} ({source})"))
    note = _NOTE.format(device=device, speed=speed / 1e12)
    hint = "`bilevel presets NAME` prints one in full, `bilevel train --preset NAME` trains it."
    return "\n".join([*lines, "", _wrapped(note), hint])


def _size(parameters: int) -> str:
    return f"{parameters / 1e6:.1f} M" if parameters >= 1e6 else f"{parameters / 1e3:.0f} k"


def _about(seconds: float) -> str:
    return f"{seconds / _DAY:.1f} days" if seconds > 2 * _DAY else duration(seconds)


def _in_full(preset: Preset, device: str, speed: float) -> str:
    channels, side, _ = preset.shape
    model = {setting.name: setting.default for setting in model_settings(preset.method)}
    data = {"data": preset.data, "channels": channels, "side": side, **preset.loading}
    record = _record(preset, device, speed)
    here, fast = (_about(seconds) for seconds in record["seconds_at_least"].values())
    cost = {
        "parameters": f"{record['parameters']:,}",
        "operations": f"{record['operations_per_step']:.3g} a step",
        "meant for": preset.meant_for,
        "time": f"at least {here} here ({device}), {fast} at 20 TFLOP/s",
    }
    parts = [
        f"{preset.name}: {preset.about}",
        _wrapped("source: " + preset.source),
        *([_wrapped("note: " + preset.note)] if preset.note else []),
        _block("cost", cost),
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


def _columns() -> int:
    return min(100, shutil.get_terminal_size((80, 24)).columns)


def _indented(text: str) -> str:
    return textwrap.fill(text, _columns(), initial_indent="    ", subsequent_indent="    ")


def _wrapped(text: str) -> str:
    return textwrap.fill(text, _columns())

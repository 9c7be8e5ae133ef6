"""`Card`: what an object says of itself, as a few lines of text and as a table for notebooks."""

import html
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

_NAMED = 4  # variables or networks that are listed by name; more are counted
_LONG = 72  # characters of one value
_STYLE = "text-align:left;vertical-align:top;padding:2px 12px 2px 0;font-weight:normal;"
_NAME = f"{_STYLE}opacity:.65;white-space:nowrap"


@final
@dataclass(frozen=True)
class Card:
    """A title, and rows of a name and a value; both plain text.

    Attributes:
        title: what the thing is.
        rows: what there is to know about it.
        picture: HTML that is shown below the title in a notebook, such as that of `curves`.

    Example:
        >>> print(Card("Rows", [("train", "10 x 3"), ("test", "5 x 3")]))
        Rows
          train  10 x 3
          test   5 x 3
    """

    title: str
    rows: Sequence[tuple[str, str]] = field(default=())
    picture: str = ""

    def __str__(self) -> str:
        width = max((len(name) for name, _ in self.rows), default=0)
        return "\n".join([self.title, *(f"  {n:{width}}  {value}" for n, value in self.rows)])

    def html(self) -> str:
        """The same as HTML, in the colours of the page it is put into."""
        lines = "".join(
            f'<tr><th scope="row" style="{_NAME}">{_marked(name)}</th>'
            f'<td style="{_STYLE}">{_marked(value)}</td></tr>'
            for name, value in self.rows
        )
        table = f'<table style="border-collapse:collapse">{lines}</table>' if lines else ""
        return f"<div><b>{_marked(self.title)}</b>{self.picture}{table}</div>"


def digits(value: Any) -> str:
    """A number in four digits; a tensor's is read from the device, which waits for it.

    Example:
        >>> digits(1234.56), digits(3), digits(None)
        ('1235', '3', 'None')
    """
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.is_meta:
            return f"a tensor of shape {tuple(value.shape)}"
        try:
            value = value.item()
        except RuntimeError:  # within a transform of `torch.func` there is no number to read
            return "a number that is traced"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def numbers_by_name(values: Mapping[str, Any]) -> str:
    """Numbers with their names, as in `upper_loss 0.1, lower_loss 0.2`; missing ones are left out."""
    return ", ".join(f"{n} {digits(v)}" for n, v in values.items() if v is not None)


def plural(count: int, what: str) -> str:
    """A count and its noun, as in `1,234 steps`."""
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"


def settings(values: Mapping[str, Any]) -> str:
    """The plain ones among the values, as arguments: `rate=0.1, kind='a'`."""
    plain = {name: value for name, value in values.items() if _plain(value)}
    return ", ".join(f"{name}={value!r}" for name, value in plain.items())


def parameters_of(module: nn.Module) -> str:
    """The variables of a level and its frozen parameters: how many, and their names if they are few."""
    held = dict(module.named_parameters())
    variables = {name: p for name, p in held.items() if p.requires_grad}
    frozen = {name: p for name, p in held.items() if not p.requires_grad}
    said = "no variables"
    if variables:
        said = _counted(variables)
        said += f": {_shapes(variables)}" if len(variables) <= _NAMED else f"{_networks(module)}"
    return said + (f"; frozen: {_counted(frozen)}" if frozen else "")


def whereabouts(module: nn.Module) -> str:
    """The devices and types of the parameters, as in `cpu, float32`."""
    held = list(module.parameters())
    devices = dict.fromkeys(str(p.device) for p in held)
    kinds = dict.fromkeys(str(p.dtype).removeprefix("torch.") for p in held)
    return f"{' and '.join(devices)}, {' and '.join(kinds)}" if held else "no parameters"


def curves(lines: Mapping[str, Iterable[tuple[float, float]]]) -> str:
    """Small curves as an SVG, one below the other, each in a scale of its own; needs no library.

    Args:
        lines: points by the name of the curve; points that are not finite are left out.
    """
    parts = []
    for name, points in lines.items():
        finite = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
        if len(finite) < 2:
            continue
        xs, ys = zip(*finite, strict=True)
        wide, high = (max(xs) - min(xs)) or 1.0, (max(ys) - min(ys)) or 1.0
        places = " ".join(
            f"{200 * (x - min(xs)) / wide:.1f},{38 - 36 * (y - min(ys)) / high:.1f}"
            for x, y in finite
        )
        ends = f"{digits(float(ys[0]))} to {digits(float(ys[-1]))}"
        parts.append(
            '<figure style="display:inline-block;margin:4px 16px 4px 0">'
            f'<svg width="200" height="40" role="img" aria-label="{html.escape(name)}: {ends}">'
            f'<polyline points="{places}" fill="none" stroke="#1f6fb4" stroke-width="1.5"/></svg>'
            f'<figcaption style="font-size:smaller;opacity:.65">{html.escape(name)}: {ends}'
            "</figcaption></figure>"
        )
    return f"<div>{''.join(parts)}</div>" if parts else ""


def as_plain(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table for a terminal: names to the left, numbers to the right."""
    widths = [max(len(line[k]) for line in (head, *lines)) for k in range(len(head))]
    shown: list[Any] = []
    for line in (head, *lines):
        first, *rest = (
            text.ljust(width) if k == 0 else text.rjust(width)
            for k, (text, width) in enumerate(zip(line, widths, strict=True))
        )
        shown.append("  ".join((first, *rest)).rstrip())
    return "\n".join(shown)


def table_as_html(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """The same table as HTML, in the colours of the page it is put into."""
    number = f"{_STYLE}text-align:right;white-space:nowrap"
    top = "".join(
        f'<th scope="col" style="{number if k else _STYLE}">{_marked(name)}</th>'
        for k, name in enumerate(head)
    )
    body = "".join(
        f'<tr><th scope="row" style="{_STYLE}">{_marked(name)}</th>'
        + "".join(f'<td style="{number}">{_marked(text)}</td>' for text in rest)
        + "</tr>"
        for name, *rest in lines
    )
    return (
        '<table style="border-collapse:collapse"><thead style="opacity:.65"><tr>'
        f"{top}</tr></thead><tbody>{body}</tbody></table>"
    )


def _marked(text: str) -> str:
    """Text as HTML, what stands between backticks as code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))


def _counted(held: Mapping[str, Tensor]) -> str:
    known = [p.numel() for p in held.values() if not isinstance(p, UninitializedParameter)]
    open_ones = len(held) - len(known)
    rest = f", {open_ones} of them without a shape yet" if open_ones else ""
    return f"{plural(sum(known), 'parameter')} in {plural(len(held), 'tensor')}{rest}"


def _shapes(held: Mapping[str, Tensor]) -> str:
    return ", ".join(
        name if isinstance(p, UninitializedParameter) else f"{name} {tuple(p.shape)}"
        for name, p in held.items()
    )


def _networks(module: nn.Module) -> str:
    """The parts of a level that is made of a few; of any other, its class."""
    parts = dict(module.named_children())
    if isinstance(module, nn.ModuleDict) and 0 < len(parts) <= _NAMED:
        return ": " + ", ".join(f"{name} ({type(part).__name__})" for name, part in parts.items())
    return f": {type(module).__name__}"


def _plain(value: Any) -> bool:
    """Whether a value says something in a few characters."""
    if isinstance(value, (tuple, list)):
        return len(value) <= _NAMED and all(map(_plain, value))
    return isinstance(value, (bool, int, float, str)) and len(repr(value)) <= _LONG

"""The frame of all pages: one HTML file with its style inside, for light, dark, small and paper.

A page loads nothing from elsewhere. What it says is escaped here: text goes in as text.
"""

import base64
import html
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from urllib.parse import quote

from bilevel.files import read_bytes

UNKNOWN = "not recorded"
_OPTION, _WHOLE = re.compile(r"(?<=\s)--?\w[\w-]*"), r'<span class="whole">\g<0></span>'


def page(title: str, body: str) -> str:
    """A whole page; nothing in it is loaded from elsewhere.

    Args:
        title: plain text.
        body: HTML below the title.
    """
    name = html.escape(title)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{name}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{name}</h1>\n{body}\n</main>\n</body>\n</html>\n"
    )


def text(value: object) -> str:
    """Plain text as HTML; what stands between backticks becomes code."""
    return re.sub(
        r"`([^`]*)`", lambda found: code(html.unescape(found[1])), html.escape(str(value))
    )


def code(value: object) -> str:
    """Something to be typed; an option is not torn apart at the end of a line."""
    return f"<code>{_OPTION.sub(_WHOLE, html.escape(str(value)))}</code>"


def breakable(name: object) -> str:
    """A long name, which may go on in the next line after a dot, a dash or a slash."""
    return re.sub(r"([._/-])(?=\w)", r"\1<wbr>", text(name))


def section(title: str, body: str) -> str:
    """A part of a page that is always seen."""
    return f"<section>\n<h2>{text(title)}</h2>\n{body}\n</section>"


def folded(title: str, body: str, note: str = "") -> str:
    """A part of a page that opens on a click.

    Args:
        title: of the part, plain text.
        body: HTML.
        note: what is inside, plain text.
    """
    more = f' <span class="soft">{text(note)}</span>' if note else ""
    return (
        f'<details>\n<summary><span class="title">{text(title)}</span>{more}</summary>\n'
        f"{body}\n</details>"
    )


def scrolling(what: str, body: str) -> str:
    """A table or a picture that may be wider than the screen: it scrolls, with the keyboard too."""
    return f'<div class="wide" role="region" tabindex="0" aria-label="{text(what)}">{body}</div>'


def terms(pairs: Iterable[tuple[str, str]]) -> str:
    """A list of names and what they are.

    Args:
        pairs: a name, plain text, and HTML.
    """
    lines = "".join(f"<div><dt>{text(name)}</dt><dd>{body}</dd></div>" for name, body in pairs)
    return f'<dl class="terms">{lines}</dl>'


def settings_table(settings: Mapping[str, object]) -> str:
    """Names and values, a line each."""
    lines = "".join(
        f'<tr><th scope="row">{breakable(name)}</th><td>{text(value)}</td></tr>'
        for name, value in settings.items()
    )
    return f'<table class="settings"><tbody>{lines}</tbody></table>'


def numbers_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose first column stays in view where it is wider than the screen.

    Args:
        head: names of the columns, plain text.
        rows: cells as HTML; the first of each names the row.
    """
    top = "".join(f'<th scope="col">{text(name)}</th>' for name in head)
    body = "".join(
        f'<tr><th scope="row" class="run">{row[0]}</th>'
        + "".join(f'<td class="number">{cell}</td>' for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def image(picture: Path | bytes, alt: str, kind: str) -> str:
    """A PNG inside the page.

    Args:
        picture: the file, or what it holds.
        alt: what is to be seen, for who does not see it.
        kind: "pixels" (images of the data's own kind), "chart" (ink on white: turned over on dark
            screens) or "figure" (other ink on white).
    """
    content = picture if isinstance(picture, bytes) else read_bytes(picture)
    data = base64.b64encode(content).decode()
    return f'<img class="{kind}" alt="{text(alt)}" src="data:image/png;base64,{data}">'


def titled(title: str, content: str) -> str:
    """A picture below its title.

    Args:
        title: plain text.
        content: HTML.
    """
    return f'<figure><figcaption class="title">{text(title)}</figcaption>{content}</figure>'


def figure(content: str, caption: str) -> str:
    """A picture and what it shows.

    Args:
        content: HTML.
        caption: plain text.
    """
    return f"<figure>{content}<figcaption>{text(caption)}</figcaption></figure>"


def link(target: Path, page: Path, label: str) -> str:
    """A link from a page to a file beside it; only the label where no relative way leads there."""
    try:
        way = os.path.relpath(target.resolve(), page.resolve().parent)
    except ValueError:  # another drive
        return text(label)
    return f'<a href="./{quote(Path(way).as_posix())}">{text(label)}</a>'


def date(moment: object) -> str:
    """A moment as it stands in the records, for people; that it is not recorded, if it is not."""
    try:
        when = datetime.fromisoformat(str(moment))
    except ValueError:
        return UNKNOWN
    return f'<time datetime="{text(moment)}">{when.day} {when:%B %Y, %H:%M} UTC</time>'


def swatch(colour: str, dash: str) -> str:
    """The line of a legend."""
    return f'<span class="swatch" style="border-top: 3px {dash} {colour}"></span>'


_STYLE = """
:root { color-scheme: light dark; --text: #1d2329; --soft: #56616b; --line: #d9dee3; --page: #fff;
  --card: #f4f6f8; --link: #0b5cad; --warn: #fff4dc; --edge: #d99a1c; }
@media screen and (prefers-color-scheme: dark) {
  :root { --text: #e3e7eb; --soft: #a3afba; --line: #38414a; --page: #14181c; --card: #1e242a;
    --link: #7fb7f0; --warn: #33290f; --edge: #b98a2a; }
  img.chart, .swatch { filter: invert(.91) hue-rotate(180deg); }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); overflow-wrap: break-word;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 72rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .6rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; line-height: 1.3; margin: 2rem 0 .6rem; overflow-wrap: anywhere; }
h3 { font-size: 1rem; line-height: 1.3; margin: 1.4rem 0 .4rem; overflow-wrap: anywhere; }
p { margin: .5rem 0; max-width: 48rem; }
a { color: var(--link); overflow-wrap: anywhere; }
:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; }
.lead, .soft, figcaption { color: var(--soft); }
.warn { background: var(--warn); border-left: 4px solid var(--edge); padding: .5rem .9rem;
  border-radius: 0 6px 6px 0; }
.whole { white-space: nowrap; }
code { font: .88em/1.4 ui-monospace, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }

.five { display: grid; grid-template-columns: repeat(auto-fit, minmax(12.5rem, 1fr)); gap: .75rem;
  margin: 0; }
.five > div { background: var(--card); border-radius: 8px; padding: .7rem .9rem; }
.five dt { color: var(--soft); font-size: .9rem; }
.five dd { margin: 0; font-size: .9rem; }
.five .value { font-size: 1.5rem; line-height: 1.3; font-weight: 600;
  font-variant-numeric: tabular-nums; }
.terms { margin: .5rem 0; font-size: .92rem; }
.terms > div { display: grid; grid-template-columns: 13rem 1fr; gap: .1rem 1rem; padding: .2rem 0; }
.terms dt { font-weight: 600; overflow-wrap: anywhere; }
.terms dd { margin: 0; min-width: 0; overflow-wrap: anywhere; }
.files a { margin-right: .9rem; }

.wide { overflow: auto; max-height: 85vh; }
table { border-collapse: separate; border-spacing: 0; font-size: .92rem; }
th, td { text-align: left; vertical-align: top; padding: .4rem 1rem .4rem 0;
  border-bottom: 1px solid var(--line); }
thead th { color: var(--soft); font-weight: 500; vertical-align: bottom; min-width: 5.5rem; }
tbody th { font-weight: 600; }
.wide thead th { position: sticky; top: 0; z-index: 1; background: var(--page); }
.wide th:first-child { position: sticky; left: 0; z-index: 2; background: var(--page);
  min-width: 11rem; max-width: 17rem; overflow-wrap: anywhere; }
.wide thead th:first-child { z-index: 3; }
details .wide th { background: var(--card); }
td.number { font-variant-numeric: tabular-nums; white-space: nowrap; }
td.text { white-space: normal; min-width: 9rem; max-width: 22rem; overflow-wrap: anywhere; }
.best, td.number strong { font-weight: 700; white-space: nowrap; }
.best::after, td.number strong::after { content: " \\2605"; color: var(--edge); }
table.results, table.settings { width: 100%; }
table.settings { table-layout: fixed; }
table.settings th { width: 16rem; }
table.settings th, table.settings td { overflow-wrap: anywhere; }

figure { margin: .5rem 0; }
figcaption { font-size: .9rem; margin: .4rem 0 0; max-width: 48rem; overflow-wrap: anywhere; }
img { display: block; max-width: 100%; height: auto; border-radius: 6px; }
img.pixels { image-rendering: pixelated; }
img.chart, img.figure { background: #fff; }
img.figure { padding: .5rem; }
.wide img.figure { max-width: none; width: 70rem; }
figcaption.title { color: var(--text); font-weight: 600; margin: 0 0 .3rem; }
.side, .charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr));
  gap: 1rem; }
.side figure, .charts figure { margin: 0; min-width: 0; }
.charts img { width: 100%; }
th .soft { font-weight: 400; font-size: .9em; }
.legend { position: sticky; top: 0; z-index: 4; background: var(--page); margin: 0 0 .75rem;
  padding: .4rem 0; display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; list-style: none;
  font-size: .9rem; border-bottom: 1px solid var(--line); max-height: 30vh; overflow: auto; }
.legend li { overflow-wrap: anywhere; }
.swatch { display: inline-block; width: 1.8rem; margin-right: .4rem; vertical-align: middle; }

details { background: var(--card); border-radius: 8px; padding: .6rem 1rem; margin: .6rem 0; }
details > :last-child { margin-bottom: .4rem; }
summary { cursor: pointer; padding: .15rem 0; overflow-wrap: anywhere; }
summary .title { font-weight: 600; }
summary .soft { font-size: .9rem; }

@media (max-width: 60rem) { img.pixels { image-rendering: auto; } }
@media (max-width: 42rem) {
  main { padding: 1.25rem 1rem 3rem; }
  h1 { font-size: 1.5rem; }
  .five > div { display: grid; grid-template-columns: minmax(0, 1fr) auto; gap: 0 1rem;
    align-items: baseline; }
  .five dd:last-child { grid-column: 1 / -1; }
  .five .value { font-size: 1.25rem; }
  .terms > div { grid-template-columns: 1fr; }
  details { padding: .6rem .75rem; }
  .wide th:first-child { min-width: 8rem; max-width: 9rem; padding-right: .6rem; }
  .wide img.figure { width: 46rem; }
  table.results thead { display: none; }
  table.results, table.results tbody, table.results tr, table.results th, table.results td,
  table.settings, table.settings tbody, table.settings tr, table.settings th,
  table.settings td { display: block; width: auto; border: 0; padding: 0; }
  table.results tr, table.settings tr { border-bottom: 1px solid var(--line); padding: .4rem 0; }
  table.results tr { display: grid; grid-template-columns: minmax(0, 1fr) auto; gap: 0 1rem; }
  table.results td.soft { grid-column: 1 / -1; font-size: .88rem; }
}
@media print {
  main { max-width: none; padding: 0; }
  details { background: none; padding: 0; break-inside: auto; }
  details::details-content { content-visibility: visible; display: block; height: auto; }
  .wide { overflow: visible; max-height: none; }
  .wide th, .legend { position: static !important; }
  .wide img.figure { width: 100%; }
  .five > div { border: 1px solid var(--line); }
  figure, tr { break-inside: avoid; }
  h2, h3, summary { break-after: avoid; }
}
"""

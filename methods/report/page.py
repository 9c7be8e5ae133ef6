"""The frame of a report: one HTML page with its style inside, for light and dark screens."""

import html


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


_STYLE = """
:root { color-scheme: light dark; --text: #1d2329; --soft: #5b6670; --line: #d9dee3; --page: #fff;
  --card: #f4f6f8; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e3e7eb; --soft: #9aa6b1; --line: #38414a; --page: #14181c; --card: #1e242a; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 70rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .75rem; }
h2 { font-size: 1.2rem; margin: 2.25rem 0 .6rem; }
.lead { color: var(--soft); margin: 0; }
code { font: .88em/1.4 ui-monospace, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .94rem; }
th, td { text-align: left; vertical-align: top; padding: .45rem .9rem .45rem 0;
  border-bottom: 1px solid var(--line); }
thead th { color: var(--soft); font-weight: 500; vertical-align: bottom; }
tbody th { font-weight: 600; }
td.soft { color: var(--soft); }
th.run { white-space: nowrap; }
td.number { font-variant-numeric: tabular-nums; color: var(--text); white-space: nowrap; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.2rem; font-size: .9rem;
  color: var(--soft); }
dt { font-weight: 600; } dd { margin: 0; }
img { display: block; max-width: 100%; height: auto; border-radius: 6px; }
img.pixels { image-rendering: pixelated; }
img.curves { background: #fff; padding: .75rem; border: 1px solid var(--line); }
.side { display: flex; flex-wrap: wrap; gap: 1.25rem; }
.side figure { margin: 0; flex: 1 1 22rem; min-width: 0; }
figcaption, img + p { color: var(--soft); font-size: .9rem; margin: .4rem 0 0; }
details { background: var(--card); border-radius: 6px; padding: .7rem 1rem; }
summary { cursor: pointer; }
details td { overflow-wrap: anywhere; }
@media (max-width: 40rem) { dl { grid-template-columns: 1fr; } dd { margin-bottom: .4rem; } }
"""

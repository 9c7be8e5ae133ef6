"""Turns formulas into MathML while the site is built, so that pages need no script to show them."""

import html
import re
from typing import Any

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError

# What `pymdownx.arithmatex` (generic) leaves behind: <span class="arithmatex">\(...\)</span>, and a
# <div> with \[...\] for displayed formulas.
_FORMULA = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<tex>.*?)\\[)\]]</(?P=tag)>', re.DOTALL
)
# What the converter reads wrongly, and how to say it so that it does not.
_SPELLINGS = (
    (re.compile(r"\\(begin|end)\{aligned\}"), r"\\\1{align*}"),
    (re.compile(r"\\arg(?![A-Za-z])\s*"), r"\\text{arg }"),
    (re.compile(r"\\operatorname\*?\{([A-Za-z]+)\}"), r"\\text{\1}"),
    (re.compile(r"\\operatorname\*?\{([A-Za-z]+)\\,([A-Za-z]+)\}"), r"\\text{\1 \2}"),
)
# A command it does not know comes out as its own name.
_UNKNOWN = re.compile(r"<m[io][^>]*>(\\[^<]*|&)</m[io]>")


def _mathml(match: re.Match[str]) -> str:
    display = "block" if match["tag"] == "div" else "inline"
    tex = html.unescape(match["tex"]).strip()
    for theirs, ours in _SPELLINGS:
        tex = theirs.sub(ours, tex)
    try:
        mathml = convert(tex, display=display)
    except Exception as error:
        raise PluginError(f"no MathML for the formula `{tex}`: {error!r}") from error
    if unknown := _UNKNOWN.search(mathml):
        raise PluginError(f"no MathML for the formula `{tex}`: it cannot read `{unknown[1]}`")
    return f'<{match["tag"]} class="math">{mathml}</{match["tag"]}>'


def on_page_content(content: str, **_: Any) -> str:
    return _FORMULA.sub(_mathml, content)

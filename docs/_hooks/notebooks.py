"""Shows a notebook as a page: `<!-- notebook: PATH -->` becomes its cells with their outputs."""

import html
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_MARK = re.compile(r"^<!-- notebook: (\S+) -->$", re.MULTILINE)


def _text(parts: str | list[str]) -> str:
    return "".join(parts).strip("\n")


def _output(output: dict[str, Any], code: str) -> str:
    """The richest form of an output, as HTML or Markdown."""
    data = output.get("data", {})
    if "image/png" in data:
        source = _text(data["image/png"]).replace("\n", "")
        alt = html.escape("what the cell shows: " + code.rpartition("\n")[2], quote=True)
        return f'<img alt="{alt}" src="data:image/png;base64,{source}">'
    if "text/html" in data:
        return f'<div class="output">{_text(data["text/html"])}</div>'
    return f"``` {{ .text .output }}\n{_text(data.get('text/plain', output.get('text', '')))}\n```"


def _cells(notebook: dict[str, Any]) -> Iterator[str]:
    for cell in notebook["cells"]:
        source = _text(cell["source"])
        if cell["cell_type"] == "markdown":
            yield source
        else:
            yield f"``` {{ .python }}\n{source}\n```"
            yield from (_output(output, source) for output in cell["outputs"])


def _shown(match: re.Match[str]) -> str:
    notebook = json.loads(Path(match[1]).read_text(encoding="utf-8"))
    return "\n\n".join(_cells(notebook))


def on_page_markdown(markdown: str, **_: Any) -> str:
    return _MARK.sub(_shown, markdown)

"""Lets the reference show docstring examples as code and references line by line."""

import re
from typing import Any

import griffe

# The style we write says `Example:`; the parser knows the plural only.
_EXAMPLE = re.compile(r"^Example:$", re.MULTILINE)
_REFERENCES = re.compile(r"^References:\n(?P<lines>(?:[ ]+.*\n?|\n)+)", re.MULTILINE)


def _by_work(match: re.Match[str]) -> str:
    """A blank line after each work: it ends in its address, here or a line further on."""
    lines = re.sub(r"(https?://\S+)\n(?=[ ]+[A-Z])", r"\1\n\n", match["lines"])
    lines = re.sub(r":\n(?=[ ]+- )", ":\n\n", lines)  # a list starts after a blank line
    return f"References:\n{lines}"


class Docstrings(griffe.Extension):
    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            text = _EXAMPLE.sub("Examples:", obj.docstring.value)
            obj.docstring.value = _REFERENCES.sub(_by_work, text)

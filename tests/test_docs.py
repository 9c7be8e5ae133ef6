"""The documentation can be read: its formulas are ones that KaTeX knows, every example is shown."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
CODE = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)
FORMULA = re.compile(r"\$\$(.+?)\$\$|\$([^$]+)\$", re.DOTALL)
COMMAND = re.compile(r"\\([A-Za-z]+|.)", re.DOTALL)


def texts() -> Iterator[tuple[str, str]]:
    """Pages and docstrings, with where they are."""
    for page in DOCS.rglob("*.md"):
        yield str(page.relative_to(ROOT)), page.read_text(encoding="utf-8")
    for module in (*(ROOT / "bilevel").rglob("*.py"), *(ROOT / "methods").rglob("*.py")):
        for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                yield str(module.relative_to(ROOT)), ast.get_docstring(node) or ""


def formulas() -> Iterator[tuple[str, str]]:
    for where, text in texts():
        for displayed, inline in FORMULA.findall(CODE.sub("", text)):
            yield where, displayed or inline


def test_katex_knows_every_command_of_a_formula() -> None:
    # Names are strings in its source. What it does not know, it would show in red.
    source = (DOCS / "assets" / "katex" / "katex.min.js").read_text(encoding="utf-8")
    known = {*re.findall(r'"\\\\([A-Za-z]+|[^A-Za-z])"', source), "\\"}
    found = list(formulas())
    assert len(found) > 500, "the formulas have moved; mend this test"
    unknown = [
        (where, name) for where, tex in found for name in COMMAND.findall(tex) if name not in known
    ]
    assert not unknown, unknown


def test_braces_of_formulas_match() -> None:
    for where, tex in formulas():
        depth = 0
        for sign in re.findall(r"(?<!\\)[{}]", tex):
            depth += 1 if sign == "{" else -1
            assert depth >= 0, f"{where}: {tex}"
        assert depth == 0, f"{where}: {tex}"
        assert len(re.findall(r"\\left(?![a-z])", tex)) == len(re.findall(r"\\right(?![a-z])", tex))


def test_pages_load_nothing_from_elsewhere() -> None:
    configuration = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert "http" not in configuration, "a reader's browser would fetch it"
    for script in (DOCS / "assets").glob("*.js"):
        assert "http" not in script.read_text(encoding="utf-8"), script

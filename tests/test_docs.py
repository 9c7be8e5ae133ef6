"""The documentation can be read: its formulas are ones that KaTeX knows, every example is shown."""

import re
from functools import cache
from pathlib import Path

import bilevel
import bilevel.methods

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
CODE = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)
FORMULA = re.compile(r"\$\$(.+?)\$\$|\$([^$]+)\$", re.DOTALL)
COMMAND = re.compile(r"\\([A-Za-z]+|.)", re.DOTALL)


@cache
def formulas() -> list[tuple[str, str]]:
    """The formulas of pages and docstrings, and where each is."""
    found = []
    for path in (
        *DOCS.rglob("*.md"),
        *(ROOT / "bilevel").rglob("*.py"),
        *(ROOT / "methods").rglob("*.py"),
    ):
        text = CODE.sub("", path.read_text(encoding="utf-8"))
        for displayed, inline in FORMULA.findall(text):
            found.append((str(path.relative_to(ROOT)), displayed or inline))
    return found


def test_katex_knows_every_command_of_a_formula() -> None:
    # Names are strings in its source. What it does not know, it would show in red.
    source = (DOCS / "assets" / "katex" / "katex.min.js").read_text(encoding="utf-8")
    known = {*re.findall(r'"\\\\([A-Za-z]+|[^A-Za-z])"', source), "\\"}
    found = formulas()
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


def test_every_example_has_a_page_a_card_and_a_picture() -> None:
    cards = (DOCS / "examples" / "index.md").read_text(encoding="utf-8")
    for script in sorted((ROOT / "examples").glob("*.*")):
        page = (DOCS / "examples" / f"{script.stem}.md").read_text(encoding="utf-8")
        picture = f"../images/examples/{script.stem}.png"
        if script.suffix == ".ipynb":
            assert f"<!-- notebook: examples/{script.name} -->" in page, script
        else:
            assert f'--8<-- "examples/{script.name}"' in page, script
            assert picture in page, script
        assert re.search(rf"{re.escape(picture)}\)[^]]*\]\({script.stem}.md\)", cards), script


def test_every_public_name_is_in_the_reference() -> None:
    pages = "\n".join(
        page.read_text(encoding="utf-8") for page in (DOCS / "reference").glob("*.md")
    )
    shown = set(re.findall(r"^::: (\S+)$", pages, re.MULTILINE))
    rooms = (bilevel, bilevel.methods)
    names = {f"{room.__name__}.{name}" for room in rooms for name in room.__all__}
    assert names <= shown, names - shown

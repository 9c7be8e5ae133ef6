"""Nothing we show is unexecuted: every example, and every Python block of the documents, runs."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
TIMEOUT = 600  # seconds; an example takes a few

# A fenced block ```python ... ```, indented or not. `<!-- not run: reason -->` on the line before
# leaves one out.
BLOCK = re.compile(
    r"(?P<skip><!-- not run: [^\n]+ -->\n+)?"
    r"^(?P<indent>[ ]*)```(?:python|py)\b(?P<info>[^\n]*)\n(?P<code>.*?)^(?P=indent)```[ ]*$",
    re.DOTALL | re.MULTILINE,
)


def run(script: Path, *arguments: str, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, str(script), *arguments],
        cwd=cwd,
        env=os.environ | {"MPLBACKEND": "Agg", "PYTHONUNBUFFERED": "1"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert done.returncode == 0, f"{script.name}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def blocks(document: Path) -> list[tuple[int, str]]:
    """Line number and code of the blocks to run."""
    text = document.read_text(encoding="utf-8")
    found = []
    for match in BLOCK.finditer(text):
        indent = len(match["indent"])
        code = "".join(line[indent:] or "\n" for line in match["code"].splitlines(keepends=True))
        if match["skip"] is None:
            found.append((text.count("\n", 0, match.start("code")) + 1, code))
    return found


def program(document: Path) -> str:
    """The blocks as one script, in which a traceback shows the line numbers of the document."""
    lines: list[str] = []
    for first_line, code in blocks(document):
        lines += [""] * (first_line - 1 - len(lines)) + code.splitlines()
    return "\n".join(lines) + "\n"


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("script", EXAMPLES, ids=name)
def test_example_runs_and_says_what_it_found(script: Path, tmp_path: Path) -> None:
    closing_line = run(script, "--small", cwd=tmp_path).rstrip().rpartition("\n")[2]
    assert re.search(r"\d|\w\.\w", closing_line), f"ends in no number or file: {closing_line!r}"


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if blocks(d)], ids=name)
def test_document_runs_from_top_to_bottom(document: Path, tmp_path: Path) -> None:
    script = tmp_path / (document.stem + ".py")
    script.write_text(program(document), encoding="utf-8")
    run(script, cwd=tmp_path)

"""Nothing we show is unexecuted: every example, and every Python block of the documents, runs."""

import ast
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
NOTEBOOKS = {  # what the tests give the cell that is tagged "parameters"
    "train_an_eblvm": {"num_steps": 3, "width": 4},
    "tune_a_regulariser": {"num_steps": 2, "num_directions": 1},
}
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


# ---------------------------------------------------------------------- notebooks


def cells(notebook: str) -> list[dict[str, Any]]:
    """The cells of code of a notebook."""
    text = (ROOT / "examples" / f"{notebook}.ipynb").read_text(encoding="utf-8")
    return [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]


def execute(source: str, label: str, names: dict[str, Any]) -> Any:
    """Run a cell and return the value of its last line, if that is an expression."""
    tree = ast.parse(source, label)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, label, "exec"), names)
    return eval(compile(ast.Expression(last.value), label, "eval"), names) if last else None


def test_every_notebook_has_a_small_size() -> None:
    assert {path.stem for path in (ROOT / "examples").glob("*.ipynb")} == NOTEBOOKS.keys()


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_a_notebook_runs_from_top_to_bottom(
    notebook: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without Jupyter: what a cell ends in is asked for its text and its HTML."""
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    names: dict[str, Any] = {"__name__": "__main__"}
    found = 0
    for number, cell in enumerate(cells(notebook), start=1):
        value = execute("".join(cell["source"]), f"{notebook}, cell {number}", names)
        if "parameters" in cell["metadata"].get("tags", []):
            assert names.keys() >= NOTEBOOKS[notebook].keys()
            names |= NOTEBOOKS[notebook]
            found += 1
        assert repr(value)
        if (html := getattr(value, "_repr_html_", None)) is not None:
            html()
    names["plt"].close("all")
    assert found == 1


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_a_notebook_holds_the_outputs_of_one_run(notebook: str) -> None:
    code = cells(notebook)
    assert [cell["execution_count"] for cell in code] == [*range(1, len(code) + 1)]
    outputs = [output for cell in code for output in cell["outputs"]]
    kinds = {kind for output in outputs for kind in output.get("data", {})}
    assert {"text/html", "image/png"} <= kinds
    assert not [output for output in outputs if output["output_type"] == "error"]
    words = json.dumps(
        [{**o.get("data", {}), "image/png": "", "text": o.get("text")} for o in outputs]
    )
    assert not re.search(r"(?<![<\w])/(?:home|root|tmp|work|Users|usr|var|opt)/|[A-Z]:\\", words)
    assert (ROOT / "examples" / f"{notebook}.ipynb").stat().st_size < 300_000

"""The command that runs, lists and reports suites."""

import json
from pathlib import Path

import pytest

from bilevel import cli
from bilevel.cli import main
from tests.methods.suite.small_suite import BLOCK

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps({"name": "tiny", "blocks": [BLOCK]}))
    return path


def test_the_command_runs_lists_and_reports(file: Path, capsys: Capture) -> None:
    bench = ["bench", "eblvm", "--config", str(file)]
    assert main([*bench, "--only", "dsm"]) == 0
    out = capsys.readouterr().out
    assert str(file) in out
    assert "[1/1] checkerboard/GaussianRBM-2/dsm/seed0" in out
    assert "(exact)" in out
    assert "report: runs/eblvm-tiny/report.html" in out
    assert main([*bench, "--list"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert len(listed) == 2
    assert "nats" in listed[0]
    assert listed[1].endswith("to do")
    assert main(["report", "runs/eblvm-tiny", "--out", "page.html"]) == 0
    assert "dsm" in Path("page.html").read_text()
    cell = "runs/eblvm-tiny/cells/checkerboard/GaussianRBM-2/dsm/seed0"
    assert main(["report", cell, "runs/eblvm-tiny", "--out", "both.html"]) == 0
    assert "ScoreMatching" in Path("both.html").read_text()  # of the run; a suite is left out
    capsys.readouterr()
    assert main([*bench, "--show", "--seeds", "3", "4"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["blocks"][0]["seeds"] == [3, 4]
    assert shown["blocks"][0]["methods"][0]["method"] == "ScoreMatching"
    assert main(["bench", "eblvm", "--preset", "full", "--list", "--only", "digits", "advil"]) == 0
    assert "digits/RBM-15/advil/seed2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ebvlm"], "did you mean `eblvm`"),
        (["eblvm", "--preset", "smal"], "did you mean `small`"),
        (["eblvm", "--only", "bsm-dsm"], "did you mean `bism-dsm`"),
        (["eblvm", "--config", "none.json"], "none.json"),
        (["eblvm", "--preset", "small", "--config", "tiny.json"], "choose one"),
        (["eblvm", "--seeds", "-1"], "not negative"),
    ],
)
def test_bad_arguments_are_one_helpful_sentence(
    arguments: list[str], message: str, file: Path, capsys: Capture
) -> None:
    assert main(["bench", *arguments]) == cli.BAD_USAGE
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1

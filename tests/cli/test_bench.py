"""The command that runs, lists and reports suites."""

import json
from pathlib import Path

import pytest
import torch

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


MOONS = ["eblvm", "--data", "moons", "--models", "GaussianRBM-2", "--methods", "dsm"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ebvlm"], "did you mean `eblvm`"),
        (["eblvm", "--preset", "smal"], "did you mean `small`"),
        (["eblvm", "--only", "bsm-dsm"], "did you mean `bism-dsm`"),
        (["eblvm", "--config", "none.json"], "none.json"),
        (["eblvm", "--preset", "small", "--config", "tiny.json"], "choose one"),
        (["eblvm", "--seeds", "-1"], "not negative"),
        (["eblvm", "--data", "moons", "--methods", "ml"], "add `--models`"),
        (["eblvm", "--num-steps", "3"], "`--num-steps` belongs to `--data`"),
        (["eblvm", "--config", "tiny.json", "--data", "moons"], "choose one"),
        (["eblvm", "--jobs", "0"], "`--jobs` must be positive"),
        (["eblvm", "--standardised"], "beside the `source`"),
        ([*MOONS, "--standardised"], "is for tables of your own; `moons` is none"),
        (["--jobs", "2", "solvers"], "the name of the suite comes first"),
        (["eblvm", "--data", "a/t.csv", *MOONS[3:]], "`a/t.csv`; check the path. Put it there"),
    ],
)
def test_bad_arguments_are_one_helpful_sentence(
    arguments: list[str], message: str, file: Path, capsys: Capture
) -> None:
    assert main(["bench", *arguments]) == cli.BAD_USAGE
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


HERE = "tests.methods.suite.own_things"


def test_a_comparison_is_written_on_the_command_line(tmp_path: Path, capsys: Capture) -> None:
    """Rows from a CSV file, a machine and a method by their addresses, beside what is known by name."""
    rows = torch.randn(60, 2, generator=torch.Generator().manual_seed(0)).tolist()
    table = tmp_path / "mine.csv"
    table.write_text("a,b\n" + "".join(f"{a},{b}\n" for a, b in rows))
    parts = ["--data", str(table), "--models", f"{HERE}:four"]
    methods = ["--methods", "ml", f"{HERE}:Denoiser", "--num-steps", "3", "--batch-size", "20"]
    folder = tmp_path / "out"
    bench = ["bench", "eblvm", *parts, *methods, "--out", str(folder)]
    assert main([*bench, "--standardised"]) == 0
    out = capsys.readouterr().out
    assert "[2/2] mine/four/Denoiser/seed0" in out
    shown = json.loads((folder / "suite.json").read_text())["blocks"][0]
    assert shown["methods"][1]["method"] == f"{HERE}:Denoiser"
    assert shown["training"] == {"num_steps": 3, "batch_size": 20}
    assert shown["data"][0]["options"] == {"standardised": True}


def test_tables_of_one_name_are_told_apart_by_their_paths(file: Path, capsys: Capture) -> None:
    tables = ["a/t.csv", "../b/t.csv", "moons"]
    bench = ["bench", "eblvm", "--data", *tables, *MOONS[3:], "--standardised", "--show"]
    assert main(bench) == 0
    data = json.loads(capsys.readouterr().out)["blocks"][0]["data"]
    assert [(each["name"], each["options"]) for each in data] == [
        ("a-t.csv", {"standardised": True}),
        ("b-t.csv", {"standardised": True}),
        ("moons", {}),
    ]


def test_a_file_that_names_code_does_not_run_it(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless the command line allows its module."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "was_run.py").write_text("raise RuntimeError('it was run')\n")
    content = {"name": "tiny", "blocks": [{**BLOCK, "methods": ["was_run:Method"]}]}
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(content))
    bench = ["bench", "eblvm", "--config", str(path), "--out", str(tmp_path / "out")]
    assert main(bench) == cli.BAD_USAGE
    assert "add `--code was_run`" in capsys.readouterr().err
    assert main([*bench, "--code", "was"]) == cli.BAD_USAGE
    assert "add `--code was_run`" in capsys.readouterr().err
    assert main([*bench, "--code", "was_run"]) == cli.BAD_USAGE
    assert "importing `was_run` raised RuntimeError: it was run" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

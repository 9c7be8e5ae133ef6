"""Whole trainings by each solver, from the command line."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bilevel import Cholesky, Implicit, Problem, Response, Solver
from bilevel.cli import main

Capture = pytest.CaptureFixture[str]


class Broken(Solver):
    """Fails when it is asked."""

    def respond(self, oracles: Any, state: Any, lower_optimizer: Any) -> Response:
        raise RuntimeError("no licence")


exact = Implicit(Cholesky())
broken = Broken()


def one() -> Problem:
    """The lower solution is reached in a step, the upper one in two."""
    start = {"x": torch.ones(1).double()}, {"y": torch.zeros(1).double()}
    return Problem.from_functions(
        lambda x, y, _: (y["y"] - 3).square().sum(),
        lambda x, y, _: (y["y"] - x["x"]).square().sum(),
        *start,
    )


def unsolvable() -> Problem:
    """The lower loss has no minimum."""
    start = {"x": torch.ones(1).double()}, {"y": torch.zeros(1).double()}
    return Problem.from_functions(
        lambda x, y, _: y["y"].square().sum(), lambda x, y, _: (x["x"] * y["y"]).sum(), *start
    )


def test_trainings_are_recorded_drawn_and_not_repeated(tmp_path: Path, capsys: Capture) -> None:
    here = [f"{__name__}:{name}" for name in ("one", "exact", "broken")]
    words = ["bench", "solvers", "--train", "0.03", "--out", str(tmp_path), "--problems", here[0]]
    assert main([*words, "--solvers", "alternating", here[1]]) == 0
    out = capsys.readouterr().out
    assert "one\nsolver" in out
    assert "alternating: the upper loss does not depend on `x`" in out
    file = tmp_path / "curves.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()]
    ends = [record for record in records if "end" in record]
    assert [(r["solver"], r["attempt"]) for r in ends] == [
        (solver, attempt) for solver in ("alternating", "exact") for attempt in (0, 1)
    ]
    solved = ends[2]
    assert solved["end"] == "solved"
    assert solved["kinds"]["hessian_products"] == solved["step"]
    assert solved["calls"] == 14 * solved["step"]  # 10 lower steps, 2 gradients, 2 products
    assert solved["value"] == pytest.approx(0, abs=1e-12)
    assert solved["least"] == pytest.approx(0, abs=1e-12)
    assert (tmp_path / "one.png").stat().st_size > 10_000
    assert main(["report", str(tmp_path)]) == 2
    assert f"its report is `{tmp_path / 'curves.md'}`" in capsys.readouterr().err
    before = file.read_bytes()
    assert main([*words, "--solvers", here[1], here[2]]) == 0
    out = capsys.readouterr().out
    assert "broken: no licence" in out
    assert "no step" in out
    assert file.read_bytes().startswith(before)
    added = file.read_bytes()[len(before) :].decode().splitlines()
    assert [json.loads(line)["solver"] for line in added] == ["broken", "broken"]
    assert "| exact |" in (tmp_path / "curves.md").read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--train 0", "`--train` takes a positive number of seconds, got 0"),
        ("--train --problems {here}:unsolvable", "`unsolvable`: no step sizes are known"),
        ("--problems quadratic:0", "`quadratic:0`: size and condition must be at least 1"),
    ],
)
def test_what_cannot_be_trained_is_one_sentence(
    words: str, said: str, tmp_path: Path, capsys: Capture
) -> None:
    words = words.format(here=__name__)
    assert main(["bench", "solvers", *words.split(), "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1

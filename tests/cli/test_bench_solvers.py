"""Solvers on problems whose hypergradient is known, from the command line."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bilevel import (
    Cholesky,
    ConjugateGradient,
    Implicit,
    Problem,
    Response,
    Solver,
    Unrolled,
    compare,
)
from bilevel.check.cases import CASES
from bilevel.cli import main

Capture = pytest.CaptureFixture[str]


class Dropped(Solver):
    """What a person writes to see: the response is left out."""

    def respond(self, oracles: Any, state: Any, lower_optimizer: Any) -> Response:
        return Response(oracles.lower, None)


class Broken(Solver):
    """Fails when it is asked."""

    def respond(self, oracles: Any, state: Any, lower_optimizer: Any) -> Response:
        raise RuntimeError("no licence")


exact = Implicit(Cholesky())
short = Implicit(ConjugateGradient(1, rtol=1e-12))
broken_at_work = Broken()


def broken() -> Solver:
    raise RuntimeError("no licence")


def cubes() -> Problem:
    """From two functions, without a seed or batches."""

    def lower_loss(x: Any, y: Any, batch: Any) -> Tensor:
        return (y["y"] - x["x"].sin()).cosh().sum()

    start = torch.linspace(0.2, 1, 3, dtype=torch.float64)
    return Problem.from_functions(
        lambda x, y, batch: y["y"].pow(3).sum(), lower_loss, {"x": start}, {"y": start.clone()}
    )


def test_the_error_is_that_of_the_closed_form() -> None:
    """Ten unrolled steps from the solution leave out (I - 0.1 H)^10 of the response."""
    case = CASES["quadratic"](0)
    H, B, t = (case.problem.get_buffer(name) for name in "HBt")
    y = torch.linalg.solve(H, B @ case.problem.get_parameter("upper.x")).detach()
    pull = 2 * (y - t)
    left = torch.linalg.matrix_power(torch.eye(20, dtype=H.dtype) - 0.1 * H, 10)
    whole, lost = (B.mT @ torch.linalg.solve(H, v) for v in (pull, left @ pull))
    sgd = case.ready().lower_optimizer
    ten, right = compare(case.problem, [Unrolled(10), exact], lower_optimizer=sgd, repeats=1).rows
    assert ten.relative_error == pytest.approx(float(lost.norm() / whole.norm()), rel=1e-6)
    assert ten.products == 10
    assert right.relative_error is not None
    assert right.relative_error < 1e-9


def test_problems_and_solvers_of_ones_own_stand_beside_the_known(
    tmp_path: Path, capsys: Capture
) -> None:
    names = [f"{__name__}:{name}" for name in ("Dropped", "exact")]
    parts = ["--problems", f"{__name__}:cubes", "--solvers", "alternating", *names]
    assert main(["bench", "solvers", *parts, "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("cubes\nsolver")
    lines = (tmp_path / "records.jsonl").read_text().splitlines()
    plain, dropped, right = map(json.loads, lines)
    assert [r["solver"] for r in (plain, dropped, right)] == ["alternating", "Dropped", "exact"]
    assert dropped["relative_error"] == plain["relative_error"] == pytest.approx(1)
    assert right["relative_error"] < 1e-8
    assert right["method"] == repr(exact)
    assert "| exact |" in (tmp_path / "tables.md").read_text()
    assert main(["report", str(tmp_path)]) == 2
    assert f"its report is `{tmp_path / 'tables.md'}`" in capsys.readouterr().err


def test_a_solver_that_gives_no_answer_says_why(tmp_path: Path, capsys: Capture) -> None:
    """`broken_at_work` fails when it is asked; one product is too few for conjugate gradients."""
    names = [f"{__name__}:{name}" for name in ("broken_at_work", "short", "exact")]
    parts = ["--problems", "quadratic", "--solvers", *names, "--out", str(tmp_path)]
    assert main(["bench", "solvers", *parts]) == 0
    out = capsys.readouterr().out
    assert "broken_at_work gave no answer: no licence" in out
    assert "short gave no answer: the linear solver ended without reaching its tolerance" in out
    lines = (tmp_path / "records.jsonl").read_text().splitlines()
    failed, short, right = map(json.loads, lines)
    assert failed["relative_error"] is failed["milliseconds"] is short["cosine"] is None
    assert right["relative_error"] < 1e-8
    assert "| short | no answer |" in (tmp_path / "tables.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--solvers choleski", "there is no solver `choleski`; did you mean `cholesky`?"),
        ("--solvers x", "`neumann-20`, `identity`. One of your own is `package.module:Name`"),
        ("--problems quadratics", "there is no problem `quadratics`; did you mean `quadratic`?"),
        ("--solvers {here}:broken", ":broken` raised RuntimeError: no licence"),
        (
            "--solvers {here}:json",
            "is a `module`, and something else is needed: a subclass of `Sol",
        ),
        ("--problems {here}:exact", "`problem` must be a `Problem`, got a `Implicit`"),
        ("--problems {here}:json", "`problem` must be a `Problem`, got a `module`"),
        ("--problems {here}:Dropped", "`problem` must be a `Problem`, got the class `Dropped`"),
        ("--jobs 2", "solvers are timed, so one runs at a time"),
        ("--methods ml", "`--methods` is for `bilevel bench eblvm`"),
    ],
)
def test_what_is_no_solver_or_problem_is_one_sentence(
    arguments: str, message: str, tmp_path: Path, capsys: Capture
) -> None:
    words = arguments.format(here=__name__).split()
    assert main(["bench", "solvers", *words, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert main(["bench", "eblvm", "--solvers", "cholesky"]) == 2
    assert "`--solvers` is for `bilevel bench solvers`" in capsys.readouterr().err


def test_records_say_which_derivatives_were_taken(tmp_path: Path) -> None:
    names = ["cholesky", f"{__name__}:broken_at_work"]
    parts = ["--problems", "ridge", "--solvers", *names, "--out", str(tmp_path)]
    assert main(["bench", "solvers", *parts]) == 0
    known, failed = map(json.loads, (tmp_path / "records.jsonl").read_text().splitlines())
    assert known["calls"]["hessian_products"] == known["products"] == 10
    assert failed["calls"] is None

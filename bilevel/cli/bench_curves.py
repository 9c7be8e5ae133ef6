"""`bilevel bench solvers --train`: whole trainings by each solver, on problems that know their truth."""

import json
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bilevel import Solver
from bilevel.cards import as_plain
from bilevel.check.cases import Case
from bilevel.check.curve_pages import NOTES, Record, draw_trainings, sentences_of, training_table
from bilevel.check.curves import CurveJudge, TrainingCurve, factors, train_curve
from bilevel.cli.options import UsageError
from bilevel.files import append_text, read_text, write_text

RECORDS = "curves.jsonl"
Key = tuple[str, str, str, int, int, float]


def run_curves(
    cases: Mapping[tuple[str, int], Case],
    solvers: Mapping[str, Solver],
    seconds: float,
    folder: Path,
) -> None:
    """Train with every solver on every problem, print and write what came out.

    Trainings that the folder's records hold already are not repeated.

    Args:
        cases: by the problem's name and the seed.
        solvers: by name.
        seconds: of each training.
        folder: where to write.

    Raises:
        UsageError: if nothing says the learning rates on a problem, or the records are damaged.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / RECORDS
    records = _read(path)
    for problem in dict.fromkeys(name for name, _ in cases):
        for (name, seed), case in cases.items():
            if name == problem:
                for run in _missing(records, case, solvers, (name, seed, seconds)):
                    append_text(path, "".join(json.dumps(record) + "\n" for record in run))
                    records += run
        shown = [r for r in records if r["problem"] == problem and _asked(r, solvers, seconds)]
        head, lines = training_table(shown, problem)
        print(f"{problem}\n{as_plain(head, lines)}\n", flush=True)
        for sentence in sentences_of(shown, problem):
            print(f"{sentence}\n")
    print(NOTES)
    _write(folder, [r for r in records if _asked(r, solvers, seconds)])


def _asked(record: Record, solvers: Mapping[str, Solver], seconds: float) -> bool:
    method = solvers.get(record["solver"])
    return method is not None and record["method"] == repr(method) and record["budget"] == seconds


def _missing(
    records: Sequence[Record],
    case: Case,
    solvers: Mapping[str, Solver],
    of: tuple[str, int, float],
) -> Iterator[list[Record]]:
    """The records of the trainings that are not there yet, one training after another."""
    problem, seed, seconds = of
    done = {_key(record) for record in records}
    wanted: list[tuple[str, Solver, int]] = [
        (name, solver, attempt)
        for name, solver in solvers.items()
        for attempt in range(len(factors(solver)))
        if (problem, name, repr(solver), seed, attempt, seconds) not in done
    ]
    if not wanted:
        return
    try:
        judge = CurveJudge(case)
    except ValueError as error:
        raise UsageError(f"`{problem}`: {error}") from None
    for name, solver, attempt in wanted:
        curve = train_curve(judge, solver, judge.tried(solver)[attempt], seconds)
        about = {"problem": problem, "solver": name, "method": repr(solver), "seed": seed}
        about |= {"attempt": attempt, "budget": seconds, "least": judge.least}
        yield _records(curve, about)


def _key(record: Record) -> Key:
    names = ("problem", "solver", "method", "seed", "attempt", "budget")
    problem, solver, method, seed, attempt, budget = (record[name] for name in names)
    return problem, solver, method, seed, attempt, budget


def _records(curve: TrainingCurve, about: Mapping[str, Any]) -> list[Record]:
    """A record for each point; the last says how the training ended, and where it was made."""
    upper, lower = curve.rates
    lines: list[dict[str, Any]] = [
        {**about, "upper_rate": upper, "lower_rate": lower, **asdict(point)}
        for point in curve.points
    ]
    lines[-1] |= {
        "end": curve.end,
        "remark": curve.remark,
        "kinds": asdict(curve.calls),
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "torch": torch.__version__,
    }
    return list(lines)


def _read(path: Path) -> list[Record]:
    if not path.exists():
        return []
    try:
        return [json.loads(line) for line in read_text(path).splitlines()]
    except ValueError:
        raise UsageError(
            f"`{path}` is damaged; move it away, or give another folder by `--out`"
        ) from None


def _write(folder: Path, records: Sequence[Record]) -> None:
    """Tables, and a figure for each problem where matplotlib is installed."""
    parts = []
    draw: Callable[..., Any] | None = draw_trainings
    for problem in dict.fromkeys(record["problem"] for record in records):
        head, lines = training_table(records, problem)
        rows = [list(head), ["---"] + ["---:"] * (len(head) - 1), *lines]
        drawn = "\n".join("| " + " | ".join(row) + " |" for row in rows)
        said = "".join(f"- {sentence}\n" for sentence in sentences_of(records, problem))
        parts.append(f"**{problem}**\n\n{drawn}\n\n" + (f"{said}\n" if said else ""))
        if draw is None:
            continue
        try:
            figure = draw(records, problem)
        except ImportError as error:
            print(f"no figures: {error}")
            draw = None
            continue
        name = "".join(c if c.isalnum() or c in "-_" else "_" for c in problem)
        figure.savefig(folder / f"{name}.png")
    write_text(folder / "curves.md", "".join(parts) + NOTES + "\n")
    print(f"tables: {folder / 'curves.md'}")

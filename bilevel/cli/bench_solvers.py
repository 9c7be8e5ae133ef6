"""`bilevel bench solvers`: hypergradients against the truth, and what they cost."""

import inspect
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn

from bilevel import Problem, Solver, compare
from bilevel.cards import as_plain
from bilevel.check.cases import CASES, MORE_CASES, Case, case_named
from bilevel.check.counting import counting
from bilevel.check.curve_solvers import TRAINED
from bilevel.cli.bench_curves import run_curves
from bilevel.cli.options import Parser, UsageError, integer, number
from bilevel.files import write_text
from bilevel.methods.catalogue import called, make_solver, of_own
from bilevel.plugins import entry_points, imported, is_address, plugged
from bilevel.problem import refuse_no_problem
from bilevel.refusals import nearest

_SOLVERS: Mapping[str, Mapping[str, Any]] = {
    "alternating": {"kind": "alternating"},
    "unrolled-5": {"kind": "unrolled", "num_steps": 5},
    "unrolled-20": {"kind": "unrolled", "num_steps": 20},
    "cholesky": {"kind": "implicit", "linear_solver": "cholesky"},
    "conjugate-gradient": {"kind": "implicit", "linear_solver": "conjugate_gradient"},
    "gmres": {"kind": "implicit", "linear_solver": "gmres"},
    "neumann-20": {
        "kind": "implicit",
        "linear_solver": "neumann",
        "num_steps": 20,
        "step_size": 0.1,
    },
    "identity": {"kind": "implicit", "linear_solver": "identity"},
}
_HEAD = ("solver", "relative error", "cosine", "ms per call", "products")
_EXACT = 1e-5  # a relative error that counts as right
_CALLS = 15  # of each solver, timed in turns
_SECONDS = 2.0  # of each training
Record: TypeAlias = dict[str, Any]
_NOTES = (
    "The error is that of the hypergradient at the lower level's solution, against finite differences, "
    "the largest over the seeds; * marks errors below 1e-5. Milliseconds of one call, and products of "
    "Hessians with vectors (or unrolled steps) in it: medians."
)


_SUMMARY = "compare solvers: how far their hypergradients are from the truth, and their cost"
_EXAMPLES = """  bilevel bench solvers
  bilevel bench solvers --problems quadratic ridge --solvers cholesky gmres
  bilevel bench solvers --solvers cholesky mine.solvers:Mine --seeds 0 1 2
  bilevel bench solvers --train --problems quadratic:100:1e3 breast-cancer
"""
_OF_EBLVM = (
    *("preset", "config", "data", "models", "methods", "only", "show", "num-steps", "batch-size"),
    *("standardised", "code", "device"),
)
_ELSEWHERE = {
    **{f"--{name}": f"`--{name}` is for `bilevel bench eblvm`" for name in _OF_EBLVM},
    "--jobs": "solvers are timed, so one runs at a time",
}


def _parser() -> Parser:
    parser = Parser("bench solvers", _SUMMARY, "[options]", _EXAMPLES)
    own = "or package.module:Name"
    more = [f"{name}{about}" for name, (about, _) in MORE_CASES.items()]
    parser.add_argument(
        "--problems",
        nargs="+",
        metavar="PROBLEM",
        help=f"{', '.join(CASES)} (default: all of these); {', '.join(more)}; {own}",
    )
    parser.add_argument(
        "--solvers",
        nargs="+",
        metavar="SOLVER",
        help=f"{', '.join(_SOLVERS)} (default: all of these, with `--train` all that follow, too); "
        f"{', '.join(TRAINED)}; {own}",
    )
    parser.add_argument(
        "--train",
        type=number,
        nargs="?",
        const=_SECONDS,
        metavar="SECONDS",
        help="train with each solver for so long at each of two to four learning rates, and go on "
        f"where the last call stopped (default: {_SECONDS:g})",
    )
    parser.add_argument(
        "--seeds", type=integer, nargs="+", metavar="N", help="of the problems (default: 0)"
    )
    parser.add_argument("--out", metavar="FOLDER", help="where to write (default: runs/solvers)")
    parser.add_argument("--list", action="store_true", help="list what would be measured")
    return parser


def run_solvers(arguments: list[str]) -> int:
    """Measure every solver on every problem, print and write what came out."""
    args = _parser().read(arguments, _ELSEWHERE)
    problems = getattr(args, "problems", list(CASES))
    usual = [*_SOLVERS, *(TRAINED if "train" in args else ())]
    solvers = {_short(name): _solver(name) for name in getattr(args, "solvers", usual)}
    seeds = getattr(args, "seeds", [0])
    cases = {(name, seed): _case(name, seed) for name in problems for seed in seeds}
    if "list" in args:
        print("\n".join(f"{_short(name)}/{solver}" for name in problems for solver in solvers))
        return 0
    folder = Path(getattr(args, "out", "runs/solvers"))
    if "train" in args:
        if not args.train > 0:
            raise UsageError(f"`--train` takes a positive number of seconds, got {args.train:g}")
        run_curves(
            {(_short(n), s): case for (n, s), case in cases.items()}, solvers, args.train, folder
        )
        return 0
    records: list[Record] = []
    for name in problems:
        for seed in seeds:
            records += _records(cases[name, seed], solvers, _short(name), seed)
        mine = [record for record in records if record["problem"] == _short(name)]
        print(f"{_short(name)}\n{as_plain(_HEAD, _lines(mine))}\n", flush=True)
        for failed in (record for record in mine if record["cosine"] is None):
            print(f"{failed['solver']} gave no answer: {failed['verdict']}\n")
    print(_NOTES)
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(record) + "\n" for record in records)
    write_text(folder / "records.jsonl", lines)
    write_text(folder / "tables.md", _markdown(records))
    print(f"tables: {folder / 'tables.md'}")
    return 0


def _short(name: str) -> str:
    if name.partition(":")[0] in MORE_CASES:
        return name
    return name.rpartition(":")[2] if is_address(name) else name


def _found(what: str, name: str, known: Iterable[str]) -> Any:
    """An object of one's own by its address or entry point."""
    if is_address(name):
        return imported(name)
    if name in entry_points(what):
        return plugged(what, name)
    hint = nearest(name, known)
    stop = "" if hint.endswith("?") else "."
    raise UsageError(
        f"there is no {what} `{name}`; {hint}{stop} One of your own is `package.module:Name`"
    )


def _solver(name: str) -> Solver:
    if name in _SOLVERS:
        return make_solver(_SOLVERS[name])
    if name in TRAINED:
        return TRAINED[name]
    base: Any = Solver
    solver: Solver = of_own(name, base, _found("solver", name, [*TRAINED, *_SOLVERS]), {})
    return solver


def _case(name: str, seed: int) -> Case:
    """A problem at a point, from a seed if it takes one.

    Raises:
        UsageError: if it is no problem.
    """
    try:
        known = case_named(name, seed)
    except ValueError as error:
        raise UsageError(str(error)) from None
    if known is not None:
        return known
    found = _found("problem", name, [*CASES, *MORE_CASES])
    if not isinstance(found, (nn.Module, tuple)):
        if not callable(found) or (inspect.isclass(found) and not issubclass(found, nn.Module)):
            found = (found,)
        else:
            found = called(name, found, {}, seed=seed)
    case = Case(*found) if isinstance(found, tuple) else Case(found)
    try:
        problem: Problem = case.problem
        refuse_no_problem(problem)
    except TypeError as error:
        raise UsageError(f"`{name}`: {error}") from None
    return case


def _records(case: Case, solvers: Mapping[str, Solver], problem: str, seed: int) -> list[Record]:
    """A record for each solver on a problem from a seed.

    An answer that its solver says is wrong is none.
    """
    case = case.ready()
    found = compare(
        case.problem,
        solvers,
        case.upper_batch,
        case.lower_batches,
        lower_optimizer=case.lower_optimizer,
        repeats=_CALLS,
    )
    calls = {name: _calls(case, solver) for name, solver in solvers.items()}
    return [
        {
            "problem": problem,
            "solver": row.name,
            "method": repr(row.solver),
            "seed": seed,
            "relative_error": None if row.reason else row.relative_error,
            "cosine": None if row.reason else row.cosine,
            "milliseconds": None if row.seconds is None else 1000 * row.seconds,
            "peak_bytes": row.peak_bytes,
            "products": row.products,
            "calls": calls[row.name],
            "verdict": row.reason or f"against {found.truth}",
        }
        for row in found.rows
    ]


def _calls(case: Case, solver: Solver) -> dict[str, int] | None:
    """The oracle calls of one call of a solver, by kind; `None` if it fails."""
    with counting(case.problem) as tally, torch.random.fork_rng([]):
        try:
            solver.hypergradient(
                case.problem,
                case.upper_batch,
                case.lower_batches,
                lower_optimizer=case.lower_optimizer,
                throw=False,
            )
        except Exception:  # of a solver of the user's: its row says why
            return None
    return asdict(tally.calls())


def _lines(records: Sequence[Record]) -> list[list[str]]:
    """The lines of a problem's table, a solver each, over the seeds."""
    rows: dict[str, list[Record]] = {}
    for record in records:
        rows.setdefault(record["solver"], []).append(record)
    return [[name, *_numbers(found)] for name, found in rows.items()]


def _numbers(found: Sequence[Record]) -> list[str]:
    if any(record["cosine"] is None for record in found):
        return ["no answer", "", "", ""]
    worst = max(record["relative_error"] for record in found)
    return [
        f"{worst:.1e}" + (" *" if worst < _EXACT else "  "),
        f"{min(record['cosine'] for record in found):.4f}",
        f"{statistics.median(record['milliseconds'] for record in found):.2f}",
        f"{statistics.median(record['products'] for record in found):.0f}",
    ]


def _markdown(records: Sequence[Record]) -> str:
    parts = []
    for problem in dict.fromkeys(record["problem"] for record in records):
        lines = _lines([record for record in records if record["problem"] == problem])
        rows = [list(_HEAD), ["---"] + ["---:"] * (len(_HEAD) - 1), *lines]
        drawn = "\n".join("| " + " | ".join(row) + " |" for row in rows)
        parts.append(f"**{problem}**\n\n{drawn}\n\n")
    return "".join(parts) + _NOTES + "\n"

"""`bilevel report`: one page about a run, about several side by side, or about a suite."""

import argparse
from pathlib import Path

from bilevel.cli import outcome
from bilevel.cli.options import Parser, UsageError
from bilevel.cli.progress import stages
from bilevel.cli.runs import existing
from bilevel.methods.report.comparison import write_comparison
from bilevel.methods.report.saved import saved_pictures, saved_results
from bilevel.methods.suite.folder import SuiteFolder
from bilevel.methods.suite.report import write_suite_report
from bilevel.methods.training.json_lines import note
from bilevel.reporting import Report

SUMMARY = "write a page about a run or a suite, or a comparison of several runs"
_EXAMPLES = """  bilevel report runs/demo-1
  bilevel report runs/* --out comparison.html
  bilevel report runs/eblvm-small                 a suite of `bilevel bench`
"""


def command(arguments: list[str]) -> int:
    """Read the arguments and write the page."""
    parser = Parser("report", SUMMARY, "RUN [RUN ...] [options]", _EXAMPLES)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs")
    parser.add_argument(
        "--out",
        metavar="FILE",
        help="the page (default: report.html in the run's folder, comparison.html beside the first)",
    )
    args = parser.read(arguments)
    with stages() as stage:
        page = _written(args, stage)
    print(page)
    return 0


def _written(args: argparse.Namespace, stage: Report) -> Path:
    """The page, written."""
    stage("drawing the pages", 0, 0)
    if len(args.runs) == 1 and SuiteFolder(args.runs[0]).exists:
        return write_suite_report(SuiteFolder(args.runs[0]), path=getattr(args, "out", None))
    if len(args.runs) == 1 and (tables := _of_solvers(args.runs[0])):
        raise UsageError(
            f"`{args.runs[0]}` holds what `bilevel bench solvers` measured; its report is `{tables[0]}`"
        )
    several = len(args.runs) > 1  # of runs/*, what is no run is left out
    folders = [
        name
        for name in args.runs
        if not several
        or (Path(name).is_dir() and not SuiteFolder(name).exists and not _of_solvers(name))
    ]
    runs = [existing(folder) for folder in folders]
    if not runs:
        raise UsageError("none of these is the folder of a run")
    for run in runs:
        if saved_results(run) is None:
            note(f"`{run.folder}` is not evaluated yet; `bilevel evaluate {run.folder}` does it")
        if not saved_pictures(run):
            outcome.draw(run, None, None, seed=0)
    if len(runs) > 1:
        beside = runs[0].folder.parent / "comparison.html"
        return write_comparison(runs, getattr(args, "out", beside))
    return outcome.report(runs[0], getattr(args, "out", None))


def _of_solvers(folder: str) -> list[Path]:
    """The tables that `bilevel bench solvers` wrote there, with `--train` or without."""
    there = [Path(folder) / name for name in ("tables.md", "curves.md")]
    return [] if SuiteFolder(folder).exists else [path for path in there if path.exists()]

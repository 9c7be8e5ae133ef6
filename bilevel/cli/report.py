"""`bilevel report`: one page about a run, or about several side by side."""

import shutil
from pathlib import Path

from bilevel.cli import outcome
from bilevel.cli.options import Parser, UsageError
from bilevel.cli.runs import existing
from bilevel.methods.report import saved_pictures, write_comparison

SUMMARY = "write a page about a run, or a comparison of several"
_EXAMPLES = """  bilevel report runs/demo-1
  bilevel report runs/* --out comparison.html
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
    folders = [name for name in args.runs if len(args.runs) == 1 or Path(name).is_dir()]
    runs = [existing(folder) for folder in folders]
    if not runs:
        raise UsageError("none of these is the folder of a run")
    for run in runs:
        if not saved_pictures(run):
            outcome.draw(run, None, None, seed=0)
    if len(runs) > 1:
        beside = runs[0].folder.parent / "comparison.html"
        print(write_comparison(runs, getattr(args, "out", beside)))
        return 0
    page = outcome.report(runs[0])
    if hasattr(args, "out"):
        target = Path(args.out)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(page, target)
        page = target
    print(page)
    return 0

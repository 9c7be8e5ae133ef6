"""`bilevel bench`: run a suite of methods, models and data, and report on it."""

import json
import sys
from pathlib import Path
from typing import Any

from bilevel.cli.options import Parser, UsageError, choice, integer
from bilevel.cli.running import device_of
from bilevel.cli.signals import named, status_of
from bilevel.methods.suite.config import SuiteConfig, load_config
from bilevel.methods.suite.folder import SuiteFolder
from bilevel.methods.suite.presets import SUITES
from bilevel.methods.suite.report import write_suite_report
from bilevel.methods.suite.runner import run_suite
from bilevel.methods.training.settings import nearest

SUMMARY = "compare methods on Boltzmann machines, judged alike"
_SUITES = ("eblvm",)
_EXAMPLES = """  bilevel bench eblvm                            about ten minutes
  bilevel bench eblvm --only digits advil cd1    some of its cells
  bilevel bench eblvm --preset full --list       all cells of the papers
  bilevel bench eblvm --show > mine.json         a configuration to change
  bilevel bench eblvm --config mine.json --out runs/mine

Running the same command again goes on where the last one stopped.
"""


def command(arguments: list[str]) -> int:
    """Read the arguments, run what is missing and write the report."""
    parser = Parser("bench", SUMMARY, "SUITE [options]", _EXAMPLES)
    _add_options(parser)
    args = parser.read(arguments)
    if args.suite not in _SUITES:
        raise UsageError(f"there is no suite `{args.suite}`; {nearest(args.suite, _SUITES)}")
    if "preset" in args and "config" in args:
        raise UsageError("`--preset` and `--config` both name a configuration; choose one")
    source = getattr(args, "config", None) or SUITES[getattr(args, "preset", "small")]
    config = load_config(source)
    if "seeds" in args:
        config = config.with_seeds(args.seeds)
    if "show" in args:
        print(json.dumps(config.model_dump(mode="json"), indent=2))
        return 0
    home = SuiteFolder(getattr(args, "out", Path("runs") / f"eblvm-{config.name}"))
    only = getattr(args, "only", [])
    if "list" in args:
        return _list(config, only, home)
    device = device_of(getattr(args, "device", "cpu"))
    print(f"configuration {source}\nwriting to {home.folder}", flush=True)
    try:
        run_suite(config, home.folder, only=only, device=device, observer=_show)
    except KeyboardInterrupt as stopped:
        status = status_of(stopped)
        what = named(status - 128)
        print(f"bilevel: {what}; the same command goes on from here", file=sys.stderr)
        return status
    print(f"report: {write_suite_report(home)}")
    return 0


def _add_options(parser: Parser) -> None:
    parser.add_argument("suite", metavar="SUITE", help=", ".join(_SUITES))
    presets = list(SUITES)
    parser.add_argument(
        "--preset",
        type=choice(presets),
        metavar="|".join(presets),
        help="a configuration that comes with the package (default: small)",
    )
    parser.add_argument("--config", metavar="FILE", help="a configuration of your own, JSON")
    parser.add_argument("--out", metavar="FOLDER", help="where to write (default: runs/eblvm-NAME)")
    parser.add_argument(
        "--seeds", type=integer, nargs="+", metavar="N", help="instead of the configuration's"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="NAME",
        help="cells of these data, models and methods; of a kind not named, all",
    )
    parser.add_argument(
        "--device",
        type=choice(["cpu", "cuda"]),
        metavar="cpu|cuda",
        help="(default: cpu, where models this small are fastest)",
    )
    parser.add_argument(
        "--list", action="store_true", help="list the cells and what became of them"
    )
    parser.add_argument("--show", action="store_true", help="print the configuration, spelled out")


def _list(config: SuiteConfig, only: list[str], home: SuiteFolder) -> int:
    done = {record["cell"]: record for record in home.records()}
    for cell in config.cells(only):
        print(f"{cell.name:<56}  {_state(done[cell.name]) if cell.name in done else 'to do'}")
    return 0


def _show(number: int, total: int, record: dict[str, Any]) -> None:
    print(f"[{number}/{total}] {record['cell']:<56}  {_state(record)}", flush=True)


def _state(record: dict[str, Any]) -> str:
    if record["status"] == "failed":
        return f"failed: {record['reason']}"
    test = record["test"]
    return f"{test['value']:9.3f} nats ({test['known']}), {record['seconds']:.0f} s"

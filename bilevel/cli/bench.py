"""`bilevel bench`: run a suite of methods, models and data, and report on it."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from bilevel.cards import as_plain
from bilevel.cli.bench_solvers import run_solvers
from bilevel.cli.options import Parser, UsageError, choice, integer
from bilevel.cli.own import add_code_option, own_of
from bilevel.cli.placing import add_device, device_of
from bilevel.cli.progress import stages
from bilevel.cli.signals import named, status_of
from bilevel.methods.data.tables import TABLES
from bilevel.methods.suite.config import DataConfig, SuiteConfig, load_config, parse_config
from bilevel.methods.suite.folder import SuiteFolder
from bilevel.methods.suite.presets import SUITES
from bilevel.methods.suite.ranking import rankings, rankings_plain
from bilevel.methods.suite.report import write_suite_report
from bilevel.methods.suite.runner import run_suite
from bilevel.methods.suite.tables import for_terminal, groups
from bilevel.methods.suite.workers import CrashError
from bilevel.refusals import nearest

SUMMARY = "compare methods on Boltzmann machines, or solvers, judged alike"
_SUITES = ("eblvm", "solvers")
_EXAMPLES = """  bilevel bench eblvm                            about ten minutes
  bilevel bench eblvm --only digits advil cd1    some of its cells
  bilevel bench eblvm --preset full --list       all cells of the papers
  bilevel bench eblvm --data mine.csv --models RBM-8 --methods ml mine.flow:Flow
  bilevel bench eblvm --show > mine.json         a configuration to change
  bilevel bench eblvm --config mine.json --out runs/mine --jobs 4
  bilevel bench solvers --solvers cholesky unrolled-5 mine.solvers:Mine

Running the same command again goes on where the last one stopped.
"""
_GRID = ("data", "models", "methods")
_TRAINING = ("num_steps", "batch_size")
_ELSEWHERE = {f"--{n}": f"`--{n}` is for `bilevel bench solvers`" for n in ("problems", "solvers")}


def command(arguments: list[str]) -> int:
    """Read the arguments, run what is missing and write the report."""
    if arguments[:1] == ["solvers"]:
        return run_solvers(arguments[1:])
    parser = Parser("bench", SUMMARY, "SUITE [options]", _EXAMPLES)
    _add_options(parser)
    args = parser.read(arguments, _ELSEWHERE)
    if args.suite not in _SUITES:
        raise UsageError(f"there is no suite `{args.suite}`; {nearest(args.suite, _SUITES)}")
    if args.suite == "solvers":
        raise UsageError("the name of the suite comes first: `bilevel bench solvers ...`")
    config, source = _configuration(args)
    if "seeds" in args:
        config = config.with_seeds(args.seeds)
    if "show" in args:
        print(json.dumps(config.model_dump(mode="json"), indent=2))
        return 0
    home = SuiteFolder(getattr(args, "out", Path("runs") / f"eblvm-{config.name}"))
    only = getattr(args, "only", [])
    if "list" in args:
        return _list(config, only, home)
    if args.jobs < 1:
        raise UsageError(f"`--jobs` must be positive, got {args.jobs}")
    device = device_of(getattr(args, "device", "cpu"))
    addresses = [name for part in _GRID for name in getattr(args, part, [])]
    own = own_of(config, addresses, args.code)
    config.cells(only)  # refuses what is not there before a word of writing
    print(f"configuration {source}\nwriting to {home.folder}", flush=True)
    how = {"only": only, "device": device, "observer": _show, "own": own, "jobs": args.jobs}
    return _run(config, home, own, how)


def _configuration(args: argparse.Namespace) -> tuple[SuiteConfig, str]:
    """The suite that the command line names or spells out, and where it is from."""
    sources = [name for name in ("preset", "config") if name in args]
    grid = {part: getattr(args, part) for part in _GRID if part in args}
    if len(sources) == 2:
        raise UsageError("`--preset` and `--config` both name a configuration; choose one")
    training = {name: getattr(args, name) for name in _TRAINING if name in args}
    if not grid:
        if "standardised" in args:
            raise UsageError(
                "`--standardised` belongs to `--data`, `--models` and `--methods`; in a configuration "
                'write `"options": {"standardised": true}` beside the `source`'
            )
        if training:
            flag = next(iter(training)).replace("_", "-")
            raise UsageError(f"`--{flag}` belongs to `--data`, `--models` and `--methods`")
        source = getattr(args, "config", None) or SUITES[getattr(args, "preset", "small")]
        return load_config(source), str(source)
    if sources:
        raise UsageError(
            f"`--{sources[0]}` is a configuration, and `--{next(iter(grid))}` is part of another one; "
            "choose one, or restrict the first by `--only`"
        )
    for part in _GRID:
        if part not in grid:
            raise UsageError(f"`--{next(iter(grid))}` is one part of a comparison; add `--{part}`")
    grid["data"] = _tables(grid["data"], "standardised" in args)
    block = {**grid, "training": training}
    return parse_config(
        {"name": "mine", "blocks": [block]}, "the command line"
    ), "of the command line"


def _tables(sources: list[str], standardised: bool) -> list[dict[str, Any]]:
    """The entries of data; those whose last parts are alike are named by their whole paths."""
    if standardised and not set(sources).difference(TABLES):
        raise UsageError(f"`--standardised` is for tables of your own; `{sources[0]}` is none")
    names = [DataConfig.model_validate(source).name for source in sources]
    entries: list[dict[str, Any]] = []
    for source, name in zip(sources, names, strict=True):
        entry: dict[str, Any] = {"source": source}
        if names.count(name) > 1:
            parts = [part for part in Path(source).parts if part not in ("/", "..")]
            entry["name"] = "-".join(parts).replace(":", "-")
        if standardised and source not in TABLES:
            entry["options"] = {"standardised": True}
        entries.append(entry)
    return entries


def _run(config: SuiteConfig, home: SuiteFolder, own: dict[str, Any], how: dict[str, Any]) -> int:
    """Train what is missing, then write the report of what there is."""
    status = 0
    try:
        with stages() as stage:
            run_suite(config, home.folder, **how, report=stage)
    except KeyboardInterrupt as stopped:
        status = status_of(stopped)
        what = named(status - 128)
        print(f"bilevel: {what}; the same command goes on from here", file=sys.stderr)
        return status
    except CrashError as error:
        print(f"bilevel: {error}", file=sys.stderr)
        status = 1
    if home.records():
        _print_tables(home)
        with stages() as stage:
            stage("drawing figures and writing the report", 0, 0)
            page = write_suite_report(home, own)
        print(f"report: {page}")
    return status


def _print_tables(home: SuiteFolder) -> None:
    """What was found, for a terminal: a star marks the best."""
    records = home.records()
    found = groups(records, [cell.name for cell in home.config().cells()])
    for group in found:
        print(f"\n{group.title} ({group.device})\n{as_plain(*for_terminal(group))}")
    ranked = rankings(records)
    print(rankings_plain(ranked) + ("\n" if ranked else ""))


def _add_options(parser: Parser) -> None:
    parser.add_argument(
        "suite",
        metavar="SUITE",
        help="eblvm, whose options these are, or solvers, see `bilevel bench solvers --help`",
    )
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
    add_device(parser, "cpu, where models this small are fastest")
    parser.add_argument(
        "--jobs", type=integer, metavar="N", default=1, help="cells trained at once (default: 1)"
    )
    parser.add_argument(
        "--list", action="store_true", help="list the cells and what became of them"
    )
    parser.add_argument("--show", action="store_true", help="print the configuration, spelled out")
    _add_parts(parser)


_PARTS = {
    "data": "names, .npz, .csv and .parquet files",
    "models": "such as RBM-15 or DBM-20-10",
    "methods": "short names such as ml, cd1, bism-dsm",
}


def _add_parts(parser: Parser) -> None:
    """What a comparison may be spelled out by, things of one's own among it."""
    group = parser.add_argument_group(
        "a comparison on the command line", "each of its parts may be package.module:Name"
    )
    for name, text in _PARTS.items():
        group.add_argument(f"--{name}", nargs="+", metavar=name.rstrip("s").upper(), help=text)
    group.add_argument(
        "--standardised",
        action="store_true",
        help="give columns of your tables mean 0 and deviation 1 on the training rows",
    )
    for name in _TRAINING:
        flag = "--" + name.replace("_", "-")
        group.add_argument(flag, dest=name, type=integer, metavar="N", help="of every training")
    add_code_option(group)


def _list(config: SuiteConfig, only: list[str], home: SuiteFolder) -> int:
    done = {record["cell"]: record for record in home.records()}
    for cell in config.cells(only):
        print(f"{cell.name:<56}  {_state(done[cell.name]) if cell.name in done else 'to do'}")
    return 0


def _show(number: int, total: int, record: dict[str, Any]) -> None:
    print(f"[{number}/{total}] {record['cell']:<56}  {_state(record)}", flush=True)


def _state(record: dict[str, Any]) -> str:
    if record["status"] != "finished":
        return f"{record['status']}: {record['reason']}"
    test = record["test"]
    return f"{test['value']:9.3f} nats ({test['known']}), {record['seconds']:.0f} s"

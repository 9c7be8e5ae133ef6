"""`run_suite`: train and judge every cell of a suite that is not finished yet."""

import contextlib
import json
import os
import platform
import warnings
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import asdict
from math import isfinite
from pathlib import Path
from typing import Any

import torch

from bilevel import CheckpointError, DivergenceError, HypergradientError, Step
from bilevel.devices import usable_device
from bilevel.files import write_text
from bilevel.methods.catalogue import NOTHING, Own
from bilevel.methods.data.tables import TABLES, Table
from bilevel.methods.suite.config import Cell, DataConfig, SuiteConfig
from bilevel.methods.suite.folder import SuiteFolder, finite
from bilevel.methods.suite.job import STANDARDISED, Job, make_job, make_table
from bilevel.methods.suite.judge import heldout_likelihood, independent
from bilevel.methods.suite.trace import Trace
from bilevel.methods.suite.workers import (
    CrashError,
    Outcome,
    RunCell,
    crash_of,
    in_processes,
)
from bilevel.methods.training.origin import commit, now, versions
from bilevel.methods.training.run import Run
from bilevel.methods.training.saved import read_into
from bilevel.methods.training.standardising import UnitsWarning, remark_units
from bilevel.refusals import whole
from bilevel.reporting import Report, silent, tracked

Callbacks = Sequence[Callable[[Step], object]]
Observer = Callable[[int, int, dict[str, Any]], object]


def run_suite(
    config: SuiteConfig,
    folder: str | os.PathLike[str],
    *,
    only: Iterable[str] = (),
    device: str = "cpu",
    callbacks: Callbacks = (),
    observer: Observer = lambda number, total, record: None,
    own: Own = NOTHING,
    jobs: int = 1,
    report: Report = silent,
) -> list[dict[str, Any]]:
    """Run what is missing. Whatever stops it, calling it again goes on.

    Every cell is built once before the first is trained, so a configuration that cannot work is refused
    at once. A cell that was stopped midway resumes from its last checkpoint, to the bit. A cell whose
    training fails (a loss becomes NaN) is recorded as failed, and the others are run. One that ends by
    an error of another kind is not recorded: `crash.txt` in its folder says where, the others are run,
    and the next call tries it again.

    Args:
        config: the suite.
        folder: where records and cells are, or will be.
        only: names of data, models and methods to restrict this run to.
        device: where to train, such as "cuda" or "cuda:1".
        callbacks: called with every `Step` of every training.
        observer: called with the number of the cell, the number of cells and the cell's record, after
            each; those that were finished before come first.
        own: methods, models, data and solvers that are not of this package, by the names they have in
            the configuration.
        jobs: how many cells are trained at once, each in a process of its own.
        report: told which cell it is at, in which stage and how far; with several `jobs`, how many cells
            have ended.

    Returns:
        The records of these cells, in order.

    Raises:
        ValueError: for a configuration that cannot work, or another one than the folder's.
        FileNotFoundError: if there is no such data file.
        CheckpointError: if a cell's checkpoint cannot be resumed from.
        CrashError: after all others were run, if some crashed.
    """
    if whole("jobs", jobs) > 1 and tuple(callbacks):
        raise ValueError("`callbacks` cannot be called in other processes; leave `jobs` out")
    device = str(usable_device(device))
    cells = config.cells(only)
    tables: dict[str, Table] = {}
    remarked: set[str] = set()
    for cell in tracked(cells, "checking every cell", report):  # refuse before the first step
        job = make_job(cell, _table(cell.data, tables, own), own)
        _refuse_few(job)
        if cell.data.name not in remarked:
            remarked.add(cell.data.name)
            advice = "scale the rows" if cell.data.source in TABLES else STANDARDISED
            remark_units(job.learner, job.table.train, advice=advice, caller=3)
    home = SuiteFolder(folder)
    home.claim(config)
    finished = {record["cell"]: record for record in home.records()}
    done = [finished[cell.name] for cell in cells if cell.name in finished]
    for number, record in enumerate(done, start=1):
        observer(number, len(cells), record)
    missing = [cell for cell in cells if cell.name not in finished]
    given: dict[str, Any] = {
        "folder": str(folder),
        "device": device,
        "own": dict(own),
        "jobs": jobs,
    }
    if jobs > 1:
        outcomes = in_processes(missing, jobs, cell_runner, given)
        told = _both(observer, report, f"cells, {jobs} at once")
        report(f"cells, {jobs} at once", len(done), len(cells))
    else:
        here = cell_runner(**given, tables=tables, callbacks=callbacks, report=report)
        outcomes, told = _one_by_one(missing, here), observer
    with contextlib.closing(outcomes), warnings.catch_warnings():
        warnings.simplefilter("ignore", UnitsWarning)  # said above, with what a suite can do
        crashes = _collect(outcomes, home, finished, told, len(done), len(cells))
    if crashes:
        raise _crashed(crashes, len(cells))
    return [finished[cell.name] for cell in cells]


def _both(observer: Observer, report: Report, what: str) -> Observer:
    """Both are told that a cell has ended."""

    def told(number: int, total: int, record: dict[str, Any]) -> None:
        observer(number, total, record)
        report(what, number, total)

    return told


def _refuse_few(job: Job) -> None:
    rows, batch = len(job.table.train), job.training.batch_size
    if batch > rows:
        raise ValueError(
            f"cell `{job.cell.name}`: `batch_size` is {batch}, but there are only {rows} rows to train "
            "on; give a smaller one in `training`"
        )


def _one_by_one(cells: Iterable[Cell], run: RunCell) -> Generator[tuple[Cell, Outcome], None, None]:
    for cell in cells:
        try:
            outcome = Outcome(run(cell))
        except (CheckpointError, OSError):
            raise
        except Exception as error:
            outcome = crash_of(error)
        yield cell, outcome


def _collect(
    outcomes: Iterable[tuple[Cell, Outcome]],
    home: SuiteFolder,
    finished: dict[str, dict[str, Any]],
    observer: Observer,
    before: int,
    total: int,
) -> dict[str, str]:
    """Write and tell the records as they come; return why the others crashed."""
    crashes: dict[str, str] = {}
    for number, (cell, outcome) in enumerate(outcomes, start=before + 1):
        report = home.cell_folder(cell) / "crash.txt"
        record = outcome.record
        if record is None:
            crashes[cell.name] = outcome.reason
            report.parent.mkdir(parents=True, exist_ok=True)
            write_text(report, outcome.trace or outcome.reason)
            record = {"cell": cell.name, "status": "crashed", "reason": outcome.reason}
        else:
            report.unlink(missing_ok=True)
            finished[cell.name] = record
            home.append(record)
        observer(number, total, record)
    return crashes


def _crashed(crashes: Mapping[str, str], total: int) -> CrashError:
    name, reason = next(iter(crashes.items()))
    return CrashError(
        f"{len(crashes)} of {total} cells crashed, the first `{name}`: {reason}; `crash.txt` in its "
        "folder says where, and the next run tries again"
    )


def cell_runner(
    folder: str,
    device: str,
    own: Own,
    jobs: int,
    tables: dict[str, Table] | None = None,
    callbacks: Callbacks = (),
    report: Report = silent,
) -> RunCell:
    """What trains and judges a cell; made once in every process.

    Args:
        folder: of the suite.
        device: where to train.
        own: what is not of this package.
        jobs: how many cells are trained at once, for the record.
        tables: data that are loaded already.
        callbacks: called with every `Step`.
        report: told which cell it is at, in which stage and how far.
    """
    known: dict[str, Table] = {} if tables is None else tables
    home = SuiteFolder(folder)
    if jobs > 1:  # in a process of its own, and the parent has said it
        warnings.simplefilter("ignore", UnitsWarning)

    def run(cell: Cell) -> dict[str, Any]:
        job = make_job(cell, _table(cell.data, known, own), own)
        record = run_cell(job, home.cell_folder(cell), device, callbacks, report)
        return record if jobs == 1 else {**record, "jobs": jobs}

    return run


def run_cell(
    job: Job,
    folder: Path,
    device: str = "cpu",
    callbacks: Callbacks = (),
    report: Report = silent,
) -> dict[str, Any]:
    """Train and judge one cell, from its last checkpoint if there is one.

    Args:
        job: the cell as objects; its learner is trained in place.
        folder: the cell's run folder.
        device: where to train.
        callbacks: called with every `Step`.
        report: told in which stage it is and how far.

    Returns:
        The record: plain values.
    """
    evaluation, training = job.cell.block.evaluation, job.training

    def stage(what: str, done: int, total: int) -> None:
        report(f"{job.cell.name}: {what}", done, total)

    job.learner.to(device)
    run = Run(folder)
    trace = Trace(
        folder / "trace.jsonl",
        job.training,
        evaluation.points,
        lambda: heldout_likelihood(job, evaluation, final=False, report=stage).value,
    )
    outcome: dict[str, Any] = {}
    resume = run.checkpoint_path.exists()
    try:
        if not resume:
            trace.begin()
        stage("preparing the first step" if training.compile else "first step", 0, 0)
        job.learner.fit(
            job.table.train,
            solver=job.solver,
            callbacks=[
                lambda step: stage("training", step.number, training.num_steps),
                *callbacks,
                trace,
            ],
            run=folder,
            resume=resume,
            overwrite=not resume,
            progress=False,
            # the trace ends the run: its clock does not start again when a run is resumed
            **{**training.model_dump(), "max_seconds": None},
        )
        test = heldout_likelihood(job, evaluation, final=True, report=stage)
        outcome = {"test": asdict(test)}
        if not isfinite(test.value):
            outcome["reason"] = f"the test log-likelihood is {test.value}"
    except CheckpointError as error:
        if not trace.started:
            raise  # one that cannot be resumed from says nothing about the method
        outcome = {"reason": str(error)}
    except (DivergenceError, HypergradientError) as error:
        outcome = {"reason": str(error)}
    status = "failed" if "reason" in outcome else "finished"
    record: dict[str, Any] = finite(
        {**_heading(job, device), "status": status, **outcome, **trace.summary()}
    )
    return record


def _heading(job: Job, device: str) -> dict[str, Any]:
    cell = job.cell
    density = job.table.density
    return {
        "cell": cell.name,
        "data": cell.data.model_dump(mode="json"),
        "model": cell.model.model_dump(mode="json"),
        "method": cell.method.model_dump(mode="json"),
        "seed": cell.seed,
        "solver": repr(job.solver),
        "training": job.training.model_dump(mode="json"),
        "time": now(),
        "commit": commit(),
        "versions": {name: versions()[name] for name in ("bilevel", "torch", "python")},
        "device": versions()["device"] if device != "cpu" else f"cpu ({platform.machine()})",
        "threads": torch.get_num_threads(),
        "independent": independent(job),
        "ceiling": None if density is None else -density.entropy,
    }


def _table(data: DataConfig, known: dict[str, Table], own: Own = NOTHING) -> Table:
    """The rows, loaded once."""
    key = json.dumps(data.model_dump(mode="json"), sort_keys=True)
    if key not in known:
        known[key] = make_table(data, own)
    return known[key]


def trained(cell: Cell, table: Table, folder: Path, own: Own = NOTHING) -> Job | None:
    """A cell with the model it ended with, `None` where that was not kept."""
    weights = Run(folder).model_path / "weights.safetensors"
    if not weights.exists():
        return None
    job = make_job(cell, table, own)
    read_into(job.learner, Run(folder).model_path)
    job.learner.eval()
    return job

"""What comes out of a run: numbers, pictures and the report, written and shown."""

import shutil
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path

import torch

from bilevel.methods import EBLVM, History
from bilevel.methods.data import Images
from bilevel.methods.evaluation import evaluate
from bilevel.methods.pictures import save_curves, save_grid, save_reconstructions
from bilevel.methods.report import (
    result_rows,
    save_results,
    saved_pictures,
    saved_results,
    write_report,
)
from bilevel.methods.run import Run

_SAMPLES, _PAIRS = 80, 24


def finish(run: Run, model: EBLVM, images: Images, seed: int, history: History) -> dict[str, float]:
    """Evaluate a trained model, draw its pictures and write its report."""
    results = evaluate(model, images, seed)
    if history.steps:
        speed = history.steps_per_second
        results |= {"seconds": history.seconds, "steps_per_second": speed}
    save_results(run, results, data=images.source, seed=seed, statistics=model.statistics)
    draw(run, model, images, seed)
    report(run)
    return results


def draw(run: Run, model: EBLVM | None, images: Images | None, seed: int) -> None:
    """The pictures there can be; a missing package is said once, and is no failure."""
    folder = run.folder
    try:
        if model is not None and images is not None:
            generator = torch.Generator(model.device).manual_seed(seed)
            save_grid(model.sample(_SAMPLES, generator), folder / "samples.png", columns=16)
            some = images.test[:_PAIRS]
            save_reconstructions(some, model.reconstruct(some), folder / "reconstructions.png")
        records = run.metrics()
        if records:
            save_curves(records, folder / "curves.png")
    except ImportError as error:
        print(f"some pictures are missing: {error}", file=sys.stderr)


def report(run: Run) -> Path:
    """The report of a run, from what lies in its folder."""
    return write_report(run, saved_results(run), saved_pictures(run))


def show(results: Mapping[str, float]) -> None:
    """Print the results as a table: in colour on a terminal, plain elsewhere."""
    rows = result_rows(results)
    label = max(len(row.label) for row in rows)
    value = max(len(row.value) for row in rows)
    beside = max(len(row.beside) for row in rows)
    indent = " " * 4
    width = min(100, shutil.get_terminal_size((100, 24)).columns)
    strong, soft, off = ("\033[1m", "\033[2m", "\033[0m") if sys.stdout.isatty() else ("", "", "")
    for row in rows:
        line = f"{row.label:<{label}}  {row.value:>{value}}{off}   {row.beside:<{beside}}"
        print(f"{strong}{line.rstrip()}")
        print(
            soft
            + textwrap.fill(row.meaning, width, initial_indent=indent, subsequent_indent=indent)
            + off
        )
    if "classifier_accuracy" in results:
        print(
            "Classes and features are those of a classifier of the real images "
            f"({results['classifier_accuracy']:.1%} right on held-out ones)."
        )

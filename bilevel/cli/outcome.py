"""What comes out of a run: numbers, pictures and the report, written and shown."""

import shutil
import sys
import textwrap
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from bilevel.methods import EBLVM, History
from bilevel.methods.data.images import Images, scaled
from bilevel.methods.evaluation.evaluate import evaluate
from bilevel.methods.evaluation.features import (
    FeatureNetwork,
    at_most,
    default_features,
    nearest_images,
)
from bilevel.methods.report.pictures import (
    save_curves,
    save_evaluations,
    save_grid,
    save_reconstructions,
)
from bilevel.methods.report.report import write_report
from bilevel.methods.report.saved import save_results, saved_pictures, saved_results
from bilevel.methods.training.measures import result_rows
from bilevel.methods.training.run import Run
from bilevel.reporting import Report, silent

_SAMPLES, _PAIRS = 80, 24


def finish(
    run: Run,
    model: EBLVM,
    images: Images,
    seed: int,
    history: History,
    features: FeatureNetwork | None = None,
    stage: Report = silent,
) -> dict[str, float]:
    """Evaluate a trained model, draw its pictures and write its report."""
    seen = default_features(images, stage) if features is None else features
    results = measured(model, images, seed, features=seen, report=stage)
    if history.steps:
        speed = history.steps_per_second
        results |= {"seconds": history.seconds, "steps_per_second": speed}
    how = {"data": images.source, "seed": seed, "statistics": model.statistics}
    save_results(run, results, **how, features=seen.label)
    draw(run, model, images, seed, stage=stage)
    stage("writing the report", 0, 0)
    report(run)
    return results


def measured(model: EBLVM, images: Images, seed: int, **options: Any) -> dict[str, float]:
    """`evaluate`, whose warnings are said on one line each."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        results = evaluate(model, images, seed, **options)
    for message in dict.fromkeys(str(warning.message) for warning in caught):
        print(f"note: {message}", file=sys.stderr)
    return results


def draw(
    run: Run,
    model: EBLVM | None,
    images: Images | None,
    seed: int,
    features: FeatureNetwork | None = None,
    stage: Report = silent,
) -> None:
    """The pictures there can be; a missing package is said once, and is no failure.

    Args:
        run: the folder to write to, and the records of the training.
        model: draws samples and reconstructs, as far as it can.
        images: real ones.
        seed: of the samples.
        features: with these, the training images nearest to samples are drawn too.
        stage: told how far it is.
    """
    try:
        if model is not None and images is not None:
            _draw_images(run.folder, model, images, seed, features, stage)
        stage("drawing curves", 0, 0)
        for records, name, save in (
            (run.metrics(), "curves", save_curves),
            (run.evaluations(), "evaluations", save_evaluations),
        ):
            if records:
                save(records, run.folder / f"{name}.png")
    except ImportError as error:
        print(f"some pictures are missing: {error}", file=sys.stderr)


def _draw_images(
    folder: Path,
    model: EBLVM,
    images: Images,
    seed: int,
    features: FeatureNetwork | None,
    stage: Report,
) -> None:
    stage("drawing pictures of samples and reconstructions", 0, 0)
    # a model refuses what it has no way to do
    with suppress(NotImplementedError):
        generator = torch.Generator(model.device).manual_seed(seed)
        samples = model.sample(_SAMPLES, generator).clamp(-1, 1)
        save_grid(samples, folder / "samples.png", columns=16)
        if features is not None:
            nearest = nearest_images(features, samples[:_PAIRS], images.train, stage)
            save_reconstructions(samples[:_PAIRS].cpu(), nearest, folder / "neighbours.png")
    with suppress(NotImplementedError):
        originals = at_most(images.test, _PAIRS)
        pairs = scaled(originals).cpu(), model.reconstruct(originals).cpu()
        save_reconstructions(*pairs, folder / "reconstructions.png")


def report(run: Run, path: str | None = None) -> Path:
    """The report of a run, from what lies in its folder; there, if `path` names no other file."""
    return write_report(run, saved_results(run), saved_pictures(run), path)


def print_results(results: Mapping[str, float], space: str | None = None) -> None:
    """Print the results as a table: in colour on a terminal, plain elsewhere.

    Args:
        results: what `evaluate` returned.
        space: the label of the feature network. With it, the details are printed too.
    """
    rows = [row for row in result_rows(results) if space is not None or not row.detail]
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
    if space is not None:
        print(f"Samples are judged by: {space}.")
    elif "classifier_accuracy" in results:
        print(
            "Classes and features are those of a classifier of the real images "
            f"({results['classifier_accuracy']:.1%} right on held-out ones)."
        )

"""A training on the command line: progress, Ctrl-C, and the summary at its end."""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, final

from bilevel import DivergenceError, Solver, Step
from bilevel.checkpoint import glance
from bilevel.choices import SAID, how_made
from bilevel.cli.loggers import loggers_of
from bilevel.cli.options import UsageError
from bilevel.cli.outcome import draw, finish, print_results
from bilevel.cli.progress import Progress, stages
from bilevel.cli.signals import Stop, named, status_of
from bilevel.distributed import is_main
from bilevel.methods import EBLVM, History, Training
from bilevel.methods.data.images import Images
from bilevel.methods.evaluation.evaluate import evaluate
from bilevel.methods.evaluation.features import FeatureNetwork, default_features
from bilevel.methods.training.run import Run
from bilevel.methods.training.settings import validated
from bilevel.methods.training.trainable import Evaluate

Closing: TypeAlias = Callable[[int], str]

LOOK = 2000  # samples of an evaluation during training, and images of each set it looks at


@final
@dataclass(frozen=True)
class Plan:
    """What is to be trained, and where it goes.

    Attributes:
        model: on its device.
        images: what it is trained on.
        run: the folder.
        settings: fields of `Training` that were chosen now.
        solver: how the hypergradient is computed.
        solver_options: the same as plain values.
        device: where.
        resume: continue the run in the folder.
        overwrite: replace it.
        features: what evaluations during training judge samples by, `default_features(images)` if not
            given.
        kept: settings that a run which is continued was begun with.
        log_to: names of loggers.
        command: what was typed.
    """

    model: EBLVM
    images: Images
    run: Run
    settings: dict[str, Any]
    solver: Solver
    solver_options: dict[str, Any] = field(default_factory=dict)
    device: str = "cpu"
    resume: bool = False
    overwrite: bool = False
    features: FeatureNetwork | None = None
    kept: dict[str, Any] = field(default_factory=dict)
    log_to: list[str] = field(default_factory=list)
    command: str | None = None

    @property
    def training(self) -> Training:
        """All settings of the training.

        Raises:
            ValueError: for one that cannot be.
        """
        return validated(Training, {**self.model.training_defaults, **self.kept, **self.settings})


def carry_out(plan: Plan, *, report: bool = True, closing: Closing | None = None) -> int:
    """Train, evaluate, report.

    Args:
        plan: what, where and how.
        report: whether to evaluate, draw and write the page.
        closing: the last words about a run that has a page, by its last step; by default where the page
            is and what else can be done.

    Returns:
        The exit status: 0, or 128 and the number of the signal that stopped it.

    Raises:
        DivergenceError: if training diverged.
        UsageError: if memory ran out, with the batch size that would fit.
    """
    training, folder = plan.training, plan.run.folder
    if plan.resume:
        print(f"continuing {folder}")
    taken = _steps_taken(plan.run) if plan.resume else 0
    if taken > training.num_steps:
        raise UsageError(
            f"`--num-steps` is {training.num_steps:,}, but `{folder}` has taken {taken:,} steps "
            "already; a run can only be made longer"
        )
    if plan.resume and taken == training.num_steps:
        print(f"all {training.num_steps:,} steps were taken before; only the report is made again")
    stop = Stop()
    try:
        done, history = _train(plan, training, stop, taken)
    except KeyboardInterrupt as stopped:
        return _interrupted(plan.run, status_of(stopped))
    except MemoryError as error:
        raise UsageError(str(error)) from error
    except DivergenceError:
        draw(plan.run, None, None, training.seed)  # the curves may tell why
        raise
    if stop.asked is not None and done < training.num_steps:
        return _interrupted(plan.run, 128 + stop.asked, done)
    if not report or not is_main():
        print(f"done: {folder}")
    else:
        with stages() as stage:
            _on_processor(plan.model)
            results = finish(plan.run, plan.model, plan.images, training.seed, history, stage=stage)
        print()
        print_results(results)
        print("\n" + (_pointers(folder) if closing is None else closing(done)))
    if done < training.num_steps and training.max_seconds is not None:
        print(
            f"the clock (`--max-seconds {training.max_seconds:g}`) stopped it at step {done:,} of "
            f"{training.num_steps:,}; `bilevel train --run {folder} --resume --max-seconds X` goes on"
        )
    return 0


def _pointers(folder: Path) -> str:
    """Where the page of a run is, and what else can be done."""
    return (
        f"report: {folder / 'report.html'}\n"
        f"more:   bilevel sample {folder} -n 100     bilevel report {folder.parent}/*"
    )


def _train(plan: Plan, training: Training, stop: Stop, first: int) -> tuple[int, History]:
    """The number of the last step, and the history."""
    images = plan.images
    progress = Progress(training, first)
    notes: dict[str, Any] = {
        "data": images.source,
        "data_options": images.options,
        "name": images.name,
        "note": images.note,
        "solver": plan.solver_options,
        "device": plan.device,
        "command": plan.command,
    }
    if plan.log_to:
        notes["log_to"] = plan.log_to
    loggers = loggers_of(plan.log_to, plan.run.folder)  # a missing package is refused first
    look = None
    if training.evaluate_every is not None:
        with stages() as stage:
            features = default_features(images, stage) if plan.features is None else plan.features
        look = _look(plan, features, progress)
        notes["evaluations"] = {"features": features.label, "samples": LOOK, "seed": training.seed}
    with progress, stop.listening():
        history = plan.model.fit(
            images.train,
            solver=plan.solver,
            callbacks=[_Opening(plan), progress, stop],
            run=plan.run.folder,
            resume=plan.resume,
            overwrite=plan.overwrite,
            notes=notes,
            evaluate=look,
            loggers=loggers,
            progress=False,  # the command's own is among the callbacks
            **plan.settings,
        )
    return progress.step, history


@final
class _Opening:
    """Says where a new run is written, once its first step shows that nothing was refused."""

    def __init__(self, plan: Plan) -> None:
        how = how_made(plan.training.compile, plan.model.device)
        said = "" if how is None else f"; {SAID[how]}"
        self._line = "" if plan.resume else f"writing to {plan.run.folder}{said}"

    def __call__(self, step: Step) -> None:
        if self._line:
            print(self._line, flush=True)
            self._line = ""


def _look(plan: Plan, features: FeatureNetwork, progress: Progress) -> Evaluate:
    """An evaluation during training: smaller than the one at its end, shown as it goes."""

    def look(model: EBLVM) -> dict[str, float]:
        began = time.monotonic()
        seed = plan.training.seed
        _on_processor(model)
        how: dict[str, Any] = {"features": features, "samples": LOOK, "report": progress.stage}
        results = evaluate(model, plan.images, seed, **how)
        progress.evaluated(results, time.monotonic() - began)
        return results

    return look


def _on_processor(model: EBLVM) -> None:
    """Take a model off Apple's GPU to measure it: exact sums are in float64, which that has not."""
    if model.device.type == "mps":
        model.cpu()


def _steps_taken(run: Run) -> int:
    """The step of the newest checkpoint, from which a run goes on."""
    return int(glance(run.checkpoint_path)["step"])


def _interrupted(run: Run, status: int, step: int | None = None) -> int:
    """Say what ended the training, at which step, and how to go on."""
    what = named(status - 128)
    if not run.checkpoint_path.exists():
        print(f"bilevel: {what}; nothing was saved yet", file=sys.stderr)
        return status
    if step is not None and is_main():
        run.stop(step, named(status - 128, by=True))
    taken = _steps_taken(run)
    steps = run.config()["training"]["num_steps"]
    where = f"at step {taken:,} of {steps:,}"
    if step is None:
        where = f"the newest checkpoint is that of step {taken:,} of {steps:,}"
    print(
        f"bilevel: {what}{' ' if step is not None else '; '}{where}; continue with "
        f"`bilevel train --run {run.folder} --resume`",
        file=sys.stderr,
    )
    return status

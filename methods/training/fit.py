r"""`fit`: train a model with `bilevel.train`, keep its history and its run folder.

With `ema` $= \beta$ the trained model has not the last weights $\theta_T$ but their moving average

$$ \bar\theta_t = \beta\,\bar\theta_{t-1} + (1 - \beta)\,\theta_t, \qquad \bar\theta_0 = \theta_0 . $$

Checkpoints hold both, so that a resumed run goes on from $\theta_t$.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from bilevel import DivergenceError, Solver, Step
from bilevel.choices import how_made
from bilevel.distributed import any_rank, is_main, world_size
from bilevel.loggers.base import Logger, check_loggers
from bilevel.methods.training.feed import Augment as Augment
from bilevel.methods.training.feed import Feed
from bilevel.methods.training.feed import feeding as feeding
from bilevel.methods.training.history import History as History
from bilevel.methods.training.history import record as record
from bilevel.methods.training.journal import Journal
from bilevel.methods.training.logged import Logged
from bilevel.methods.training.preconditions import check_start, refuse_changes, refuse_misfits
from bilevel.methods.training.run import Destination
from bilevel.methods.training.settings import Training
from bilevel.methods.training.steps import training_steps
from bilevel.methods.training.trainable import Evaluate as Evaluate
from bilevel.methods.training.trainable import Trainable
from bilevel.optimizers import Optimizers


def fit(
    model: Trainable,
    feed: Feed,
    *,
    destination: Destination,
    solver: Solver | None = None,
    optimizers: tuple[Optimizers, Optimizers] | None = None,
    callbacks: Iterable[Callable[[Step], object]] = (),
    evaluate: Evaluate | None = None,
    loggers: Iterable[Logger] = (),
) -> History:
    """Train `model` on what is fed to it; see `EBLVM.fit`.

    `evaluate` is called every `evaluate_every` steps with a copy of the model (of the moving
    average, if there is one) and returns numbers by name. Training does not notice: it is the same to
    the bit without. The best copy by `training.best` is kept in `run/best`.

    Returns:
        The history.

    Raises:
        ValueError: for settings that do not fit, before the first step.
        FileExistsError: if `run` already holds a run.
        DivergenceError: if a loss becomes NaN or infinite; the last good checkpoint is kept.
        MemoryError: if memory runs out, with the batch size that would fit.
    """
    refuse_misfits(optimizers, evaluate, destination.notes)
    solver = model.default_solver() if solver is None else solver
    told, training = check_loggers(loggers), feed.training
    check_start(training, destination, evaluated=evaluate is not None)
    folder, resume = destination.folder, destination.resume
    if folder is not None and is_main():
        folder.claim(resume=resume, overwrite=destination.overwrite)
        if resume:
            refuse_changes(folder, training)
    model.probe(feed.some[:2])
    steps = training_steps(
        model,
        feed.source,
        training,
        solver,
        optimizers if optimizers is not None else model.optimizers(training),
        epoch=feed.epoch,
        resume=folder.checkpoint_path if folder is not None and resume else None,
        check_every=1 if model.device.type == "cpu" else 20,  # on a GPU each look waits
    )
    configuration = _configuration(model, feed, solver, destination.notes)
    logged = Logged(told, training, feed.some)
    journal, called = Journal(model, training, folder, evaluate, logged), list(callbacks)
    ended = False
    try:
        logged.begin(configuration, destination.taken)
        if folder is not None and not resume and is_main():
            folder.begin(configuration)
        while not ended:
            with _advised(model, training, solver, tuple(feed.some.shape[1:])):
                step = next(steps, None)
            if step is None:
                break
            journal.open(step, resume=resume)
            stops = [callback(step) is True for callback in called]  # call every one
            ended = _ended(step, training, any(stops))
            journal.write(step, ended=ended)
    except DivergenceError as error:
        journal.diverged()
        if folder is not None and folder.checkpoint_path.exists():
            error.add_note(f"The last good checkpoint is `{folder.checkpoint_path}`")
        raise
    finally:
        logged.close()
    return replace(journal.close(), solver=solver)


def _configuration(
    model: Trainable,
    feed: Feed,
    solver: Solver,
    notes: dict[str, Any] | None,
) -> dict[str, Any]:
    """A run's configuration as plain values."""
    how = how_made(feed.training.compile, model.device)
    return {
        "method": type(model).__name__,
        "model": model.recipe,
        "training": feed.training.model_dump(mode="json"),
        "solver": repr(solver),
        "data": feed.about,
        "notes": notes or {},
        **({} if how is None else {"compiled": how}),  # what `compile=True` stands for there
    }


@contextmanager
def _advised(
    model: Trainable, training: Training, solver: Solver, shape: tuple[int, ...]
) -> Iterator[None]:
    """A step; where memory runs out in it, with advice."""
    try:
        yield
    except RuntimeError as error:
        # imported here: it takes a tenth of a second, and only an error needs it
        from bilevel.methods.training.footprint import advice, asked, available

        if asked(error) is None:
            raise
        there = available(model.device)
        raise MemoryError(advice(error, model, training, solver, shape, there)) from error


def _ended(step: Step, training: Training, stopped: bool) -> bool:
    """Whether this step is the last one; all ranks must say the same of the same step."""
    late = training.max_seconds is not None and step.seconds >= training.max_seconds
    wished = stopped or late
    if world_size() > 1:  # asking the others costs an exchange
        wished = step.number % training.log_every == 0 and any_rank(wished)
    return wished or step.number == training.num_steps

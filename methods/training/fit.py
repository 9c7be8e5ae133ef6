r"""`fit`: train a model with `bilevel.train`, keep its history and its run folder.

With `ema` $= \beta$ the trained model has not the last weights $\theta_T$ but their moving average

$$ \bar\theta_t = \beta\,\bar\theta_{t-1} + (1 - \beta)\,\theta_t, \qquad \bar\theta_0 = \theta_0 . $$

Checkpoints hold both, so that a resumed run goes on from $\theta_t$.
"""

import contextlib
import copy
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from bilevel import (
    Batches,
    CheckpointError,
    DivergenceError,
    Result,
    Solver,
    Step,
    train,
)
from bilevel.batches import Source
from bilevel.checkpoint import read_checkpoint
from bilevel.distributed import any_rank, is_main, world_size
from bilevel.methods.training import best
from bilevel.methods.training.preconditions import check, refuse_changes
from bilevel.methods.training.run import Run
from bilevel.methods.training.settings import Training
from bilevel.optimizers import Optimizers, listed
from bilevel.sync_batch_norm import synchronise_batch_norm

if TYPE_CHECKING:
    from bilevel.methods.eblvm import EBLVM

Evaluate: TypeAlias = Callable[["EBLVM"], dict[str, float]]

_PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class History:
    """What training recorded.

    Attributes:
        records: one dict of plain numbers per `log_every` steps.
        steps: upper steps taken in this call.
        seconds: training time of this call.
        evaluations: one dict of plain numbers per `evaluate_every` steps.
        solver: how the hypergradient was computed.
        total: upper steps of the run so far, those before it was resumed included.
    """

    records: list[dict[str, Any]] = field(default_factory=list)
    steps: int = 0
    seconds: float = 0.0
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    solver: Solver | None = None
    total: int = 0

    @property
    def steps_per_second(self) -> float:
        """Speed of this call, evaluation and callbacks excluded."""
        return self.steps / self.seconds if self.seconds else float("nan")


def fit(
    model: "EBLVM",
    data: Tensor,
    training: Training,
    *,
    solver: Solver | None,
    callbacks: Iterable[Callable[[Step], object]],
    run: str | os.PathLike[str] | None,
    resume: bool,
    overwrite: bool,
    optimizers: tuple[Optimizers, Optimizers] | None,
    notes: dict[str, Any] | None = None,
    evaluate: Evaluate | None = None,
) -> History:
    """Train `model` on checked data; see `EBLVM.fit`.

    `evaluate` is called every `training.evaluate_every` steps with a copy of the model (of the moving
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
    solver = model.default_solver() if solver is None else solver
    check(data, training, resume=resume, run=run, evaluated=evaluate is not None)
    folder = Run(run) if run is not None else None
    if folder is not None and is_main():
        folder.claim(resume=resume, overwrite=overwrite)
        if resume:
            refuse_changes(folder, training)
    model.probe(model.as_visibles(data[:2]))
    levels = optimizers if optimizers is not None else model.optimizers(training)
    batches = Batches(data, training.batch_size, seed=training.seed, convert=model.as_visibles)
    steps = begin(
        model,
        batches,
        training,
        solver,
        levels,
        per_epoch=len(data) // training.batch_size,
        resume=folder.checkpoint_path if folder is not None and resume else None,
        check_every=1 if data.device.type == "cpu" else 20,  # on a GPU each look waits
    )
    if folder is not None and not resume and is_main():
        folder.begin({**describe(model, training, solver, data), "notes": notes or {}})
    steps = _advised(steps, model, training, solver, tuple(data.shape[1:]))
    history = _follow(model, steps, training, list(callbacks), evaluate, folder, resume)
    return replace(history, solver=solver)


def begin(
    model: "EBLVM",
    source: Source,
    training: Training,
    solver: Solver,
    optimizers: tuple[Optimizers, Optimizers],
    *,
    check_every: int,
    per_epoch: int = 1,
    resume: str | os.PathLike[str] | None = None,
) -> Iterator[Step]:
    """The steps of a training, none of them taken yet."""
    upper, lower = optimizers
    if training.sync_batch_norm and world_size() > 1:
        synchronise_batch_norm(model)
    model.train()
    two_levels = bool(model.variables("lower"))
    lower_moves = two_levels and training.lower_steps > 0
    return train(
        model,
        source,
        upper_optimizer=upper,
        lower_optimizer=lower if two_levels else None,
        num_steps=training.num_steps,
        solver=solver,
        lower_steps=training.lower_steps if two_levels else 0,
        order=training.order,
        upper_scheduler=_schedulers(upper, training, per_epoch),
        lower_scheduler=_schedulers(lower, training, per_epoch) if lower_moves else (),
        clip_upper=training.clip_upper,
        clip_lower=training.clip_lower,
        seed=training.seed,
        resume=resume,
        check_every=check_every,
        throw=False,
        compile=training.compile,
        precision=_PRECISIONS[training.precision],
        ema=training.ema,
    )


def describe(model: "EBLVM", training: Training, solver: Solver, data: Tensor) -> dict[str, Any]:
    """A run's configuration as plain values."""
    return {
        "method": type(model).__name__,
        "model": model.recipe,
        "training": training.model_dump(mode="json"),
        "solver": repr(solver),
        "data": {"shape": list(data.shape)},
    }


# ---------------------------------------------------------------------- the run


def _follow(
    model: "EBLVM",
    steps: Iterable[Step],
    training: Training,
    callbacks: list[Callable[[Step], object]],
    evaluate: Evaluate | None,
    folder: Run | None,
    resume: bool,
) -> History:
    records: list[dict[str, Any]] = []  # of a run with a folder they are there, and only there
    evaluations: list[dict[str, Any]] = []
    first, step = None, None
    try:
        for step in steps:
            if first is None:
                first = step.number - 1
                if folder is not None and resume and is_main():
                    folder.rewind(first)
                    folder.prolong(training.model_dump(mode="json"))
            stops = [callback(step) is True for callback in callbacks]  # call every one
            ended = _ended(step, training, any(stops))
            measured = None
            if (
                evaluate is not None
                and is_main()
                and step.number % (training.evaluate_every or 1) == 0
            ):
                measured = _measured(model, step, evaluate)
            due = ended or step.number % training.log_every == 0
            line = record(step) if due else None
            if folder is not None:
                _write(folder, step, training, line, measured, ended)
            else:
                records += [line] if line is not None else []
                evaluations += [measured.record] if measured is not None else []
            if ended:
                break
    except DivergenceError as error:
        if folder is not None and folder.checkpoint_path.exists():
            error.add_note(f"The last good checkpoint is `{folder.checkpoint_path}`")
        raise
    model.eval()
    if training.ema is not None:
        model.load_state_dict(_average(step, folder))
    if folder is not None and is_main():
        model.save(folder.model_path)
    if folder is not None:
        records, evaluations = folder.metrics(), folder.evaluations()
    if step is None or first is None:  # a finished run was resumed
        return History(records, evaluations=evaluations, total=training.num_steps)
    return History(records, step.number - first, step.seconds, evaluations, total=step.number)


def _ended(step: Step, training: Training, stopped: bool) -> bool:
    """Whether this step is the last one; all ranks must say the same of the same step."""
    late = training.max_seconds is not None and step.seconds >= training.max_seconds
    wished = stopped or late
    if world_size() > 1:  # asking the others costs an exchange
        wished = step.number % training.log_every == 0 and any_rank(wished)
    return wished or step.number == training.num_steps


def _write(
    folder: Run,
    step: Step,
    training: Training,
    line: dict[str, Any] | None,
    measured: "_Measured | None",
    ended: bool,
) -> None:
    """Everything a step leaves on disk.

    The checkpoint comes last: whatever was recorded up to it is there when the run is resumed from it.
    """
    due = ended or step.number % training.checkpoint_every == 0
    if not is_main():
        if due:
            step.state.save(folder.checkpoint_path)  # takes part; the first process writes
        return
    if line is not None:
        folder.append(line)
    if measured is not None:
        folder.append_evaluation(measured.record)
        rule = best.rule_of(training.best, measured.record)
        if rule is None:
            warnings.warn(best.unknown(measured.record), stacklevel=2)
        elif rule.better(measured.record, folder.best()):
            folder.keep_best(measured.model.save, measured.record, str(rule))
    if due:
        # variables that are not finite: the next step's losses say so better, if there is one
        with contextlib.nullcontext() if ended else contextlib.suppress(CheckpointError):
            folder.checkpoint(step.state, training.keep_checkpoints)


def _average(step: Step | None, folder: Run | None) -> dict[str, Any]:
    """The averaged weights; of a finished run that was resumed, those in its checkpoint."""
    if step is not None:
        assert step.state.average is not None
        return step.state.average.state_dict()
    assert folder is not None
    weights: dict[str, Any] = read_checkpoint(folder.checkpoint_path, "cpu")["average"]
    return weights


def _advised(
    steps: Iterator[Step],
    model: "EBLVM",
    training: Training,
    solver: Solver,
    shape: tuple[int, ...],
) -> Iterator[Step]:
    """The steps; where memory runs out in one, with advice."""
    try:
        yield from steps
    except RuntimeError as error:
        from bilevel.methods.training.footprint import advice, asked  # on the rare occasion

        if asked(error) is None:
            raise
        raise MemoryError(advice(error, model, training, solver, shape)) from error


# ---------------------------------------------------------------------- evaluation on the side


@dataclass(frozen=True)
class _Measured:
    """An evaluation, and the copy of the model that was evaluated."""

    model: "EBLVM"
    record: dict[str, Any]


def _measured(model: "EBLVM", step: Step, evaluate: Evaluate) -> _Measured | None:
    """Evaluate a copy; `None` if its weights are not finite, of which the next losses will speak."""
    side: Any = copy.deepcopy(model if step.state.average is None else step.state.average)
    if not all(bool(p.isfinite().all()) for p in side.parameters()):
        return None
    side.eval().in_data_units()
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices):
            results = evaluate(side)
    except Exception as error:
        error.add_note(f"in the evaluation after step {step.number}")
        raise
    numbers = {name: float(value) for name, value in results.items()}
    return _Measured(side, {"step": step.number, "seconds": round(step.seconds, 4), **numbers})


def record(step: Step) -> dict[str, Any]:
    """A step as plain numbers (waits for the device)."""
    stats, result = step.hypergradient.stats, step.hypergradient.result
    optional = {
        "lower_loss": step.lower_loss,
        "lower_residual": step.lower_residual,
        "linear_residual": stats.linear_residual,
    }
    return {
        "step": step.number,
        "seconds": round(step.seconds, 4),
        "upper_loss": float(step.upper_loss),
        **{name: float(value) for name, value in step.logs.items()},
        "direct_norm": float(stats.direct_norm),
        "response_norm": float(stats.response_norm),
        **{name: float(value) for name, value in optional.items() if value is not None},
        **({} if result is Result.SUCCESS else {"result": result.name.lower()}),
    }


def _schedulers(optimizers: Optimizers, training: Training, per_epoch: int) -> list[LambdaLR]:
    """The learning rate of upper step t, as a factor of the initial one.

    "exponential": decay^e in epoch e, set at the start of the epoch (the official code); with a decay of
    1 there is nothing to schedule.
    "cosine": f + (1 - f) (1 + cos(pi t / T)) / 2, f the share that is left at the end.
    """

    def exponential(step: int) -> float:
        return training.decay ** (step // per_epoch)

    def cosine(step: int) -> float:
        falling = (1 + math.cos(math.pi * min(step / training.num_steps, 1))) / 2
        return training.final_lr + (1 - training.final_lr) * falling

    if training.schedule == "exponential" and training.decay == 1:
        return []
    factor = exponential if training.schedule == "exponential" else cosine
    return [LambdaLR(optimizer, factor) for optimizer in listed(optimizers)]

"""`fit`: train a model with `bilevel.train`, keep its history and its run folder."""

import contextlib
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from bilevel import (
    Alternating,
    Batches,
    CheckpointError,
    DivergenceError,
    Result,
    Solver,
    Step,
    train,
)
from bilevel.methods.config import Training
from bilevel.methods.run import Run
from bilevel.optimizers import Optimizers, listed

if TYPE_CHECKING:
    from bilevel.methods.eblvm import EBLVM


@dataclass(frozen=True)
class History:
    """What training recorded.

    Attributes:
        records: one dict of plain numbers per `log_every` steps.
        steps: upper steps taken in all.
        seconds: training time of this call.
    """

    records: list[dict[str, Any]] = field(default_factory=list)
    steps: int = 0
    seconds: float = 0.0

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
) -> History:
    """Train `model` on checked data; see `EBLVM.fit`."""
    solver = Alternating() if solver is None else solver
    if len(data) < training.batch_size:
        raise ValueError(
            f"`batch_size` is {training.batch_size}, but there are only {len(data)} visibles"
        )
    if resume and run is None:
        raise ValueError("`resume=True` needs the folder of the run: `run=...`")
    folder = Run(run) if run is not None else None
    if folder is not None:
        folder.claim(resume=resume, overwrite=overwrite)
    model.probe(model.as_visibles(data[:2]))
    upper, lower = optimizers if optimizers is not None else model.optimizers(training)
    batches = Batches(data, training.batch_size, seed=training.seed, convert=model.as_visibles)
    per_epoch = len(data) // training.batch_size
    model.train()
    two_levels = bool(model.variables("lower"))
    lower_moves = two_levels and training.lower_steps > 0
    steps = train(
        model,
        batches,
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
        resume=folder.checkpoint_path if folder is not None and resume else None,
        check_every=1 if data.device.type == "cpu" else 20,  # on a GPU each look waits
        throw=False,
        compile=training.compile,
    )
    if folder is not None and not resume:
        folder.begin({**describe(model, training, solver, data), "notes": notes or {}})
    return _follow(model, steps, training, list(callbacks), folder, resume)


def describe(model: "EBLVM", training: Training, solver: Solver, data: Tensor) -> dict[str, Any]:
    """A run's configuration as plain values."""
    return {
        "method": type(model).__name__,
        "model": model.recipe,
        "training": training.model_dump(mode="json"),
        "solver": repr(solver),
        "data": {"shape": list(data.shape)},
    }


def _follow(
    model: "EBLVM",
    steps: Iterable[Step],
    training: Training,
    callbacks: list[Callable[[Step], object]],
    folder: Run | None,
    resume: bool,
) -> History:
    records: list[dict[str, Any]] = folder.metrics() if folder is not None and resume else []
    first, step = None, None
    try:
        for step in steps:
            if first is None:
                first = step.number - 1
                if folder is not None and resume:
                    folder.rewind(first)
                    records = folder.metrics()
            ended = step.number == training.num_steps or (
                training.max_seconds is not None and step.seconds >= training.max_seconds
            )
            stops = [callback(step) is True for callback in callbacks]  # call every one
            ended |= any(stops)
            if ended or step.number % training.log_every == 0:
                records.append(record(step))
                if folder is not None:
                    folder.append(records[-1])
            if folder is not None and (ended or step.number % training.checkpoint_every == 0):
                # variables that are not finite: the next step's losses say so better, if there is one
                with contextlib.nullcontext() if ended else contextlib.suppress(CheckpointError):
                    step.state.save(folder.checkpoint_path)
            if ended:
                break
    except DivergenceError as error:
        if folder is not None and folder.checkpoint_path.exists():
            error.add_note(f"The last good checkpoint is `{folder.checkpoint_path}`")
        raise
    model.eval()
    if folder is not None:
        model.save(folder.model_path)
    if step is None or first is None:  # a finished run was resumed
        return History(records)
    return History(records, step.number - first, step.seconds)


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

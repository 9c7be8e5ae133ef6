"""`training_steps`: the steps of a training with the settings of `Training`."""

import math
import os
from collections.abc import Callable, Iterator
from typing import cast

import torch
from torch.optim.lr_scheduler import LambdaLR

from bilevel import Problem, Solver, Step, train
from bilevel.batches import Source
from bilevel.distributed import world_size
from bilevel.methods.training.settings import Training
from bilevel.methods.training.trainable import Trainable
from bilevel.optimizers import Optimizers, listed
from bilevel.sync_batch_norm import synchronise_batch_norm

_PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16}


def training_steps(
    model: Trainable,
    source: Source,
    training: Training,
    solver: Solver,
    optimizers: tuple[Optimizers, Optimizers],
    *,
    check_every: int,
    epoch: Callable[[int], int] = lambda step: step,
    resume: str | os.PathLike[str] | None = None,
) -> Iterator[Step]:
    """The steps of a training, none of them taken yet.

    Args:
        model: to be trained in place.
        source: gives the batches.
        training: the settings.
        solver: how the hypergradient is computed.
        optimizers: of the upper and the lower level.
        check_every: steps between two looks for NaN.
        epoch: how many epochs have ended after so many steps, for the schedule of the learning rates.
        resume: checkpoint to go on from.
    """
    upper, lower = optimizers
    problem = cast(Problem, model)  # a protocol cannot inherit from a class
    if training.sync_batch_norm and world_size() > 1:
        synchronise_batch_norm(problem)
    model.train()
    two_levels = bool(model.variables("lower"))
    steps = 0 if solver.moves_lower or not two_levels else training.lower_steps
    lower_moves = two_levels and (solver.moves_lower or steps > 0)
    return train(
        problem,
        source,
        upper_optimizer=upper,
        lower_optimizer=lower if two_levels else None,
        num_steps=training.num_steps,
        solver=solver,
        lower_steps=steps,
        order=training.order,
        upper_scheduler=_schedulers(upper, training, epoch),
        lower_scheduler=_schedulers(lower, training, epoch) if lower_moves else (),
        clip_upper=training.clip_upper,
        clip_lower=training.clip_lower,
        seed=training.seed,
        resume=resume,
        check_every=check_every,
        certify_every=training.certify_every,
        certify_steps=_replayed(training, solver) if two_levels else None,
        throw=False,
        compile=training.compile,
        precision=_PRECISIONS[training.precision],
        ema=training.ema,
    )


def _replayed(training: Training, solver: Solver) -> int | None:
    """Lower steps that a certificate replays: a turn's, where the solver itself says nothing of them."""
    looked = training.certify_every is not None and solver.drops_response
    return max(training.lower_steps, 1) if looked else None


def _schedulers(
    optimizers: Optimizers, training: Training, epoch: Callable[[int], int]
) -> list[LambdaLR]:
    """The learning rate of upper step t, as a factor of the initial one.

    "exponential": decay^e in epoch e, set at the start of the epoch (the official code); with a decay of
    1 there is nothing to schedule.
    "cosine": f + (1 - f) (1 + cos(pi t / T)) / 2, f the share that is left at the end.
    """

    def exponential(step: int) -> float:
        return training.decay ** epoch(step)

    def cosine(step: int) -> float:
        falling = (1 + math.cos(math.pi * min(step / training.num_steps, 1))) / 2
        return training.final_lr + (1 - training.final_lr) * falling

    if training.schedule == "exponential" and training.decay == 1:
        return []
    factor = exponential if training.schedule == "exponential" else cosine
    return [LambdaLR(optimizer, factor) for optimizer in listed(optimizers)]

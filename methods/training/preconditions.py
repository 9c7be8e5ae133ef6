"""What must hold before a training starts, and what a resumed one may change."""

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor

from bilevel import Step
from bilevel.distributed import from_main, is_main, world_size
from bilevel.errors import CheckpointError
from bilevel.methods.training import best
from bilevel.methods.training.run import Destination, Run
from bilevel.methods.training.settings import Training, refuse_idle, validated
from bilevel.optimizers import optimizers_of
from bilevel.refusals import callable_or_none, shown

# what a run does beside training, and when it ends
_FREE = (
    "num_steps",
    "max_seconds",
    "evaluate_every",
    "best",
    "certify_every",
    "log_every",
    "checkpoint_every",
    "keep_checkpoints",
)


def settled(
    given: Mapping[str, Any],
    defaults: Mapping[str, Any],
    destination: Destination,
    *,
    levels: int,
    evaluated: bool,
    own_optimizers: bool,
) -> Training:
    """All settings of a training.

    Args:
        given: by the caller, by name.
        defaults: of the method, where they differ from those of `Training`.
        destination: says whether a run is resumed, which keeps the settings it was begun with.
        levels: how many the model has.
        evaluated: whether the model is evaluated on the way.
        own_optimizers: whether the caller brought optimizers.

    Raises:
        ValueError: naming each bad setting, or the first that would change nothing.
    """
    kept = begun_with(destination, evaluated=evaluated)
    training = validated(Training, {**defaults, **kept, **given}, levels=levels)
    usual = validated(Training, dict(defaults))
    refuse_idle(training, given, usual, levels=levels, own_optimizers=own_optimizers)
    return training


def functions_of(callbacks: Any) -> list[Callable[[Step], object]]:
    """The callbacks as a list.

    Raises:
        TypeError: if they are no list of functions.
    """
    if not isinstance(callbacks, Iterable) or isinstance(callbacks, str):
        raise TypeError(f"`callbacks` must be a list of functions, got {shown(callbacks)}")
    found = list(callbacks)
    for callback in found:
        if not callable(callback) or isinstance(callback, type):
            raise TypeError(
                f"`callbacks` must be functions, called as `callback(step)`; got {shown(callback)}"
            )
    return found


def refuse_misfits(optimizers: Any, evaluate: Any, notes: Any) -> None:
    """Refuse what `fit` would only stumble over after the first step.

    Raises:
        TypeError: for an `evaluate` that is no function, optimizers that are no pair, or notes that JSON
            does not know.
    """
    callable_or_none("evaluate", evaluate, "evaluate(model)")
    if optimizers is not None:
        if not isinstance(optimizers, (tuple, list)) or len(optimizers) != 2:
            raise TypeError(
                "`optimizers` must be a pair, `(upper, lower)`, each one optimizer or a list of them, "
                f"got {shown(optimizers)}"
            )
        for name, given in zip(("upper", "lower"), optimizers, strict=True):
            optimizers_of(f"{name}_optimizer", given)
    if notes is not None and not isinstance(notes, dict):
        raise TypeError(f"`notes` must be a dict of plain values, got {shown(notes)}")
    try:
        json.dumps(notes)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"`notes` go into `config.json` and must be plain values (numbers, texts, lists): {error}"
        ) from None


def check_start(training: Training, destination: Destination, *, evaluated: bool) -> None:
    """Refuse settings that do not fit each other or the number of processes.

    Raises:
        ValueError: with what to change.
    """
    if training.batch_size % (ranks := world_size()):
        raise ValueError(
            f"`batch_size` is that of all processes together, and {training.batch_size} cannot be "
            f"shared out equally among {ranks}; use {max(1, training.batch_size // ranks) * ranks}"
        )
    if destination.resume and destination.run is None:
        raise ValueError("`resume=True` needs the folder of the run: `run=...`")
    best.check_evaluation(training, evaluated=evaluated, kept=destination.run is not None)


def refuse_small(data: Tensor, training: Training) -> None:
    """Refuse data that do not fill a batch.

    Raises:
        ValueError: if there are fewer visibles than in a batch.
    """
    if len(data) < training.batch_size:
        raise ValueError(
            f"`batch_size` is {training.batch_size}, but there are only {len(data)} visibles"
        )


def begun_with(destination: Destination, *, evaluated: bool) -> dict[str, Any]:
    """The settings that a run was begun with: a resumed one keeps those it is not given.

    Args:
        destination: says whether it is resumed; a new run has none.
        evaluated: whether it is evaluated on the way now, too.
    """
    if not destination.resume:
        return {}
    settings: dict[str, Any] = {}
    folder = destination.folder
    if folder is not None and is_main() and folder.config_path.exists():
        settings = dict(folder.config()["training"])
    known: dict[str, Any] = from_main(settings)
    idle = () if evaluated else ("evaluate_every", "best")
    return {n: v for n, v in known.items() if n in Training.model_fields and n not in idle}


def refuse_changes(folder: Run, training: Training) -> None:
    """Refuse to resume a run with settings other than its own: they would be ignored.

    Raises:
        CheckpointError: naming what was changed.
    """
    if not folder.config_path.exists():
        return
    own, now = folder.config()["training"], training.model_dump(mode="json")
    changed = [n for n in now if n in own and n not in _FREE and now[n] != own[n]]
    if changed:
        said = "; ".join(f"`{n}` was {own[n]!r}, is {now[n]!r}" for n in changed)
        raise CheckpointError(
            f"the run in `{folder.folder}` was begun with other settings: {said}; leave them out to "
            "resume it, or start a new run"
        )

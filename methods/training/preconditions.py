"""What must hold before a training starts, and what a resumed one may change."""

import os
from typing import Any

from torch import Tensor

from bilevel.distributed import from_main, is_main, world_size
from bilevel.errors import CheckpointError
from bilevel.methods.training import best
from bilevel.methods.training.run import Run
from bilevel.methods.training.settings import Training

# what a run does beside training, and when it ends
_FREE = (
    "num_steps",
    "max_seconds",
    "evaluate_every",
    "best",
    "log_every",
    "checkpoint_every",
    "keep_checkpoints",
)


def check_start(
    data: Tensor,
    training: Training,
    *,
    resume: bool,
    run: str | os.PathLike[str] | None,
    evaluated: bool,
) -> None:
    """Refuse settings that do not fit each other, the data or the number of processes.

    Raises:
        ValueError: with what to change.
    """
    refuse_small(data, training)
    if training.batch_size % (ranks := world_size()):
        raise ValueError(
            f"`batch_size` is that of all processes together, and {training.batch_size} cannot be "
            f"shared out equally among {ranks}; use {max(1, training.batch_size // ranks) * ranks}"
        )
    if resume and run is None:
        raise ValueError("`resume=True` needs the folder of the run: `run=...`")
    best.check_evaluation(training, evaluated=evaluated, kept=run is not None)


def refuse_small(data: Tensor, training: Training) -> None:
    """Refuse data that do not fill a batch.

    Raises:
        ValueError: if there are fewer visibles than in a batch.
    """
    if len(data) < training.batch_size:
        raise ValueError(
            f"`batch_size` is {training.batch_size}, but there are only {len(data)} visibles"
        )


def begun_with(run: str | os.PathLike[str] | None, *, evaluated: bool) -> dict[str, Any]:
    """The settings that a run was begun with: a resumed one keeps those it is not given.

    Args:
        run: its folder.
        evaluated: whether it is evaluated on the way now, too.
    """
    settings: dict[str, Any] = {}
    if run is not None and is_main() and Run(run).config_path.exists():
        settings = dict(Run(run).config()["training"])
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

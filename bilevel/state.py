"""`State`: everything a run needs to go on as if it had never stopped."""

import contextlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from bilevel.batches import Source
from bilevel.errors import CheckpointError
from bilevel.problem import Problem

_FORMAT = "bilevel-checkpoint-1"


class Scheduler(Protocol):
    """A learning-rate scheduler: `torch.optim.lr_scheduler` or anything that looks like one."""

    def step(self) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


class State:
    """The whole state of a training run, as live references.

    Problem (variables and buffers), optimizers and schedulers of both levels, position in the data,
    random generator, the solver's own state (warm starts) and the number of steps taken.

    Attributes:
        step: number of upper steps taken.
        configuration: plain values that say which run this is; a checkpoint of another
            configuration is refused.
    """

    def __init__(
        self,
        problem: Problem,
        optimizers: Mapping[str, Sequence[torch.optim.Optimizer]],
        schedulers: Mapping[str, Sequence[Scheduler]],
        sources: Mapping[str, Source],
        generator: torch.Generator,
        configuration: dict[str, str],
    ) -> None:
        self.problem = problem
        self.optimizers = optimizers
        self.schedulers = schedulers
        self.sources = sources
        self.generator = generator
        self.configuration = configuration
        self.solver_state: Any = None
        self.step = 0

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values only, so that it loads with `weights_only=True`."""
        return {
            "format": _FORMAT,
            "configuration": self.configuration,
            "step": self.step,
            "problem": self.problem.state_dict(),
            "optimizers": _each(self.optimizers),
            "schedulers": _each(self.schedulers),
            "sources": {name: source.state_dict() for name, source in self.sources.items()},
            "generator": self.generator.get_state(),
            "solver": self.solver_state,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state, in place.

        Raises:
            CheckpointError: if it belongs to another configuration; nothing is changed then.
        """
        self._refuse_other_configuration(state["configuration"])
        self.problem.load_state_dict(state["problem"])
        for name, group in self.optimizers.items():
            for optimizer, saved in zip(group, state["optimizers"][name], strict=True):
                optimizer.load_state_dict(saved)
        for name, schedulers in self.schedulers.items():
            for scheduler, saved in zip(schedulers, state["schedulers"][name], strict=True):
                scheduler.load_state_dict(saved)
        for name, source in self.sources.items():
            source.load_state_dict(state["sources"][name])
        self.generator.set_state(state["generator"].cpu())
        self.solver_state = state["solver"]
        self.step = state["step"]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a checkpoint atomically: after a crash the old file or the new one is there, whole.

        Raises:
            CheckpointError: if a variable or buffer is not finite; an existing file is kept.
        """
        for name, tensor in self.problem.state_dict().items():
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                raise CheckpointError(
                    f"`{name}` holds NaN or infinite numbers after step {self.step}; "
                    "the checkpoint was not written and the previous one was kept"
                )
        write_atomically(self.state_dict(), path)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Continue from the checkpoint at `path`.

        Raises:
            CheckpointError: if the file is missing, truncated, or of another configuration.
        """
        self.load_state_dict(read_checkpoint(path, map_location=self.problem.device))

    def _refuse_other_configuration(self, saved: dict[str, str]) -> None:
        mine = self.configuration
        differing = [key for key in mine.keys() | saved.keys() if mine.get(key) != saved.get(key)]
        if differing:
            lines = [
                f"`{key}` was {saved.get(key)}, is {mine.get(key)}" for key in sorted(differing)
            ]
            raise CheckpointError(
                "the checkpoint belongs to another configuration: " + "; ".join(lines)
            )


def _each(groups: Mapping[str, Sequence[Any]]) -> dict[str, list[dict[str, Any]]]:
    return {name: [member.state_dict() for member in group] for name, group in groups.items()}


def write_atomically(content: Any, path: str | os.PathLike[str]) -> None:
    """`torch.save` into a temporary file beside `path`, flushed to disk, then renamed over it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()


def read_checkpoint(
    path: str | os.PathLike[str], map_location: torch.device | str | None = None
) -> dict[str, Any]:
    """A checkpoint's content, loaded with `weights_only=True`.

    Raises:
        CheckpointError: if the file is missing, truncated or something else.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint at `{path}`")
    try:
        content = torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:  # torch raises a dozen kinds of error here
        raise CheckpointError(
            f"`{path}` ({path.stat().st_size} bytes) is truncated or not a checkpoint; "
            f"use an earlier one ({type(error).__name__})"
        ) from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise CheckpointError(f"`{path}` is not a checkpoint of `bilevel.train`")
    return content

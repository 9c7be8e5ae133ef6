"""`State`: everything a run needs to go on as if it had never stopped."""

import copy
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, final

import optree
import torch

from bilevel.batches import Source
from bilevel.cards import plural
from bilevel.checkpoint import (
    FORMAT,
    loadable,
    read_checkpoint,
    refuse_not_finite,
    write_atomically,
)
from bilevel.distributed import agree, is_main
from bilevel.errors import CheckpointError
from bilevel.moving_average import MovingAverage
from bilevel.optimizers import LevelUpdate, Scheduler
from bilevel.problem import Level, Problem
from bilevel.refusals import path_of, shown
from bilevel.tree import Tree


@final
class State:
    """The whole state of a training run, as live references.

    Problem (variables and buffers), optimizers and schedulers of both levels, position in the data,
    random generator, the solver's own state (warm starts) and the number of steps taken.

    Attributes:
        updates: how each level's variables are updated: optimizers, schedulers, clipping.
        step: number of upper steps taken.
        configuration: plain values that say which run this is; a checkpoint of another
            configuration is refused.
    """

    def __init__(
        self,
        problem: Problem,
        updates: Mapping[Level, LevelUpdate],
        sources: Mapping[str, Source],
        generator: torch.Generator,
        configuration: dict[str, str],
        ema: float | None = None,
    ) -> None:
        self.problem = problem
        self.updates = updates
        self.sources = sources
        self.generator = generator
        self.configuration = configuration
        self.solver_state: Any = None
        self.lower_start: Tree | None = (
            None  # where every turn begins, if it is not where one ended
        )
        self.step = 0
        self._average = MovingAverage(problem, ema) if ema is not None else None

    def __repr__(self) -> str:
        moved = [
            f"{level} by {' and '.join(type(o).__name__ for o in group)}"
            for level, group in self.optimizers.items()
            if group
        ]
        kept = ", with a moving average of the weights" if self._average is not None else ""
        problem = type(self.problem).__name__
        return f"State of {problem} after {plural(self.step, 'step')}: {', '.join(moved)}{kept}"

    def keep_lower_start(self) -> None:
        """Let every turn begin with the lower variables of now."""
        variables = self.problem.variables("lower")
        self.lower_start = {name: y.detach().clone() for name, y in variables.items()}

    @property
    def optimizers(self) -> dict[Level, Sequence[torch.optim.Optimizer]]:
        """The optimizers of each level."""
        return {level: update.optimizers for level, update in self.updates.items()}

    @property
    def schedulers(self) -> dict[Level, Sequence[Scheduler]]:
        """The schedulers of each level."""
        return {level: update.schedulers for level, update in self.updates.items()}

    @property
    def average(self) -> Problem | None:
        """A copy of the problem that holds the moving average of its weights, if there is one."""
        return self._average.problem if self._average is not None else None

    def follow(self) -> None:
        """Take the weights as they are now into the moving average."""
        if self._average is not None:
            self._average.update()

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values only, so that it loads with `weights_only=True`."""
        return {
            "format": FORMAT,
            "configuration": self.configuration,
            "step": self.step,
            "problem": _checked(self.problem),
            "buffers": _left_out(self.problem),
            "optimizers": loadable(_each(self.optimizers), "optimizers"),
            "schedulers": loadable(_each(self.schedulers), "schedulers"),
            "sources": loadable({n: s.state_dict() for n, s in self.sources.items()}, "sources"),
            "generator": self.generator.get_state(),
            "solver": loadable(self.solver_state, "solver"),
            **({"lower_start": self.lower_start} if self.lower_start is not None else {}),
            **({"average": _checked(self.average)} if self.average is not None else {}),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state, in place.

        Raises:
            CheckpointError: if it belongs to another configuration; the run is left as it was.
        """
        _refuse_no_state(state)
        self._refuse_other_configuration(state["configuration"])
        if state["sources"].keys() != self.sources.keys():
            had, have = (
                " and ".join(f"`{n}`" for n in s) for s in (state["sources"], self.sources)
            )
            raise CheckpointError(f"the checkpoint's run read {had}, this one reads {have}")
        before = copy.deepcopy(self.state_dict())
        try:
            self._load(state)
        except CheckpointError:
            self._load(before)
            raise
        except Exception as error:  # whatever does not fit, the run must not be left half loaded
            self._load(before)
            raise CheckpointError(f"the checkpoint does not fit this run: {error}") from error

    def _load(self, state: dict[str, Any]) -> None:
        self.problem.load_state_dict(state["problem"])
        self._load_left_out(state.get("buffers"))
        for level, optimizers in self.optimizers.items():
            for optimizer, saved in zip(optimizers, state["optimizers"][level], strict=True):
                optimizer.load_state_dict(saved)
        for level, schedulers in self.schedulers.items():
            for scheduler, saved in zip(schedulers, state["schedulers"][level], strict=True):
                scheduler.load_state_dict(saved)
        for name, source in self.sources.items():
            source.load_state_dict(state["sources"][name])
        self.generator.set_state(state["generator"].cpu())
        self.solver_state = _on(self.problem.device, state["solver"])
        self.lower_start = _on(self.problem.device, state.get("lower_start"))
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.step = state["step"]

    def _load_left_out(self, saved: dict[str, Any] | None) -> None:
        """The buffers that no `state_dict` holds; those of the average are the problem's own."""
        mine = _left_out(self.problem)
        if saved is None and mine:
            warnings.warn(
                f"the checkpoint is of an earlier version, without the values of `{next(iter(mine))}` "
                "(`persistent=False`); the run goes on from those of now",
                RuntimeWarning,
                stacklevel=2,
            )
        elif saved is not None and saved.keys() != mine.keys():
            name = min(saved.keys() ^ mine.keys())
            raise CheckpointError(
                f"the buffer `{name}` (`persistent=False`) is not in both the checkpoint and the problem"
            )
        for problem in (self.problem, self.average):
            if problem is not None:
                _write_buffers(problem, saved or {})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a checkpoint atomically: after a crash the old file or the new one is there, whole.

        With several ranks all must call this: they average their batch-norm statistics, and rank 0
        writes.

        Raises:
            CheckpointError: if a variable is not finite, a buffer holds NaN or the state holds
                something that could not be loaded again; an existing file is kept.
        """
        agree(self.problem)
        if is_main():
            target = path_of("path", path)
            refuse_not_finite(self.problem, self.step)
            write_atomically(self.state_dict(), target)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Continue from the checkpoint at `path`.

        Raises:
            CheckpointError: if the file is missing, truncated, or of another configuration.
        """
        self.load_state_dict(read_checkpoint(path_of("path", path), map_location="cpu"))

    def _refuse_other_configuration(self, saved: dict[str, str]) -> None:
        mine = self.configuration
        everything = mine.keys() | saved.keys()
        # settings of optimizers and schedulers are compared only where both have them
        compared = (k for k in everything if "." not in k or (k in mine and k in saved))
        differing = [key for key in compared if mine.get(key) != saved.get(key)]
        if differing:
            lines = [
                f"`{key}` was {saved.get(key)}, is {mine.get(key)}" for key in sorted(differing)
            ]
            raise CheckpointError(
                "the checkpoint belongs to another configuration: " + "; ".join(lines)
            )


def _refuse_no_state(state: Any) -> None:
    wanted = ("configuration", "sources", "problem", "optimizers", "step")
    missing = [n for n in wanted if n not in state] if isinstance(state, Mapping) else list(wanted)
    if missing:
        got = f"a dict without `{missing[0]}`" if isinstance(state, Mapping) else shown(state)
        raise CheckpointError(
            f"the state of a run is what `state_dict()` returns, got {got}; a file is read by "
            "`state.load(path)`"
        )


def _checked(module: torch.nn.Module) -> dict[str, Any]:
    """The module's `state_dict`, if it can be loaded again (`get_extra_state` may return anything)."""
    state = module.state_dict()
    state.update({name: loadable(value, name) for name, value in state.items()})
    return state


def _left_out(module: torch.nn.Module) -> dict[str, Any]:
    """The buffers that are part of a run but not of `state_dict`: `persistent=False`."""
    return {
        f"{path}.{name}".lstrip("."): part._buffers.get(name)
        for path, part in module.named_modules(remove_duplicate=False)
        for name in sorted(part._non_persistent_buffers_set)
    }


@torch.no_grad()
def _write_buffers(module: torch.nn.Module, values: dict[str, Any]) -> None:
    for name, value in values.items():
        path, _, leaf = name.rpartition(".")
        buffers = module.get_submodule(path)._buffers
        mine = buffers.get(leaf)
        if mine is None or value is None or (mine.shape, mine.dtype) != (value.shape, value.dtype):
            device = next(module.parameters()).device if mine is None else mine.device
            buffers[leaf] = None if value is None else value.to(device)
        elif not torch.equal(mine, value.to(mine.device)):  # an expanded one cannot be written
            mine.copy_(value)


def _each(groups: Mapping[Level, Sequence[Any]]) -> dict[str, list[dict[str, Any]]]:
    return {name: [member.state_dict() for member in group] for name, group in groups.items()}


def _on(device: torch.device, solver_state: Any) -> Any:
    return optree.tree_map(
        lambda leaf: leaf.to(device) if isinstance(leaf, torch.Tensor) else leaf, solver_state
    )

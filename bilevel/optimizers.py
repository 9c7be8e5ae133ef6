"""Optimizers and schedulers of a level: one or several, and whether the loop can work with them."""

import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeVar, final

import numpy as np
import optree
import torch
from torch import Tensor
from torch.optim import Optimizer

from bilevel.refusals import shown

if TYPE_CHECKING:
    from bilevel.problem import Level, Problem

T = TypeVar("T")
Optimizers: TypeAlias = Optimizer | Sequence[Optimizer]


class Scheduler(Protocol):
    """A learning-rate scheduler: `torch.optim.lr_scheduler` or anything that looks like one."""

    def step(self) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


Schedulers: TypeAlias = Scheduler | Sequence[Scheduler]


@final
@dataclass(frozen=True)
class LevelUpdate:
    """How the variables of one level are updated from their gradient.

    Attributes:
        optimizers: they step one after the other, each its own variables.
        schedulers: their schedulers, stepped once per upper step.
        max_norm: the gradient is scaled down to this norm where it is longer; `None` for never.
    """

    optimizers: Sequence[Optimizer] = ()
    schedulers: Sequence[Scheduler] = ()
    max_norm: float | None = None


def listed(one_or_more: T | Sequence[T]) -> list[T]:
    """What was given as one thing or as a sequence of them, as a list."""
    return list(one_or_more) if isinstance(one_or_more, Sequence) else [one_or_more]


def optimizers_of(name: str, given: Any) -> list[Optimizer]:
    """One optimizer or several as a list; none for `None`.

    Args:
        name: name of the argument.
        given: what was given.

    Raises:
        TypeError: for anything that is not a `torch.optim` optimizer.
    """
    if given is None:
        return []
    transformation = callable(getattr(given, "init", None)) and hasattr(given, "update")
    found: list[Any] = [given] if transformation else listed(given)
    for one in found:
        if isinstance(one, Optimizer):
            continue
        advice = f"for example `torch.optim.Adam(problem.{name.split('_')[0]}.parameters(), 1e-3)`"
        if transformation:
            advice = (
                "a torchopt transformation is for `Unrolled(num_steps, optimizer)`, "
                f"the loop needs {advice}"
            )
        raise TypeError(
            f"`{name}` must be a `torch.optim` optimizer or a list of them, got {shown(one)}; {advice}"
        )
    return found


def check_optimizers(problem: "Problem", level: "Level", optimizers: Sequence[Optimizer]) -> None:
    """Refuse optimizers that cannot update the variables of a level.

    Raises:
        TypeError: for one that evaluates the loss by itself.
        ValueError: for one that holds no variable of the level, or trained tensors from elsewhere.
    """
    mine = {id(p) for p in problem.variables(level).values()}
    seen: set[int] = set()
    for optimizer in optimizers:
        _check_step(level, optimizer)
        held = {id(p): p for group in optimizer.param_groups for p in group["params"]}
        if not held.keys() & mine:
            raise ValueError(
                f"`{level}_optimizer` holds none of the {level} variables; build it from "
                f"`problem.{level}.parameters()`"
            )
        _check_others(problem, level, [p for i, p in held.items() if i not in mine])
        if seen & held.keys() & mine:
            raise ValueError(f"two optimizers in `{level}_optimizer` hold the same variables")
        seen |= held.keys()
        for option in learned_options(optimizer, problem.parameters()):
            raise ValueError(
                f"`{option}` of `{level}_optimizer` is a tensor that is learned or belongs to the "
                "problem; `train` moves the lower variables by its value and no gradient would come "
                f"back through it. Give the number (`float({option})`), or enter the rate through "
                "the lower loss"
            )


def _check_step(level: str, optimizer: Optimizer) -> None:
    if isinstance(optimizer, torch.optim.SparseAdam):
        raise TypeError(
            f"`{level}_optimizer` is `SparseAdam`, which takes sparse gradients only; they are dense "
            "here, also of `nn.Embedding(sparse=True)`: use `Adam`"
        )
    needed = _required(type(optimizer).step)[1:]  # schedulers hide the bound one's signature
    if isinstance(optimizer, torch.optim.LBFGS) or needed:
        raise TypeError(
            f"`{level}_optimizer` is `{type(optimizer).__name__}`, which evaluates the loss by itself; "
            "use an optimizer that steps from gradients"
        )


def _check_others(problem: "Problem", level: "Level", others: Sequence[Tensor]) -> None:
    """Refuse variables of the other level, and tensors that are not (or no longer) in the problem."""
    names = {id(p): name for name, p in problem.named_parameters()}
    trained = [p for p in others if p.requires_grad]
    if not trained:
        return
    known = [f"`{names[id(p)]}`" for p in trained if id(p) in names][:3]
    first = f"{len(trained)} tensors (the first of shape {tuple(trained[0].shape)})"
    raise ValueError(
        f"`{level}_optimizer` also holds {', '.join(known) if known else first}, which the {level} "
        f"level does not; build it from `problem.{level}.parameters()`, after the last "
        "`copy.deepcopy` or replaced layer"
    )


def learned_options(optimizer: Optimizer, variables: Iterable[Tensor] = ()) -> Iterator[str]:
    """Names of the options (`lr`, `weight_decay`, ...) that are tensors to be learned.

    Args:
        optimizer: the optimizer.
        variables: tensors that are learned even where an option that shares their memory does not say
            so (`x.detach()`).
    """
    options = [
        (name, [t for t in optree.tree_leaves(value) if isinstance(t, Tensor)])
        for group in optimizer.param_groups
        for name, value in group.items()
        if name != "params"
    ]
    if not any(tensors for _, tensors in options):
        return  # tensors that stand for others have no memory to compare
    memory = {p.untyped_storage().data_ptr() for p in variables if p.layout is torch.strided}
    for name, tensors in options:
        if any(t.requires_grad or t.untyped_storage().data_ptr() in memory for t in tensors):
            yield name


def schedulers_of(name: str, given: Any, optimizers: Sequence[Optimizer]) -> list[Scheduler]:
    """One scheduler or several as a list; none for `None`.

    Args:
        name: name of the argument.
        given: what was given.
        optimizers: those of the level.

    Raises:
        TypeError: for anything that is not a scheduler, or whose step takes an argument.
        ValueError: for the scheduler of another optimizer, or one that is given twice.
    """
    found: list[Any] = [] if given is None else listed(given)
    for one in found:
        wanted = ("step", "state_dict", "load_state_dict")
        if isinstance(one, type) or not all(callable(getattr(one, part, None)) for part in wanted):
            raise TypeError(
                f"`{name}` must be a scheduler of `torch.optim.lr_scheduler` or a list of them, got "
                f"{shown(one)}"
            )
        if needed := _required(one.step):
            raise TypeError(
                f"`{name}` is `{type(one).__name__}`, whose `step` needs `{needed[0]}`; leave it out "
                "and step it in the loop, after each `Step`"
            )
        inner = getattr(one, "optimizer", None)
        if isinstance(inner, Optimizer) and all(inner is not optimizer for optimizer in optimizers):
            raise ValueError(
                f"`{name}` is the scheduler of another optimizer than "
                f"`{name.replace('scheduler', 'optimizer')}`; make it from that one"
            )
    if len({id(one) for one in found}) < len(found):
        raise ValueError(f"`{name}` holds the same scheduler twice")
    return found


def _required(function: Callable[..., Any]) -> list[str]:
    """The arguments that a function cannot be called without."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # written in C, or otherwise without a signature
        return []
    positional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in parameters if p.default is p.empty and p.kind not in positional]


_MACHINE = ("params", "foreach", "fused", "capturable", "differentiable")  # where and how, not what
_COUNTERS = ("last_epoch", "T_cur", "T_i")


def settings_of(updates: Mapping["Level", LevelUpdate]) -> dict[str, str]:
    """The settings of optimizers and schedulers as they are given to a run, by name.

    A checkpoint overwrites them: one that was changed before resuming would be ignored.
    """
    settings: dict[str, str] = {}
    for level, update in updates.items():
        for i, optimizer in enumerate(update.optimizers):
            for j, group in enumerate(optimizer.param_groups):
                here = f"{level}_optimizer" + (f"[{i}]" if i else "") + (f" group {j}" if j else "")
                moved: tuple[str, ...] = (
                    ("lr",) if "initial_lr" in group else ()
                )  # by a scheduler, as what follows
                moved += ("momentum", "betas") if "max_momentum" in group else ()
                kept = {n: v for n, v in group.items() if n not in (*_MACHINE, *moved)}
                settings |= {f"{here}.{name}": _plain(value) for name, value in kept.items()}
    for level, update in updates.items():
        for i, scheduler in enumerate(update.schedulers):
            here = f"{level}_scheduler" + (f"[{i}]" if i else "")
            kept = _fixed(scheduler.state_dict())
            settings |= {f"{here}.{name}": _plain(value) for name, value in kept.items()}
    return settings


def _fixed(state: dict[str, Any]) -> dict[str, Any]:
    """The part of a scheduler's state that no step changes, with that of the schedulers inside it."""
    fixed = {n: v for n, v in state.items() if n[0] != "_" and n not in _COUNTERS}
    parts = state.get("_schedulers", [])
    return fixed | {f"parts.{i}": _fixed(part) for i, part in enumerate(parts)}


def _plain(value: Any) -> str:
    """A setting in words that are the same in every process: without number types and addresses."""
    leaves, structure = optree.tree_flatten(value)
    numbers = [v.tolist() if isinstance(v, (Tensor, np.generic, np.ndarray)) else v for v in leaves]
    return re.sub(r" at 0x[0-9a-f]+", "", str(optree.tree_unflatten(structure, numbers)))

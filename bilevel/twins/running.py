"""The differentiable twin of running `torch.optim` optimizers, state included.

The rules (`bilevel.twins.rules`) follow torch's own conventions to the last digit. Parameters that share
a group (and have taken the same number of steps) are one vector here, so a step costs a dozen kernels
however many tensors the level has.
"""

import copy
from collections import Counter
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from bilevel.optimizers import Optimizers, listed
from bilevel.tree import Layout, Tree
from bilevel.twins.base import Gradients, Twin, moved
from bilevel.twins.rules import FIRST, RULES, Moments, Rule

_MOVING = frozenset({"lr", "momentum", "weight_decay", "betas", "alpha", "lr_decay"})
LEARNED = ("lr", "momentum", "weight_decay")
_FIXED = (
    "eps",
    "dampening",
    "nesterov",
    "amsgrad",
    "centered",
    "maximize",
    "decoupled_weight_decay",
    "initial_accumulator_value",
)


@final
@dataclass(frozen=True)
class _Cell:
    """Variables that one rule moves together as one vector."""

    names: list[str]
    members: list[Tensor]
    optimizer: Optimizer
    layout: Layout
    settings: dict[str, Any]
    rule: Rule
    state: Moments


@final
class RunningTwin(Twin):
    """Branches from the current state of running optimizers; they are read, never stepped.

    Args:
        optimizers: the lower level's optimizer(s): `SGD`, `Adam`, `AdamW`, `RMSprop` or `Adagrad`, any
            parameter groups.
        variables: the lower level's module parameters by name.
        tree: the point at which to branch.
        used: names of the variables the lower loss uses; torch skips the others.
        upper: the upper level's module parameters by name; one that is a setting is learned.

    Raises:
        TypeError: for an optimizer without a twin.
        ValueError: if the optimizers move none of the variables, or one of them twice.
    """

    def __init__(
        self,
        optimizers: Optimizers,
        variables: Tree,
        tree: Tree,
        used: set[str],
        upper: Tree | None = None,
    ) -> None:
        names = {id(p): name for name, p in variables.items()}
        self._tree = {name: value.detach() for name, value in tree.items()}
        self._cells: list[_Cell] = []
        for optimizer in listed(optimizers):
            rule = rule_of(optimizer)
            for group in optimizer.param_groups:
                members = [p for p in group["params"] if names.get(id(p)) in used]
                for same_step in _by_step(members, optimizer):
                    self._cells.append(_cell(same_step, names, group, rule, optimizer))
        _check_moves([name for cell in self._cells for name in cell.names])
        mine = {id(p): name for name, p in (upper or {}).items()}
        self._learned = [
            {o: mine[id(v)] for o, v in cell.settings.items() if o in LEARNED and id(v) in mine}
            for cell in self._cells
        ]

    def pack(self, tree: Tree) -> list[Tensor]:
        return [cell.layout.ravel([tree[name] for name in cell.names]) for cell in self._cells]

    def unpack(self, points: list[Tensor]) -> Tree:
        tree = dict(self._tree)
        for cell, vector in zip(self._cells, points, strict=True):
            tree.update(zip(cell.names, cell.layout.unravel(vector), strict=True))
        return tree

    def moves(self) -> list[str]:
        return [name for cell in self._cells for name in cell.names]

    def start(self, points: list[Tensor]) -> list[Moments]:
        return [dict(cell.state) for cell in self._cells]

    def whole(self, points: list[Tensor]) -> list[Moments] | None:
        cells = zip(self._cells, points, strict=True)
        states = [FIRST[cell.rule](y, cell.state, cell.settings) for cell, y in cells]
        found = [state for state in states if state is not None]
        return found if len(found) == len(states) else None

    def held(self) -> Any:
        moved = {name for cell in self._cells for name in cell.names}
        still = {name: value for name, value in self._tree.items() if name not in moved}
        return still, [
            {k: cell.settings[k] for k in _MOVING & cell.settings.keys()} for cell in self._cells
        ]

    def holding(self, held: Any) -> "RunningTwin":
        other = copy.copy(self)
        other._tree, numbers = held
        other._cells = [
            replace(cell, settings={**cell.settings, **given})
            for cell, given in zip(self._cells, numbers, strict=True)
        ]
        return other

    def reading(self, upper: Tree) -> "RunningTwin":
        if not any(self._learned):
            return self
        other = copy.copy(self)
        other._cells = [
            replace(cell, settings={**cell.settings, **{o: upper[n] for o, n in learned.items()}})
            for cell, learned in zip(self._cells, self._learned, strict=True)
        ]
        return other

    def key(self) -> Hashable:
        return tuple(
            (tuple(cell.names), cell.rule, *(cell.settings.get(name) for name in _FIXED))
            for cell in self._cells
        )

    def step(
        self, points: list[Tensor], gradients: Gradients, state: list[Moments]
    ) -> tuple[list[Tensor], list[Moments]]:
        vectors = [
            cell.layout.ravel(moved(gradients, cell.names, "Unrolled")) for cell in self._cells
        ]
        moves = [
            cell.rule(y, g, s, cell.settings)
            for cell, y, g, s in zip(self._cells, points, vectors, state, strict=True)
        ]
        return [y for y, _ in moves], [s for _, s in moves]


def rule_of(optimizer: Optimizer) -> Rule:
    """The update rule of an optimizer.

    Raises:
        TypeError: if there is none for its class.
    """
    rule = RULES.get(type(optimizer))
    if rule is None:
        raise TypeError(
            f"there is no differentiable twin of `{type(optimizer).__name__}`; use "
            "`torch.optim.SGD`, `Adam`, `AdamW`, `RMSprop` or `Adagrad` for the lower level, or unroll "
            "a torchopt transformation: `Unrolled(num_steps, optimizer=torchopt.radam(...))`"
        )
    return rule


def _check_moves(names: list[str]) -> None:
    if not names:
        raise ValueError(
            "the lower optimizer moves none of the variables that the lower loss uses; build it "
            "from `problem.lower.parameters()`"
        )
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(
            f"two lower optimizers move `{twice[0]}`; leave it to one of them, the differentiable "
            "twin cannot step it twice with one gradient"
        )


def _by_step(members: list[Tensor], optimizer: Optimizer) -> list[list[Tensor]]:
    """Group parameters of one dtype that have taken the same number of steps.

    A parameter that was frozen for a while lags behind.
    """
    groups: dict[tuple[float, bool, torch.dtype], list[Tensor]] = {}
    for p in members:
        step = optimizer.state.get(p, {}).get("step")
        momentum = optimizer.state.get(p, {}).get("momentum_buffer") is not None
        count = float(momentum) if step is None else float(step)
        groups.setdefault((count, step is None, p.dtype), []).append(p)
    return list(groups.values())


def _cell(
    members: list[Tensor],
    names: dict[int, str],
    group: dict[str, Any],
    rule: Rule,
    optimizer: Optimizer,
) -> _Cell:
    layout = Layout(members)
    stored = [optimizer.state.get(p, {}) for p in members]
    state: Moments = {}
    for key, value in stored[0].items():
        if key == "step":
            state[key] = float(value)
        elif value is not None:
            state[key] = layout.ravel([s[key].detach() for s in stored]).clone()
    settings = _settings(group, optimizer)
    named = [names[id(p)] for p in members]
    return _Cell(named, members, optimizer, layout, settings, rule, state)


def learns(optimizer: Optimizer, upper: Tree) -> list[str]:
    """The settings that are upper variables themselves, which the twin can differentiate."""
    mine = {id(p) for p in upper.values()}
    settings = [item for group in optimizer.param_groups for item in group.items()]
    return [name for name, value in settings if name in LEARNED and id(value) in mine]


def move(optimizers: Optimizers, variables: Tree, gradients: Mapping[str, Tensor | None]) -> None:
    """A step of the optimizers by their rules, written where they keep things: what a graph can hold.

    Args:
        optimizers: optimizers that keep a state of every parameter already.
        variables: a level's module parameters by name.
        gradients: their gradients.
    """
    names = {id(p): name for name, p in variables.items()}
    for optimizer in listed(optimizers):
        for group in optimizer.param_groups:
            settings = _settings(group, optimizer)
            for p in group["params"]:
                g = gradients.get(names.get(id(p), ""))
                if g is not None:
                    kept = {k: v for k, v in optimizer.state[p].items() if v is not None}
                    y, state = rule_of(optimizer)(p.detach(), g, kept, settings)
                    for key, value in state.items():
                        kept[key].copy_(value)
                    p.detach().copy_(y)


def _settings(group: dict[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    settings = {key: value for key, value in group.items() if key != "params"}
    if isinstance(optimizer, AdamW):
        settings["decoupled_weight_decay"] = True
    return settings

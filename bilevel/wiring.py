"""`Wiring`: where the modules of a problem hold its variables and buffers, found by one walk."""

import torch
from torch import Tensor, nn

from bilevel.problem import Level, Problem
from bilevel.tree import Tree


class Wiring:
    """The places of a problem's tensors.

    Walking the modules costs as much as a small network's forward pass, so `train` walks once. Which
    variables require grad is read anew each time; modules and parameters must stay the same objects.

    Attributes:
        slots: for each parameter (by identity) the full names under which modules hold it.
        recurrent: the recurrent layers, which keep a list of their weights.
    """

    def __init__(self, problem: Problem) -> None:
        self.slots: dict[int, list[str]] = {}
        self.recurrent: list[nn.RNNBase] = []
        self._buffers: list[tuple[str, nn.Module, str]] = []
        for path, module in problem.named_modules():
            prefix = f"{path}." if path else ""
            for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
                self.slots.setdefault(id(parameter), []).append(prefix + name)
            for name, _ in module.named_buffers(recurse=False, remove_duplicate=False):
                self._buffers.append((prefix + name, module, name))
            if isinstance(module, nn.RNNBase):
                self.recurrent.append(module)
        self._levels: dict[Level, list[tuple[str, nn.Parameter]]] = {
            "upper": list(problem.upper.named_parameters()),
            "lower": list(problem.lower.named_parameters()),
        }

    def variables(self, level: Level) -> Tree:
        """`problem.variables(level)`."""
        return {name: p for name, p in self._levels[level] if p.requires_grad}

    def buffers(self) -> Tree:
        """The buffers by full name; a tied one under each of its names."""
        return {full: getattr(module, name) for full, module, name in self._buffers}

    def commit(self, buffers: Tree) -> None:
        """Write buffers that an evaluation advanced on copies back into the modules."""
        mine = self.buffers()
        with torch.no_grad():
            for name, value in buffers.items():
                mine[name].copy_(value)

    def fill(self, values: dict[str, Tensor], variables: Tree, tree: Tree) -> None:
        """Put the tensors of `tree` at every place where `variables` are held."""
        for name, parameter in variables.items():
            for slot in self.slots[id(parameter)]:
                values[slot] = tree[name]

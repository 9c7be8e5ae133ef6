"""`Slots`: where the modules of a problem hold its variables and buffers, found by one walk."""

from typing import final

import torch
from torch import Tensor, nn

from bilevel.losses.substitution import Slot, Substitution
from bilevel.problem import Level, Problem
from bilevel.tree import Tree


@final
class Slots:
    """The places in which a problem's modules hold their tensors.

    Walking the modules costs as much as a small network's forward pass, so `train` walks once. Which
    variables require grad is read each time; modules and parameters must stay the same objects.
    """

    def __init__(self, problem: Problem) -> None:
        self._parameters: dict[int, list[Slot]] = {}  # by the parameter's identity
        self._recurrent: list[nn.RNNBase] = []
        self._buffers: dict[str, Slot] = {}
        for path, module in problem.named_modules():
            prefix = f"{path}." if path else ""
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    self._parameters.setdefault(id(parameter), []).append(
                        (module._parameters, name)
                    )
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    self._buffers[prefix + name] = (module._buffers, name)
            if isinstance(module, nn.RNNBase):
                self._recurrent.append(module)
        self._buffer_slots = list(self._buffers.values())
        self._levels: dict[Level, list[tuple[str, nn.Parameter]]] = {
            "upper": list(problem.upper.named_parameters()),
            "lower": list(problem.lower.named_parameters()),
        }

    def variables(self, level: Level) -> Tree:
        """`problem.variables(level)`."""
        return {name: p for name, p in self._levels[level] if p.requires_grad}

    def buffers(self) -> Tree:
        """The buffers by full name; a tied one under each of its names."""
        return {full: store[name] for full, (store, name) in self._buffers.items()}

    def commit(self, buffers: Tree) -> None:
        """Write buffers that an evaluation advanced on copies back into the modules."""
        mine = self.buffers()
        with torch.no_grad():
            for name, value in buffers.items():
                mine[name].copy_(value)

    def substitute(self, *pairs: tuple[Tree, Tree]) -> Substitution:
        """The tensors of the second tree at every place where those of the first are held.

        What does not require grad is put there as a leaf that does: a loss must not see a difference
        between the variables of an evaluation and the module's parameters, which do require grad.
        """
        slots: list[Slot] = []
        values: list[Tensor] = []
        for parameters, tree in pairs:
            for name, parameter in parameters.items():
                value = tree[name]
                if not (value.requires_grad or torch._C._functorch.is_batchedtensor(value)):
                    value = value.detach().requires_grad_()
                places = self._parameters[id(parameter)]
                slots += places
                values += [value] * len(places)
        return Substitution(slots, values, self._buffer_slots, self._recurrent)

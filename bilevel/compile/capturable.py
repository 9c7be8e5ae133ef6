"""`Capturable`: torch's own optimizers in the form in which a CUDA graph can hold their steps.

A graph replays kernels with the numbers they were launched with; what moves must lie in tensors on the
device. torch's optimizers have forms for that, which are not the usual ones:

- Adam and AdamW must be `capturable`: they count their steps on the device;
- the learning rate is a tensor. SGD in one kernel per group (`fused`) reads it there, and so do both
  Adams; the usual form of SGD would take the number out of it, which a capture forbids. Fused kernels
  want it in float32;
- that is not exact enough for variables in float64: there Adam takes the form of several kernels
  (`foreach`), and SGD the one kernel by kernel, in which a rate that requires grad stays a tensor.
  Optimizers that are fused already stay so.

The user's optimizers are put into that form while a step is recorded, and only then. Betas, momenta and
weight decays are numbers in these kernels: where one of them moves, a step must be recorded anew.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, final

import torch
from torch import Tensor
from torch.optim import Optimizer

from bilevel.compile.settings import begin

_NUMBERS = ("momentum", "weight_decay", "betas", "eps", "dampening")
_SWITCHES = ("nesterov", "amsgrad", "maximize", "decoupled_weight_decay", "differentiable")
_FORM = ("lr", "capturable", "foreach", "fused")


@final
class Capturable:
    """Optimizers whose steps a CUDA graph holds: learning rates that may move, and the rest.

    Args:
        optimizers: those of both levels; their groups are looked up each time, because
            `load_state_dict` replaces them.
        device: where the rates are kept.

    Attributes:
        tensors: the learning rates, one for each group.
    """

    def __init__(self, optimizers: Sequence[Optimizer], device: torch.device) -> None:
        self._optimizers = optimizers
        self._device = device
        self._current: list[float | None] = []
        self.tensors: list[Tensor] = []

    def _groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self._optimizers for group in optimizer.param_groups]

    def fixed(self) -> Any:
        """What a recorded step takes for granted of the optimizers: hashable.

        Raises:
            TypeError: if another option than the learning rate is a tensor.
        """
        return tuple(
            (
                id(vars(optimizer).get("step")),
                *(
                    (
                        *map(id, group["params"]),
                        *(_number(optimizer, name, group.get(name)) for name in _NUMBERS),
                        *(group.get(name) for name in _SWITCHES),
                    )
                    for group in optimizer.param_groups
                ),
            )
            for optimizer in self._optimizers
        )

    def follow(self) -> None:
        """Give the graphs the learning rates as they are now."""
        groups = self._groups()
        dtypes = [torch.double if _exact(group) else torch.float for group in groups]
        if [t.dtype for t in self.tensors] != dtypes:
            self.tensors = [torch.zeros((), dtype=d, device=self._device) for d in dtypes]
            self._current = [None] * len(groups)
        for i, group in enumerate(groups):
            rate = group["lr"]
            if isinstance(rate, Tensor) and rate.device.type != "cpu":
                self.tensors[i].copy_(rate)  # comparing would wait for the device
            elif (value := float(rate)) != self._current[i]:
                self.tensors[i].fill_(value)
                self._current[i] = value

    def begin(self) -> None:
        """Give every parameter the state of its first step, where the kernels look for it.

        Raises:
            TypeError: for an optimizer that has no such form.
        """
        for optimizer in self._optimizers:
            begin(optimizer)
            for group in optimizer.param_groups:
                dtype = torch.double if _exact(group) else torch.float
                for p in group["params"]:
                    state = optimizer.state[p]
                    if "step" in state:
                        state["step"] = state["step"].to(dtype)

    @contextlib.contextmanager
    def as_tensors(self) -> Iterator[None]:
        """Let the optimizers take the form that a graph can hold."""
        groups = self._groups()
        before = [{name: group[name] for name in _FORM if name in group} for group in groups]
        for group, rate in zip(groups, self.tensors, strict=True):
            exact = _exact(group)
            adam = "capturable" in group
            group.update(lr=rate, foreach=exact and adam, fused=not exact)
            if adam:
                group["capturable"] = True
            elif exact:
                group["lr"] = rate.detach().requires_grad_()  # torch leaves it a tensor then
        try:
            yield
        finally:
            for group, form in zip(groups, before, strict=True):
                group.update(form)


def _exact(group: dict[str, Any]) -> bool:
    """Whether a group's variables are in float64, and its own form is not the fused one.

    A fused optimizer counts its steps in float32, between recorded steps, too.
    """
    return not group.get("fused") and any(p.dtype == torch.double for p in group["params"])


def _number(optimizer: Optimizer, name: str, value: Any) -> Any:
    parts = value if isinstance(value, tuple) else (value,)
    if any(isinstance(part, Tensor) for part in parts):
        raise TypeError(
            f"`{name}` of `{type(optimizer).__name__}` is a tensor, which a recorded step cannot "
            'follow; give the number, or choose `compile="inductor"`'
        )
    return value

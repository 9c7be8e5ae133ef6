"""`Settings`: the optimizers' numbers, as a graph reads them.

Learning rates, momenta and weight decays move while a run goes on (`OneCycleLR` moves three of them),
so a graph reads them as tensors, which are filled again when a number changes. Whether one of them
is 0 decides which operations a step has, and so do the optimizers' other settings: a graph is made
for one choice of these.
"""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

_MOVING = ("lr", "momentum", "weight_decay", "betas")
_OPTIONAL = _MOVING[1:]  # at 0 a step leaves them out; a rate may pass through 0
_FIXED = ("eps", "dampening", "nesterov", "amsgrad", "maximize", "decoupled_weight_decay")


@final
class Settings:
    """The settings of optimizers: numbers that may move, and the rest.

    Args:
        optimizers: the optimizers of both levels; their groups are looked up each time, because
            `load_state_dict` replaces them.
        device: where the numbers are kept; a CUDA graph would freeze a number that lies elsewhere.
    """

    def __init__(self, optimizers: Sequence[Optimizer], device: torch.device) -> None:
        self._optimizers = optimizers
        self._device = device
        self._current: list[Any] = []
        self.tensors: list[Tensor] = []

    def fixed(self) -> Any:
        """What decides which operations a step has: hashable."""
        return tuple(
            (
                id(vars(optimizer).get("step")),
                *(
                    (
                        *map(id, group["params"]),
                        *(isinstance(n, Tensor) or bool(n) for n in _numbers(group, _OPTIONAL)),
                        *(group.get(name) for name in _FIXED),
                    )
                    for group in optimizer.param_groups
                ),
            )
            for optimizer in self._optimizers
        )

    def follow(self) -> None:
        """Give the graphs the numbers as they are now."""
        numbers = [
            n for o in self._optimizers for g in o.param_groups for n in _numbers(g, _MOVING)
        ]
        if len(numbers) != len(self.tensors):
            self.tensors = [
                torch.zeros((), dtype=torch.double, device=self._device) for _ in numbers
            ]
            self._current = [None] * len(numbers)
        for i, number in enumerate(numbers):
            if isinstance(number, Tensor) and number.device.type != "cpu":
                self.tensors[i].copy_(number)  # comparing would wait for the device
            elif (value := float(number)) != self._current[i]:
                self.tensors[i].fill_(value)
                self._current[i] = value

    def begin(self) -> None:
        """Give every parameter the state that its optimizer would give it at its first step."""
        for optimizer in self._optimizers:
            begin(optimizer)

    @contextlib.contextmanager
    def as_tensors(self) -> Iterator[None]:
        """Let the optimizers' groups hold the tensors, except for options that are 0."""
        groups = [group for o in self._optimizers for group in o.param_groups]
        before = [{name: g[name] for name in _MOVING if name in g} for g in groups]
        tensors = iter(self.tensors)
        for group in groups:
            for name in _MOVING:
                if name == "betas" and name in group:
                    group[name] = tuple(_live(beta, next(tensors)) for beta in group[name])
                elif name in group:
                    tensor = next(tensors)
                    group[name] = tensor if name == "lr" else _live(group[name], tensor)
        try:
            yield
        finally:
            for group, settings in zip(groups, before, strict=True):
                group.update(settings)


def _numbers(group: dict[str, Any], names: Sequence[str]) -> list[Any]:
    found: list[Any] = []
    for name in names:
        if name in group:
            found += group[name] if name == "betas" else [group[name]]
    return found


def _live(number: Any, tensor: Tensor) -> Any:
    return tensor if isinstance(number, Tensor) or number else number


@contextlib.contextmanager
def as_before(optimizers: Sequence[Optimizer]) -> Iterator[None]:
    """Where what is inside fails, the optimizers get back the state that they had."""
    before = [{p: dict(state) for p, state in o.state.items()} for o in optimizers]
    try:
        yield
    except BaseException:
        for optimizer, states in zip(optimizers, before, strict=True):
            optimizer.state.clear()
            optimizer.state.update(states)
        raise


def begin(optimizer: Optimizer) -> None:
    """Give every parameter the state that the optimizer would give it at its first step.

    Raises:
        TypeError: for an optimizer whose first step differs from the others, or whose steps no graph
            can take.
    """
    _refuse_own_step(optimizer)
    vars(optimizer)["_opt_called"] = True  # or schedulers believe that it never steps
    for group in optimizer.param_groups:
        if group.get("dampening") and group["momentum"]:
            raise TypeError("`SGD` with dampening begins with a step of another kind")
        for p in group["params"]:
            state = optimizer.state[p]
            if isinstance(optimizer, SGD):
                if group["momentum"] and state.get("momentum_buffer") is None:
                    state["momentum_buffer"] = torch.zeros_like(p)
            else:
                names = ["exp_avg", "exp_avg_sq", *["max_exp_avg_sq"] * group["amsgrad"]]
                count = state.setdefault("step", torch.zeros((), device=p.device))
                state["step"] = torch.as_tensor(count).to(p.device)  # a CUDA graph counts there
                for name in names:
                    state.setdefault(name, torch.zeros_like(p))


def _refuse_own_step(optimizer: Optimizer) -> None:
    name = type(optimizer).__name__
    if type(optimizer) not in (SGD, Adam, AdamW):
        raise TypeError(
            f"`{name}` has no twin that a graph could hold; use `Adam`, `AdamW` or `SGD`"
        )
    step: Any = optimizer.step  # schedulers and profilers wrap it
    while step is not None:
        if "torch" not in Path(step.__code__.co_filename).parts:
            raise TypeError(f"`{name}` has a `step` of its own, which a graph does not call")
        step = getattr(step, "__wrapped__", None)

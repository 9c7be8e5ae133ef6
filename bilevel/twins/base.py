"""`Twin`: a lower-level optimizer as a pure, differentiable function of variables and state."""

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import Tensor

from bilevel.compile import known
from bilevel.tree import Tree

Gradients = dict[str, Tensor | None]

NOT_LEARNED = (
    "no gradient would come back. Learn a setting by making the transformation of the upper variables, "
    '`Unrolled(num_steps, optimizer=lambda x: torchopt.sgd(x["log_lr"].exp()))`; or give a running '
    "optimizer the upper variable itself as `lr`, `momentum` or `weight_decay`; or give a number "
    "(`float(...)`)"
)


class Twin(ABC):
    """An optimizer step `(points, gradients, state) -> (points, state)` that writes nothing.

    The variables travel as `points`, a list of tensors of the twin's own making (for example one
    vector per parameter group); `pack` and `unpack` are permutations, each the transpose of the other.
    """

    @abstractmethod
    def pack(self, tree: Tree) -> list[Tensor]:
        """The variables as points."""

    @abstractmethod
    def unpack(self, points: list[Tensor]) -> Tree:
        """The points as variables; those that the optimizer does not move are constants."""

    @abstractmethod
    def moves(self) -> list[str]:
        """The names of the variables that the optimizer moves, all that the points hold."""

    @abstractmethod
    def start(self, points: list[Tensor]) -> Any:
        """The state before the first step: a pytree of tensors and numbers."""

    @abstractmethod
    def whole(self, points: list[Tensor]) -> Any:
        """The state before the first step with all that later ones have: zeros make the same step.

        `None` if the first step differs from all others.
        """

    @abstractmethod
    def held(self) -> Any:
        """What a step reads besides its arguments: a pytree of tensors and numbers."""

    @abstractmethod
    def holding(self, held: Any) -> "Twin":
        """The same optimizer that reads these instead."""

    @abstractmethod
    def reading(self, upper: Tree) -> "Twin":
        """The same optimizer, with the settings that are upper variables as they are there."""

    @abstractmethod
    def key(self) -> Hashable:
        """What else a step depends on."""

    @abstractmethod
    def step(
        self, points: list[Tensor], gradients: Gradients, state: Any
    ) -> tuple[list[Tensor], Any]:
        """One step; differentiable in points, gradients and state."""


def safe_sqrt(v: Tensor) -> Tensor:
    """Square root with derivative 0 at 0, so that a second moment of exactly 0 gives no NaN.

    With v = 0 the first moment m is 0 too, and the true derivative of m / (sqrt(v) + eps) there is
    dm / eps: the root's own derivative multiplies m = 0 and drops out.
    """
    if known(v.all):
        return v.sqrt()
    zero = v == 0
    return v.masked_fill(zero, 1).sqrt().masked_fill(zero, 0)


def clip(gradients: Mapping[str, Tensor | None], max_norm: float) -> Gradients:
    """Scale the gradients so that their joint norm is at most `max_norm`.

    The formula of `torch.nn.utils.clip_grad_norm_`, with the derivative of the factor.
    """
    squares = (g.square().sum() for g in gradients.values() if g is not None)
    factor = (max_norm / (safe_sqrt(sum(squares, torch.zeros(()))) + 1e-6)).clamp(max=1.0)
    return {n: None if g is None else g * factor.to(g.dtype) for n, g in gradients.items()}


def moved(gradients: Gradients, names: list[str], who: str) -> list[Tensor]:
    """The gradients of `names` in order; all must be there.

    Raises:
        ValueError: if the lower loss does not use one of them in this step.
    """
    grads = [gradients[name] for name in names]
    missing = [name for name, g in zip(names, grads, strict=True) if g is None]
    if missing:
        raise ValueError(
            f"`{who}`: the lower loss used `{missing[0]}` in the first unrolled step but not in a "
            "later one; make the loss use the same variables in every step"
        )
    return [g for g in grads if g is not None]

r"""`Constraint`: a part of the lower level that has corners - a set to stay in, or a penalty.

The lower level is then $\min_y G(x, y) + R(x, y)$ with a smooth $G$ and an $R$ that is given by its
proximal map,

$$ \operatorname{prox}_s(u) = \arg\min_z \tfrac{1}{2s} \|z - u\|^2 + R(x, z) , $$

the projection where $R$ is the indicator of a set. Every map here is piecewise affine,
$\operatorname{prox}_s(u) = D u + k(x)$ with an orthogonal projector $D$ onto the directions in which the
answer can move: what `bilevel.lower_field` makes of it is exact only for such maps.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor

from bilevel.refusals import shown

Number: TypeAlias = Tensor | float


class Constraint(ABC):
    """Abstract base of the constraints on one lower variable; each is a frozen record.

    What a record holds may be a tensor that depends on upper variables: derivatives go through it.

    Attributes:
        bounds: whether it is a set to stay in, and no penalty.
    """

    bounds: ClassVar[bool] = True

    @abstractmethod
    def prox(self, point: Tensor, step: float) -> Tensor:
        """The proximal map, differentiable in the point and in what the record holds.

        Args:
            point: where to apply it, in the shape of the variable.
            step: how far a penalty pulls; a projection does not depend on it.
        """

    @abstractmethod
    def tangent(self, point: Tensor, step: float) -> Callable[[Tensor], Tensor]:
        """The derivative of `prox` at a point: an orthogonal projector v -> D v."""

    @abstractmethod
    def margin(self, point: Tensor, step: float) -> Tensor:
        """The distance of a point to the nearest kink of `prox`, a scalar."""

    @abstractmethod
    def violation(self, point: Tensor) -> Tensor:
        """By how much a point lies outside of the set, a scalar; 0 for a penalty."""


def refuse_no_number(name: str, value: Any) -> None:
    """Refuse what is neither a number nor a real tensor.

    Raises:
        TypeError: naming the argument.
    """
    tensor = isinstance(value, Tensor) and value.is_floating_point()
    plain = isinstance(value, (int, float)) and not isinstance(value, bool) and value == value
    if not tensor and not plain:
        raise TypeError(
            f"`{name}` must be a number or a tensor of floating point, got {shown(value)}"
        )


def as_like(value: Number, point: Tensor) -> Tensor:
    """A number or a tensor in the dtype and on the device of a variable."""
    return torch.as_tensor(value, dtype=point.dtype, device=point.device)


def largest(*amounts: Tensor) -> Tensor:
    """The largest entry of all, at least 0."""
    return torch.stack([a.amax() for a in amounts if a.numel()]).amax().clamp_min(0)

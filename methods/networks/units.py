r"""Layers next to the visibles, rewritten where these change units: $v = m + d \odot z$ by columns.

A layer that takes z is one that takes v with $W' = W / d$ and $b' = b - W (m / d)$; a layer that gives z
gives v with $W' = d \odot W$, $b' = m + d \odot b$, and log-variances that grow by $2 \log d$. All in
double precision on the way.
"""

from collections.abc import Callable
from typing import Protocol, TypeAlias, cast, runtime_checkable

from torch import Tensor, nn
from torch.nn.utils import parametrize

Change: TypeAlias = Callable[[Tensor, Tensor], None]
"""From a part of a model of z to that of shift + scale z; both float64, shape (d,)."""


@runtime_checkable
class Rewritable(Protocol):
    """A part next to the visibles that can be rewritten."""

    def rewriting(self) -> Change | None:
        """How it is rewritten; `None` if that is not known."""
        ...


def input_change(layer: nn.Module) -> Change | None:
    """How a linear layer that takes the visibles is rewritten; `None` for any other layer."""
    if not _plain(layer):
        return None
    linear = cast(nn.Linear, layer)

    def change(shift: Tensor, scale: Tensor) -> None:
        weight = linear.weight.double()
        linear.bias.copy_(linear.bias.double() - weight @ (shift / scale))
        linear.weight.copy_(weight / scale)

    return change


def output_change(layer: nn.Module, *, moments: bool) -> Change | None:
    """How a linear layer that gives the visibles' means is rewritten; `None` for any other layer.

    Args:
        layer: the layer.
        moments: whether it gives their log-variances behind the means.
    """
    if not _plain(layer):
        return None
    linear = cast(nn.Linear, layer)

    def change(shift: Tensor, scale: Tensor) -> None:
        d = len(scale)
        weight, bias = linear.weight.double(), linear.bias.double()
        linear.weight[:d] = (scale[:, None] * weight[:d]).to(linear.weight)
        linear.bias[:d] = (shift + scale * bias[:d]).to(linear.bias)
        if moments:
            linear.bias[d:] = (bias[d:] + 2 * scale.log()).to(linear.bias)

    return change


def _plain(layer: nn.Module) -> bool:
    return (
        type(layer) is nn.Linear
        and layer.bias is not None
        and not parametrize.is_parametrized(layer)
        and not layer._forward_pre_hooks  # such as the older spectral norm
    )

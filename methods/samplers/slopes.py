"""Energies and their gradients in the variables they are functions of, as constants."""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

Energy: TypeAlias = Callable[[Tensor], Tensor]

_NUMBERS, _ROWS = 1 << 20, 2000  # whose graph is held at a time: numbers of visibles, and rows


def slopes(energy: Callable[..., Tensor], state: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The gradient of the summed energy in every variable, as constants."""
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in state]
        return torch.autograd.grad(energy(*leaves).sum(), leaves)


def energies_and_slopes(energy: Energy, v: Tensor) -> tuple[Tensor, Tensor]:
    """Energies and their gradients in v, of so many rows at a time that their graph is small.

    Args:
        energy: (n, ...) -> (n,), row by row.
        v: where, shape (n, ...).

    Returns:
        Energies, shape (n,), and gradients, shape of v, both as constants.

    Raises:
        ValueError: if the energy gives other shapes, or does not depend on v.
    """
    rows = max(1, min(_ROWS, _NUMBERS // max(1, v[0].numel())))
    parts = [_of_part(energy, part) for part in v.split(rows)]
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def _of_part(energy: Energy, v: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        leaf = v.detach().requires_grad_()
        energies = energy(leaf)
        if not isinstance(energies, Tensor) or energies.shape != (len(v),):
            got = tuple(energies.shape) if isinstance(energies, Tensor) else type(energies).__name__
            raise ValueError(
                f"an energy gives one number per row, shape (n,); got {got} for {len(v)} rows of shape "
                f"{tuple(v.shape[1:])}"
            )
        if not energies.requires_grad:
            raise ValueError(
                "the energy has no gradient in its input; compute it from the tensor that is passed, "
                "outside of `torch.no_grad()`; of a learner that is `model.energy_function`"
            )
        (slope,) = torch.autograd.grad(energies.sum(), leaf, materialize_grads=True)
        return energies.detach(), slope

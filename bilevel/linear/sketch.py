"""A symmetric matrix seen through a few random products: its Nystrom approximation."""

from typing import Literal, TypeAlias

import torch
from torch import Tensor

from bilevel.linear.base import Operator

Sketch: TypeAlias = Literal["gaussian", "columns"]


def eigenpairs(
    operator: Operator, like: Tensor, rank: int, sketch: Sketch, seed: int
) -> tuple[Tensor, Tensor]:
    """Orthonormal vectors (n, k) and values (k,) of `C W^+ C^T`, where `C = A Omega`, `W = Omega^T C`.

    Args:
        operator: v -> A v, symmetric.
        like: any vector it takes.
        rank: columns of Omega, each one product; n is enough.
        sketch: "gaussian" draws Omega, "columns" takes columns of the identity.
        seed: of the draw, which does not depend on the device.
    """
    n = like.numel()
    rank, random = min(rank, n), torch.Generator().manual_seed(seed)
    if sketch == "columns":
        drawn = torch.zeros(n, rank, dtype=like.dtype)
        drawn[torch.randperm(n, generator=random)[:rank], torch.arange(rank)] = 1
    else:
        drawn = torch.randn(n, rank, dtype=torch.float64, generator=random)
    omega, _ = torch.linalg.qr(drawn.to(like))
    whole = torch.stack([operator(column) for column in omega.mT.contiguous()], dim=1)
    if not bool(whole.isfinite().all()):
        return omega, torch.full_like(whole[0], torch.nan)
    core = omega.mT @ whole
    values, vectors = torch.linalg.eigh((core + core.mT) / 2)
    kept = values.abs() > 10 * torch.finfo(like.dtype).eps * values.abs().max()
    root = torch.where(kept, values.abs(), 1).sqrt()
    # B sign B^T with B = C Q |D|^(-1/2) costs half the digits that W^+ would
    half = whole @ (vectors * torch.where(kept, 1 / root, 0))
    basis, upper = torch.linalg.qr(half)
    values, vectors = torch.linalg.eigh((upper * values.sign()) @ upper.mT)
    return basis @ vectors, values

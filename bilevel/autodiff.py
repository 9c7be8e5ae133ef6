"""Vector-Jacobian products with the conventions of this library: unused is zero, NaN stays NaN."""

from collections.abc import Sequence

import torch
from torch import Tensor


def gradients(
    loss: Tensor, variables: Sequence[Tensor], *, create_graph: bool = False
) -> list[Tensor | None]:
    """The gradient of a scalar in each variable, `None` where it does not depend on it.

    Sparse gradients (of `nn.Embedding(sparse=True)`) come back dense: they are added, measured and
    differentiated like all others.
    """
    if not loss.requires_grad or not variables:
        return [None for _ in variables]
    grads = torch.autograd.grad(loss, variables, create_graph=create_graph, allow_unused=True)
    return _dense(grads)


def _dense(grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [g.to_dense() if g is not None and g.layout is not torch.strided else g for g in grads]


def vector_jacobian_product(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    *,
    retain_graph: bool = True,
) -> list[Tensor]:
    """`sum_i cotangent_i^T d output_i / d input` for every input; the graph is kept if it is asked.

    Outputs without a graph are constants; inputs that no output depends on get zeros.
    """
    if not all(o.requires_grad for o in outputs):
        pairs = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad]
        outputs, cotangents = [o for o, _ in pairs], [c for _, c in pairs]
    if not outputs or not inputs:
        return [torch.zeros_like(i) for i in inputs]
    grads = torch.autograd.grad(
        outputs, inputs, cotangents, allow_unused=True, retain_graph=retain_graph
    )
    return fill(_dense(grads), inputs)


def fill(grads: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor]:
    """The gradients, zeros where one is `None`."""
    return [
        torch.zeros_like(tensor) if g is None else g for g, tensor in zip(grads, like, strict=True)
    ]

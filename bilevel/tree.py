"""Trees: dictionaries of named tensors, and the same numbers as one long vector."""

from collections.abc import Iterable, Mapping, Sequence
from typing import final

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

Tree = dict[str, Tensor]


def norm(tensors: Tree | Iterable[Tensor]) -> Tensor:
    """Euclidean norm of all entries together, a scalar; zero for an empty tree."""
    leaves = list(tensors.values() if isinstance(tensors, Mapping) else tensors)
    if not leaves:
        return torch.zeros(())
    if any(t.device.type != "cpu" or t.dtype != leaves[0].dtype for t in leaves):
        return get_total_norm(leaves)
    with torch.no_grad():  # the same numbers on a processor, without looking for groups of tensors
        norms: list[Tensor] = [torch.linalg.vector_norm(t) for t in leaves]
        total: Tensor = torch.linalg.vector_norm(torch.stack(norms)) if norms[1:] else norms[0]
        return total


def leaves(tree: Tree) -> Tree:
    """The same numbers, as leaves that require grad."""
    return {name: tensor.detach().requires_grad_() for name, tensor in tree.items()}


def dot(a: Tree, b: Tree) -> Tensor:
    """Inner product of two trees with the same names."""
    _same_names(a, b)
    return torch.stack([(a[name] * b[name]).sum() for name in a]).sum()


def add(a: Tree, b: Tree, scale: float = 1.0) -> Tree:
    """The tree `a + scale * b`."""
    _same_names(a, b)
    return {name: torch.add(a[name], b[name], alpha=scale) for name in a}


def _same_names(a: Tree, b: Tree) -> None:
    if a.keys() != b.keys():
        odd = ", ".join(f"`{name}`" for name in sorted(a.keys() ^ b.keys()))
        raise ValueError(f"the two trees have different names: {odd} is in one of them only")


@final
class Layout:
    """How a list of tensors lies in one vector: `ravel` lays it out, `unravel` cuts it up again.

    Optimizer steps and linear solvers work on the vector (one kernel per operation instead of one
    per tensor), losses on the tensors. Both directions are differentiable. Tensors of different
    dtype share a vector of the promoted dtype; all must live on one device.

    Args:
        tensors: the tensors whose shapes and dtypes make the layout.

    Raises:
        ValueError: if the tensors live on more than one device.

    Example:
        >>> layout = Layout([torch.zeros(2, 3), torch.zeros(4)])
        >>> layout.ravel([torch.ones(2, 3), torch.zeros(4)]).sum()
        tensor(6.)
        >>> [tuple(t.shape) for t in layout.unravel(torch.arange(10.0))]
        [(2, 3), (4,)]
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        devices = {t.device for t in tensors}
        if len(devices) > 1:
            found = ", ".join(sorted(str(d) for d in devices))
            raise ValueError(
                f"the variables of one level live on several devices ({found}); "
                "move the level to one device"
            )
        self.shapes = [t.shape for t in tensors]
        self.dtypes = [t.dtype for t in tensors]
        self.sizes = [t.numel() for t in tensors]
        self._one_dtype = len(set(self.dtypes)) <= 1

    @property
    def size(self) -> int:
        """Length of the vector."""
        return sum(self.sizes)

    def ravel(self, tensors: Sequence[Tensor]) -> Tensor:
        """The tensors as one vector, shape (size,)."""
        # without a view where none is needed: it would be a node of the graph, too
        return torch.cat([t if t.ndim == 1 else t.reshape(-1) for t in tensors])

    def unravel(self, vector: Tensor) -> list[Tensor]:
        """The vector as tensors of the layout's shapes (views where the dtypes allow)."""
        pieces = torch.split_with_sizes(vector, self.sizes)
        parts = [part.view(shape) for part, shape in zip(pieces, self.shapes, strict=True)]
        if self._one_dtype:
            return parts
        return [part.to(dtype) for part, dtype in zip(parts, self.dtypes, strict=True)]

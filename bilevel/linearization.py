"""`Linearization`: the lower gradient at a point, and products with its derivatives."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from bilevel.autodiff import vector_jacobian_product
from bilevel.compile import Stage
from bilevel.distributed import mean_over_ranks
from bilevel.linear.blockwise import SideBySide
from bilevel.tree import Layout, Tree


@final
@dataclass(frozen=True)
class Linearization:
    """The lower gradient at a point and products with its derivatives (one graph, many products).

    Attributes:
        gradient: the lower gradient dG/dy as a vector, shape (n,).
        hessian: v -> (d2G/dy2)^T v on vectors of shape (n,). A vector-Jacobian product: right also
            where the operator is not symmetric. `hessian.matrix()` is the whole of it.
        cross: w -> w^T d2G/(dy dx), a tree over the upper variables.
        layout: how the lower variables lie in the vectors.
        residual: the norm of the gradient.
    """

    gradient: Tensor
    hessian: "Hessian | CompiledHessian"
    cross: Callable[[Tensor], Tree]
    layout: Layout
    residual: Tensor


@final
class Hessian:
    """The second derivative of the lower loss at a point: products with it, and all of it.

    Args:
        gradient: the lower gradient, with its graph.
        leaves: the lower variables.
        layout: how they lie in a vector.
        separate: number of independent problems side by side, which the first dimensions count.

    Attributes:
        at_once: products are numbers as soon as they are returned, and have no graph.
        blocks: the blocks of the matrix, if it is that of several problems.
    """

    at_once: ClassVar[bool] = True

    def __init__(
        self, gradient: list[Tensor], leaves: list[Tensor], layout: Layout, separate: int = 1
    ) -> None:
        self.blocks = SideBySide(separate, layout.sizes) if separate > 1 else None
        self._gradient = gradient
        self._leaves = leaves
        self._layout = layout

    def __call__(self, vector: Tensor) -> Tensor:
        """Product with a vector of shape (n,)."""
        return self._layout.ravel(self.product(vector, self._leaves))

    @property
    def transposed(self) -> "Hessian":
        """The transposed matrix: the second derivative of a loss is symmetric."""
        return self

    def product(self, vector: Tensor, wrt: list[Tensor]) -> list[Tensor]:
        """The vector times the derivative of the gradient in other variables, too."""
        cotangents = self._layout.unravel(vector)
        return mean_over_ranks(vector_jacobian_product(self._gradient, wrt, cotangents))

    def iterate(self, key: Hashable, step: Callable[..., Any]) -> Callable[..., Any]:
        """`step(product, *tensors) -> tensors`, to be called many times."""
        return partial(step, self)

    def matrix(self) -> Tensor:
        """The matrix, shape (n, n), its columns computed side by side.

        Raises:
            RuntimeError: if an operation of the loss has no batched derivative.
        """
        n = self._layout.size
        eye = torch.eye(n, dtype=self._gradient[0].dtype, device=self._gradient[0].device)
        parts = [
            p.view(n, *s)
            for p, s in zip(eye.split(self._layout.sizes, 1), self._layout.shapes, strict=True)
        ]
        pairs = [(g, c) for g, c in zip(self._gradient, parts, strict=True) if g.requires_grad]
        if not pairs:  # a linear loss
            return torch.zeros_like(eye)
        rows = torch.autograd.grad(
            [g for g, _ in pairs],
            self._leaves,
            [c.to(g.dtype) for g, c in pairs],
            retain_graph=True,
            allow_unused=True,
            is_grads_batched=True,
        )
        filled = [
            y.new_zeros(n, y.numel()) if r is None else r.reshape(n, -1)
            for r, y in zip(rows, self._leaves, strict=True)
        ]
        return mean_over_ranks([torch.cat(filled, dim=1)])[0].mT


@final
class CompiledHessian:
    """The same products by graphs; what does not depend on the vector has been computed.

    Args:
        stage: its rest takes a vector v of shape (n,) to the products with the second derivatives,
            (d2G/dy2)^T v and v^T d2G/(dy dx).
        gradient: the lower gradient, shape (n,).
    """

    def __init__(self, stage: Stage, gradient: Tensor) -> None:
        self._stage = stage
        self._like = gradient

    def __call__(self, vector: Tensor) -> Tensor:
        """Product with a vector of shape (n,)."""
        product: Tensor = self._stage(self._alike(vector))[0]
        return product

    @property
    def transposed(self) -> "CompiledHessian":
        """The transposed matrix: the second derivative of a loss is symmetric."""
        return self

    def cross(self, vector: Tensor) -> Tree:
        """The vector times the derivative of the gradient in the upper variables."""
        product: Tree = self._stage(self._alike(vector))[1]
        return product

    def iterate(self, key: Hashable, step: Callable[..., Any]) -> Callable[..., Any]:
        """`step(product, *tensors) -> tensors`, to be called many times."""
        return self._stage.then(key, _OfProduct(step))

    def matrix(self) -> Tensor:
        """The matrix, shape (n, n)."""
        eye = torch.eye(len(self._like), dtype=self._like.dtype, device=self._like.device)
        whole: Tensor = self.iterate("matrix", _columns)(eye)[0]
        return whole

    def _alike(self, vector: Tensor) -> Tensor:
        """A graph reads memory as it lies."""
        if vector.shape != self._like.shape or vector.device != self._like.device:
            raise ValueError(
                f"the operator takes vectors of shape {tuple(self._like.shape)} on "
                f"{self._like.device}, got {tuple(vector.shape)} on {vector.device}"
            )
        return vector.detach().to(self._like.dtype).contiguous()


@final
@dataclass(frozen=True)
class _OfProduct:
    """A step that is given the product with the Hessian alone."""

    step: Callable[..., Any]

    def __call__(self, rest: Callable[..., Any], *tensors: Tensor) -> Any:
        return self.step(_Product(rest), *tensors)


@final
class _Product:
    """Products with the Hessian, inside a graph."""

    def __init__(self, rest: Callable[..., Any]) -> None:
        self._rest = rest

    def __call__(self, vector: Tensor) -> Tensor:
        product: Tensor = self._rest(vector)[0]
        return product

    @property
    def transposed(self) -> "_Product":
        return self


def _columns(product: Callable[[Tensor], Tensor], eye: Tensor) -> list[Tensor]:
    return [torch.vmap(product, out_dims=1)(eye)]

"""`Linearization`: the lower gradient at a point, and products with its derivatives."""

import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, final

import torch
from torch import Tensor

from bilevel.autodiff import vector_jacobian_product
from bilevel.compile import Stage
from bilevel.distributed import mean_over_ranks
from bilevel.linear.blockwise import SideBySide
from bilevel.pieces import HessianInPieces, linearized, pieces_of
from bilevel.tree import Layout, Tree, norm

if TYPE_CHECKING:
    from bilevel.oracles import Oracles


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
    hessian: "Hessian | CompiledHessian | HessianInPieces"
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
        symmetric: whether it is the derivative of a gradient, as of a loss, and not of any field.

    Attributes:
        at_once: products are numbers as soon as they are returned, and have no graph.
        blocks: the blocks of the matrix, if it is that of several problems.
    """

    at_once: ClassVar[bool] = True

    def __init__(
        self,
        gradient: list[Tensor],
        leaves: list[Tensor],
        layout: Layout,
        separate: int = 1,
        *,
        symmetric: bool = True,
    ) -> None:
        self.blocks = SideBySide(separate, layout.sizes) if separate > 1 else None
        self._gradient = gradient
        self._leaves = leaves
        self._layout = layout
        self._symmetric = symmetric

    def __call__(self, vector: Tensor) -> Tensor:
        """Product with a vector of shape (n,)."""
        return self._layout.ravel(self.product(vector, self._leaves))

    @property
    def transposed(self) -> "Hessian | Jacobian":
        """The transposed matrix: the second derivative of a loss is symmetric."""
        return self if self._symmetric else self._jacobian

    @cached_property
    def _jacobian(self) -> "Jacobian":
        return Jacobian(self._gradient, self._leaves, self)

    @property
    def layout(self) -> Layout:
        """How the lower variables lie in a vector."""
        return self._layout

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
class Jacobian:
    """The derivative of a field itself: what a `Hessian` that is not symmetric is the transpose of.

    Its products are the derivative of the transposed products, which are linear in their vector.

    Args:
        field: the field, with its graph.
        leaves: the lower variables.
        transposed: the transposed products.
    """

    def __init__(self, field: list[Tensor], leaves: list[Tensor], transposed: Hessian) -> None:
        # a cycle would keep the graph until garbage is collected
        self._made_by = weakref.ref(transposed)
        self._field, self._leaves, self._layout = field, leaves, transposed.layout
        self._at = [torch.zeros_like(c).requires_grad_() for c in field]
        found = [(c, z) for c, z in zip(field, self._at, strict=True) if c.requires_grad]
        self._products = torch.autograd.grad(
            [c for c, _ in found],
            leaves,
            [z for _, z in found],
            create_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )

    def __call__(self, vector: Tensor) -> Tensor:
        """Product with a vector of shape (n,)."""
        cotangents = self._layout.unravel(vector)
        found = vector_jacobian_product(self._products, self._at, cotangents)
        return self._layout.ravel(mean_over_ranks(found))

    @property
    def transposed(self) -> Hessian:
        """The transposed products."""
        known = self._made_by()
        if known is not None:
            return known
        return Hessian(self._field, self._leaves, self._layout, symmetric=False)


@final
class CompiledHessian:
    """The same products by graphs; what does not depend on the vector has been computed.

    Args:
        stage: its rest takes a vector v of shape (n,) to the products with the second derivatives,
            (d2G/dy2)^T v and v^T d2G/(dy dx).
        gradient: the lower gradient, shape (n,).
        symmetric: whether it is the derivative of a gradient.
    """

    def __init__(self, stage: Stage, gradient: Tensor, *, symmetric: bool = True) -> None:
        self._stage = stage
        self._like = gradient
        self._symmetric = symmetric

    def __call__(self, vector: Tensor) -> Tensor:
        """Product with a vector of shape (n,)."""
        product: Tensor = self._stage(self._alike(vector))[0]
        return product

    @property
    def transposed(self) -> "CompiledHessian":
        """The transposed matrix, if it is symmetric; otherwise there is no such attribute."""
        return _if_symmetric(self, self._symmetric)

    def cross(self, vector: Tensor) -> Tree:
        """The vector times the derivative of the gradient in the upper variables."""
        product: Tree = self._stage(self._alike(vector))[1]
        return product

    def iterate(self, key: Hashable, step: Callable[..., Any]) -> Callable[..., Any]:
        """`step(product, *tensors) -> tensors`, to be called many times."""
        return self._stage.then(key, _OfProduct(step, self._symmetric))

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
    symmetric: bool

    def __call__(self, rest: Callable[..., Any], *tensors: Tensor) -> Any:
        return self.step(_Product(rest, self.symmetric), *tensors)


@final
class _Product:
    """Products with the Hessian, inside a graph."""

    def __init__(self, rest: Callable[..., Any], symmetric: bool) -> None:
        self._rest = rest
        self._symmetric = symmetric

    def __call__(self, vector: Tensor) -> Tensor:
        product: Tensor = self._rest(vector)[0]
        return product

    @property
    def transposed(self) -> "_Product":
        return _if_symmetric(self, self._symmetric)


T = TypeVar("T")


def _if_symmetric(operator: T, symmetric: bool) -> T:
    """The operator as its own transpose, if it is.

    Raises:
        AttributeError: if it is not; a graph of the transposed products would be another one.
    """
    if not symmetric:
        raise AttributeError("transposed")
    return operator


def _columns(product: Callable[[Tensor], Tensor], eye: Tensor) -> list[Tensor]:
    return [torch.vmap(product, out_dims=1)(eye)]


def linearize(oracles: "Oracles", upper: Tree, lower: Tree) -> Linearization:
    """The lower gradient at (upper, lower), its derivatives by one graph.

    With constraints, the field that has the same zeros and a symmetric derivative
    (`bilevel.lower_field`).
    """
    if any(map(pieces_of, oracles.lower_batches)):
        return Linearization(*linearized(oracles, upper, lower))
    points, sources = list(lower.values()), list(upper.values())
    layout = Layout(points)
    face = None
    if oracles.problem.constrains_lower:
        smooth = mean_over_ranks(oracles.mean_lower_gradient(upper, lower))
        smooth_at = dict(zip(lower, smooth, strict=True))
        face = oracles.constraints(upper, lower).face(lower, smooth_at)
    # this rank's own: products with its derivatives are averaged one by one
    at = lower if face is None else face.at
    gradient = oracles.mean_lower_gradient(upper, at, create_graph=True)
    gradient = gradient if face is None else face.complete(gradient)
    symmetric = not oracles.problem.gives_lower_condition
    hessian = Hessian(gradient, points, layout, oracles.problem.separate, symmetric=symmetric)
    whole = mean_over_ranks([layout.ravel(gradient).detach()])[0]
    return Linearization(
        gradient=whole,
        hessian=hessian,
        cross=lambda v: dict(zip(upper, hessian.product(v, sources), strict=True)),
        layout=layout,
        residual=norm([whole]),
    )


def refuse_asymmetric(linear: Linearization, solver: str, problem: str) -> None:
    """Refuse a linear solver for symmetric systems where this one is not symmetric.

    Args:
        linear: the lower level at a point; two products tell.
        solver: name of the linear solver.
        problem: name of the problem's class.

    Raises:
        ValueError: naming both, with what to use instead.
    """
    like = linear.gradient
    generator = torch.Generator(like.device).manual_seed(0)
    v, w = torch.randn(2, len(like), generator=generator, device=like.device, dtype=like.dtype)
    of_v, of_w = linear.hessian(v), linear.hessian(w)
    size = w.norm() * of_v.norm() + v.norm() * of_w.norm()
    if bool((w @ of_v - v @ of_w).abs() > torch.finfo(like.dtype).eps ** 0.5 * size):
        raise ValueError(
            f"`{solver}` solves symmetric systems, but the Jacobian of the lower condition of "
            f"`{problem}` is not symmetric; use `GMRES()`, or `Cholesky()` (by LU) where it is small"
        )

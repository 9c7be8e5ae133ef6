r"""What the single-loop solvers share: samples of the three systems they move along.

With $v$ for the solution of the linear system $\partial^2_{yy} G \, v = - \partial_y F$, a bilevel
problem is three equations in three variables,

$$ \partial_y G = 0, \qquad \partial^2_{yy} G \, v + \partial_y F = 0, \qquad
   \partial_x F + (\partial^2_{yx} G)^\top v = 0 . $$

A sample of their left sides is five vectors, two products away from two gradients.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeVar, final

import torch
from torch import Tensor

from bilevel.autodiff import fill, gradients, vector_jacobian_product
from bilevel.distributed import mean_over_ranks
from bilevel.linear.base import relative
from bilevel.oracles import Evaluation, Oracles
from bilevel.problem import Problem
from bilevel.refusals import positive
from bilevel.solvers.answers import Directions
from bilevel.tree import Layout, Tree, leaves

Told: TypeAlias = tuple[Tensor, dict[str, Tensor], Tree]  # a loss, its logs, the buffers it left
R = TypeVar("R")


@final
class OfLower(NamedTuple):
    """A sample of the lower loss's derivatives; those not asked for have no entries.

    Attributes:
        gradient: dG/dy, shape (n,).
        product: d2G/dy2 v, shape (n,).
        cross: v^T d2G/(dy dx), shape (m,).
    """

    gradient: Tensor
    product: Tensor
    cross: Tensor


@final
class OfUpper(NamedTuple):
    """A sample of the upper loss's gradient: dF/dy, shape (n,), and dF/dx, shape (m,)."""

    by_lower: Tensor
    by_upper: Tensor


def of_lower(
    oracles: Oracles,
    upper: Tree,
    lower: Tree,
    vector: Tensor,
    *,
    product: bool = True,
    cross: bool = True,
) -> OfLower:
    """The lower gradient and its products with a vector of shape (n,), from one graph."""
    loss = oracles.evaluate("lower", upper, lower).loss
    found = oracles.gradient(loss, lower, create_graph=True)
    oracles.refuse_unused(found.values())
    points, sources = list(lower.values()), list(upper.values())
    gradient = fill(list(found.values()), points)
    inputs = (points if product else []) + (sources if cross else [])
    products = vector_jacobian_product(gradient, inputs, Layout(points).unravel(vector))
    count = len(points) if product else 0
    parts = gradient, products[:count], products[count:]
    own = [as_vector(part, vector).detach() for part in parts]
    return OfLower(*mean_over_ranks(own))


def of_upper(oracles: Oracles, upper: Tree, lower: Tree) -> tuple[Told, OfUpper]:
    """The upper loss and its gradient in the variables of both levels."""
    evaluation = oracles.evaluate("upper", upper, lower)
    inputs = [*lower.values(), *upper.values()]
    found = fill(gradients(evaluation.loss, inputs), inputs)
    parts = found[: len(lower)], found[len(lower) :]
    own = [as_vector(part, evaluation.loss.detach()) for part in parts]
    evaluation, means = oracles.mean_over_ranks(evaluation, own)
    told = evaluation.loss.detach(), evaluation.logs, evaluation.buffers
    return told, OfUpper(*fill(means, own))


def as_vector(tensors: Sequence[Tensor], like: Tensor) -> Tensor:
    """The tensors as one vector, also where there are none."""
    return torch.cat([t.reshape(-1) for t in tensors]) if tensors else like.new_zeros(0)


def shaped(vector: Tensor, like: Tree) -> Tree:
    """A vector as a tree of the variables' shapes and dtypes."""
    if not like:
        return {}
    parts = torch.split_with_sizes(vector, [t.numel() for t in like.values()])
    pairs = zip(like.items(), parts, strict=True)
    return {name: part.view(t.shape).to(t.dtype) for (name, t), part in pairs}


def zeros(tree: Tree) -> Tensor:
    """Zeros for all entries of a tree, as one vector."""
    return torch.zeros_like(as_vector([t.detach() for t in tree.values()], torch.zeros(())))


def as_scalar(oracles: Oracles, value: float) -> Tensor:
    """A number that changes from call to call, as a graph may read it."""
    like = next(iter(oracles.lower.values()))
    return torch.tensor(value, dtype=like.dtype, device=like.device)


def entry_bytes(problem: Problem) -> tuple[int, int]:
    """The bytes of a vector over the lower variables, and of one over the upper ones."""
    oracles = Oracles(problem, None, [None])
    n, m = zeros(oracles.lower), zeros(oracles.upper)
    return n.numel() * n.element_size(), m.numel() * m.element_size()


def kept(tree: Tree) -> Tree:
    """Variables as they are now, in memory of their own."""
    return {name: t.detach().clone() for name, t in tree.items()}


def point(oracles: Oracles, vector: Tensor) -> list[Any]:
    """x, y and v as they are now, as `kept`."""
    return [kept(oracles.upper), kept(oracles.lower), vector]


def at_once(
    oracles: Oracles,
    key: Any,
    piece: Callable[..., R],
    *given: Any,
    batches: tuple[Any, Any] | None = None,
    at: tuple[Tree, Tree] | None = None,
    index: int = 0,
) -> R:
    """`piece(oracles, upper, lower, *given)` as one unit.

    Args:
        oracles: the losses.
        key: what the piece depends on besides its arguments.
        piece: a function of trees of tensors that returns such trees, without a graph.
        given: trees of tensors.
        batches: of the upper and of the lower loss; the first ones by default.
        at: the variables of the two levels; the current ones by default.
        index: number of this evaluation, which decides what the losses draw.
    """

    def function(upper_batch: Any, lower_batch: Any, upper: Tree, lower: Tree, *given: Any) -> R:
        here = oracles.on(upper_batch, [lower_batch], index)
        return piece(here, leaves(upper), leaves(lower), *given)

    upper, lower = (oracles.upper, oracles.lower) if at is None else at
    batches = (oracles.upper_batch, oracles.lower_batches[0]) if batches is None else batches
    arguments = map(oracles.units.ready, (*batches, upper, lower, *given))
    found: R = oracles.units.call((key, oracles.precision), function, *arguments)
    return found


def stepped_vector(vector: Tensor, direction: Tensor, rate: Tensor) -> Tensor:
    """The linear system's variable after a step against a direction."""
    return (vector - rate * direction).to(vector.dtype)


def recursive(new: Tensor, before: Tensor, old: Tensor, weight: Tensor) -> Tensor:
    """An estimate with recursive momentum: `new`, corrected by what the last estimate knew.

    Args:
        new: the sample here.
        before: the estimate of the call before.
        old: the same minibatch's sample at the point of that call.
        weight: of the plain sample; 1 forgets all else, 0 adds up differences.
    """
    return new + (1 - weight) * (before - old)


def hessian_product(oracles: Oracles, at: tuple[Tree, Tree], vector: Tensor, index: int) -> Tensor:
    """d2G/dy2 v at a point (x, y) on one of the lower batches, as a unit."""
    index %= len(oracles.lower_batches)

    def piece(here: Oracles, upper: Tree, lower: Tree, vector: Tensor) -> Tensor:
        return of_lower(here, upper, lower, vector, cross=False).product

    batches = None, oracles.lower_batches[index]
    return at_once(oracles, "product", piece, vector, batches=batches, at=at, index=index)


def neumann(
    oracles: Oracles, at: tuple[Tree, Tree], vector: Tensor, rate: Tensor, num_terms: int
) -> Tensor:
    """Sum over k <= num_terms of the products of (I - rate H_j), j <= k, with rate * vector.

    Each factor has the Hessian of the next lower batch, from the second on. The rate stands on the
    right: several ones, of the variables' own, do not commute with a Hessian.
    """
    term = total = rate * vector
    for j in range(num_terms):
        term = stepped_vector(term, hessian_product(oracles, at, term, 1 + j), rate)
        total = total + term
    return total


def drawn_length(num_terms: int, draw: tuple[int, int]) -> int:
    """How many factors a randomly drawn term of the Neumann series has, from 0 to num_terms - 1.

    Args:
        num_terms: how many terms there are.
        draw: seed and number of the draw.
    """
    generator = torch.Generator().manual_seed(hash(draw) % 2**62)
    return int(torch.randint(num_terms, (), generator=generator))


def scaled_term(
    oracles: Oracles,
    at: tuple[Tree, Tree],
    vector: Tensor,
    rate: Tensor,
    num_terms: int,
    length: int,
) -> Tensor:
    """One term of the Neumann series of that many terms, scaled to be unbiased if it is drawn.

    Args:
        oracles: the losses.
        at: the point (x, y).
        vector: what the inverse Hessian is multiplied with.
        rate: the step size of the series.
        num_terms: how many terms there are.
        length: how many factors the term has.
    """
    term = rate * vector
    for j in range(length):
        term = stepped_vector(term, hessian_product(oracles, at, term, 1 + j), rate)
    return num_terms * term


def move_both(
    oracles: Oracles,
    told: Told,
    lower: OfLower,
    upper: OfUpper,
    state: Any,
    *,
    num_products: int,
) -> Directions:
    """The estimates of the three left sides as directions of the two levels."""
    y, x = oracles.lower, oracles.upper
    by_lower, by_upper = shaped(upper.by_lower, y), shaped(upper.by_upper, x)
    shared = oracles.shared
    residual = None
    if len(lower.product):
        missing, target = lower.product + upper.by_lower, upper.by_lower
        residual = relative(*map(torch.linalg.vector_norm, (missing, target)))
    return Directions(
        evaluation=Evaluation(*told),
        direct={n: by_lower[shared[n]] if n in shared else by_upper[n] for n in oracles.names},
        response=shaped(lower.cross, x),
        lower=shaped(lower.gradient, y),
        state=state,
        lower_residual=torch.linalg.vector_norm(lower.gradient),
        linear_residual=residual,
        num_products=num_products,
    )


def check_share(name: str, setting: float) -> None:
    """Refuse a weight outside (0, 1]."""
    positive(name, setting)
    if setting > 1:
        raise ValueError(f"`{name}` must lie in (0, 1], got {setting!r}")

"""`Pieces`: a batch that is too large for one evaluation, in pieces whose graphs live one at a time."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias, cast, final

import optree
import torch
from torch import Tensor

from bilevel.refusals import positive, shown, whole
from bilevel.tree import Layout, Tree, norm

if TYPE_CHECKING:  # it imports this file
    from bilevel.oracles import Evaluation, Oracles

Parts: TypeAlias = list[tuple[float, Any]]


@final
@dataclass(frozen=True)
class Pieces:
    r"""A batch in pieces: its loss is the mean of theirs, $\sum_k w_k L_k$ with $\sum_k w_k = 1$.

    Give one wherever a batch goes, on either level, to a solver or (by `train(accumulate=...)`) to a
    run. Gradients are accumulated piece by piece, and a product with the lower Hessian evaluates the
    lower loss again for each, so that the memory is that of one piece. With weights in proportion to
    the rows, which is the default, the answer is that of one large batch for losses that are means over
    rows. `Unrolled` keeps all graphs of its steps anyway, and those of the pieces with them.

    Args:
        batches: the pieces, for example all batches of a loader, `list(loader)`.
        weights: a positive number for each; by default the rows of its first tensor.

    Raises:
        ValueError: if there are no pieces, the numbers of weights and pieces differ, or a piece without
            tensors has no weight.

    Example:
        >>> rows = torch.arange(5.0)
        >>> Pieces([rows[:3], rows[3:]]).weights
        (0.6, 0.4)
    """

    batches: tuple[Any, ...]
    weights: tuple[float, ...]

    def __init__(self, batches: Iterable[Any], weights: Iterable[float] | None = None) -> None:
        if isinstance(batches, Tensor) or not isinstance(batches, Iterable):
            raise TypeError(f"`batches` must be a list of batches, got {shown(batches)}")
        found = tuple(batches)
        given = tuple(_rows(b) for b in found) if weights is None else tuple(weights)
        if not found or len(found) != len(given):
            raise ValueError(
                f"there are {len(found)} pieces and {len(given)} weights; give at least one piece, "
                "and a weight for each"
            )
        for weight in given:
            positive("weights", weight)
        object.__setattr__(self, "batches", found)
        object.__setattr__(self, "weights", tuple(float(w) / sum(given) for w in given))

    @property
    def in_pieces(self) -> list[tuple[float, Any]]:
        """Weights and pieces."""
        return list(zip(self.weights, self.batches, strict=True))


def cut(batch: Any, num: int) -> Any:
    """A batch cut by rows into at most `num` pieces; without tensors, as it is.

    Raises:
        ValueError: if its tensors differ in their number of rows.
    """
    leaves: list[Any] = optree.tree_leaves(batch)
    rows = {len(leaf) for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim} - {0}
    if num == 1 or not rows:
        return batch
    if len(rows) > 1:
        raise ValueError(
            f"the tensors of the batch have {sorted(rows)} rows, so it cannot be cut into pieces; "
            "make the pieces yourself, `Pieces([...])`"
        )
    count = rows.pop()
    size = -(-count // whole("accumulate", num))

    def part(start: int) -> Any:
        def piece(leaf: Any) -> Any:
            rowed = isinstance(leaf, Tensor) and leaf.ndim and len(leaf)
            return leaf[start : start + size] if rowed else leaf

        return optree.tree_map(piece, batch)

    return Pieces([part(start) for start in range(0, count, size)])


def _rows(batch: Any) -> float:
    for leaf in optree.tree_leaves(batch):
        if isinstance(leaf, Tensor) and leaf.ndim and len(leaf):
            return len(leaf)
    raise ValueError(
        f"a piece ({shown(batch)}) has no tensor whose rows could be counted; give `weights`"
    )


def pieces_of(batch: Any) -> list[tuple[float, Any]] | None:
    """Weights and pieces of a batch that is in pieces, else `None`."""
    found: list[tuple[float, Any]] | None = getattr(batch, "in_pieces", None)
    return found


def evaluate_parts(
    oracles: Any,
    parts: Parts,
    level: Literal["upper", "lower"],
    upper: Tree,
    lower: Tree,
    index: int,
) -> "Evaluation":
    """`Oracles.evaluate` of the pieces; their graphs belong to the answer."""
    return _added(
        parts,
        lambda b: (oracles.on(b, [b], index).evaluate(level, upper, lower), []),
    )[0]


def lower_parts(
    oracles: "Oracles", parts: Parts, upper: Tree, lower: Tree, index: int
) -> "tuple[Evaluation, dict[str, Tensor | None]]":
    """`Oracles.lower_gradient` of the pieces, one after the other."""
    _refuse_no_loss(oracles.problem)

    def of_piece(batch: Any) -> tuple["Evaluation", list[Tensor | None]]:
        evaluation, grads = oracles.on(None, [batch], index).lower_gradient(upper, lower)
        return evaluation, list(grads.values())

    evaluation, sums = _added(parts, of_piece)
    return evaluation, dict(zip(lower, sums, strict=True))


def upper_parts(
    oracles: "Oracles", parts: Parts, upper: Tree, lower: Tree, wanted: Sequence[str]
) -> "tuple[Evaluation, list[Tensor | None]]":
    """`Oracles.upper_gradient` of the pieces, one after the other."""
    return _added(parts, lambda b: oracles.on(b, [b]).upper_gradient(upper, lower, wanted))


def partial_parts(
    oracles: "Oracles",
    parts: Parts,
    level: Literal["upper", "lower"],
    upper: Tree,
    lower: Tree,
    index: int,
) -> "tuple[Evaluation, Tree, Tree]":
    """`Oracles.partials` of the pieces, one after the other."""
    names: list[list[str]] = []

    def of_piece(batch: Any) -> tuple["Evaluation", list[Tensor | None]]:
        here = oracles.on(batch, [batch], index)
        evaluation, of_x, of_y = here.partials(level, upper, lower)
        names[:] = list(of_x), list(of_y)
        return evaluation, [*of_x.values(), *of_y.values()]

    evaluation, sums = _added(parts, of_piece)
    of_x, of_y = names
    grads = cast(list[Tensor], sums)  # zeros where a loss uses none
    split = len(of_x)
    return (
        evaluation,
        dict(zip(of_x, grads[:split], strict=True)),
        dict(zip(of_y, grads[split:], strict=True)),
    )


def _added(
    parts: Parts, call: Callable[[Any], tuple["Evaluation", list[Tensor | None]]]
) -> tuple["Evaluation", list[Tensor | None]]:
    """The weighted means of evaluations and of their gradients."""
    evaluation, total = call(parts[0][1])
    loss, logs = parts[0][0] * evaluation.loss, _times(parts[0][0], evaluation.logs)
    total = [None if g is None else parts[0][0] * g for g in total]
    for weight, piece in parts[1:]:
        evaluation, grads = call(piece)
        loss = loss + weight * evaluation.loss
        more = _times(weight, evaluation.logs)
        logs = {name: v + more[name].to(v) for name, v in logs.items() if name in more}
        for i, g in enumerate(grads):
            before = total[i]
            if g is not None:
                total[i] = weight * g if before is None else before + weight * g
    return replace(evaluation, loss=loss, logs=logs), total


def _times(weight: float, logs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: weight * value for name, value in logs.items()}


@final
class HessianInPieces:
    """Products with the mean Hessian of pieces; each evaluates their losses again.

    Args:
        linearizations: weights, and what linearizes the lower loss of a piece.
    """

    at_once: ClassVar[bool] = True

    def __init__(self, linearizations: list[tuple[float, Callable[[], Any]]]) -> None:
        self._parts = linearizations

    def __call__(self, vector: Tensor) -> Tensor:
        """Product with a vector of shape (n,)."""
        product: Tensor = self._mean(lambda at: at.hessian(vector))
        return product

    @property
    def transposed(self) -> "HessianInPieces":
        """The transposed matrix: the second derivative of a loss is symmetric."""
        return self

    def cross(self, vector: Tensor) -> Tree:
        """The vector times the derivative of the gradient in the upper variables."""
        total: Tree = {}
        for weight, linearize in self._parts:
            for name, g in linearize().cross(vector).items():
                total[name] = total[name] + weight * g if name in total else weight * g
        return total

    def gradient(self) -> Tensor:
        """The lower gradient, shape (n,)."""
        gradient: Tensor = self._mean(lambda at: at.gradient)
        return gradient

    def matrix(self) -> Tensor:
        """The matrix, shape (n, n)."""
        matrix: Tensor = self._mean(lambda at: at.hessian.matrix())
        return matrix

    def _mean(self, what: Callable[[Any], Tensor]) -> Any:
        total: Any = None
        for weight, linearize in self._parts:
            part = weight * what(linearize())
            total = part if total is None else total + part
        return total


def linearized(oracles: Any, upper: Tree, lower: Tree) -> tuple[Any, ...]:
    """What `Linearization` is made of, for lower batches of which some are in pieces."""
    _refuse_no_loss(oracles.problem)
    batches = oracles.lower_batches
    parts = []
    for index, batch in enumerate(batches):
        for weight, piece in pieces_of(batch) or [(1.0, batch)]:
            here = oracles.on(None, [piece], index)
            parts.append((weight / len(batches), _later(here, upper, lower)))
    hessian = HessianInPieces(parts)
    with torch.enable_grad():
        gradient = hessian.gradient()
    return gradient, hessian, hessian.cross, Layout(list(lower.values())), norm([gradient])


def _refuse_no_loss(problem: Any) -> None:
    """Refuse lower levels that are more than a loss: their Jacobian is not a mean of Hessians."""
    if problem.gives_lower_condition or problem.constrains_lower:
        raise ValueError(
            f"the lower level of `{type(problem).__name__}` is no loss without constraints, and only "
            "that can be evaluated in pieces; give whole batches"
        )


def _later(oracles: Any, upper: Tree, lower: Tree) -> Callable[[], Any]:
    return lambda: oracles.linearize_lower(upper, lower)

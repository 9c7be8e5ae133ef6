"""`counting`: the oracle calls of whatever is done with a problem, as autograd itself takes them.

Each evaluation of a loss gets its variables through an identity whose backward pass is noticed, and so
is the backward pass of that: the first is a gradient, the second a product of a second derivative with
a vector. Nobody has to report anything, so that solvers of one's own are counted as ours are.
"""

import contextlib
from collections import Counter
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, final

import optree
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from bilevel.problem import Level, Problem

Kind: TypeAlias = Literal["gradient", "product"]


@final
@dataclass(frozen=True)
class OracleCalls:
    """How often a problem was asked for what.

    A derivative in the variables of one level is one call, also where a backward pass gives two at
    once: the pass that gives d2G/dy2 v and the product with the mixed derivative counts as two.

    Attributes:
        forward: evaluations of a loss.
        upper_gradients: gradients in the upper variables.
        lower_gradients: gradients in the lower variables.
        hessian_products: products of d2/dy2 of a loss with a vector.
        cross_products: products of d2/dydx of a loss with a vector.
        samples: the derivatives, each as often as its batch has rows.
    """

    forward: int = 0
    upper_gradients: int = 0
    lower_gradients: int = 0
    hessian_products: int = 0
    cross_products: int = 0
    samples: int = 0

    @property
    def total(self) -> int:
        """All derivatives."""
        gradients = self.upper_gradients + self.lower_gradients
        return gradients + self.hessian_products + self.cross_products


@final
@dataclass
class _Note:
    """What became of one evaluation of a loss: passes by kind, level and variable.

    Attributes:
        rows: of its batch.
        turned: whether its gradient is being differentiated.
        passes: through each variable; a backward pass through a level is the most of its variables.
    """

    rows: int
    turned: bool = False
    passes: Counter[tuple[Kind, Level, int]] = field(default_factory=Counter)

    def reached(self, level: Level, number: int, times: int) -> None:
        kind: Kind = "product" if self.turned else "gradient"
        self.passes[kind, level, number] += times

    def most(self, kind: Kind, level: Level) -> int:
        found = [n for (k, of, _), n in self.passes.items() if (k, of) == (kind, level)]
        return max(found, default=0)


_Place: TypeAlias = tuple[_Note, Level, int]


@final
class Tally:
    """Counts the oracle calls of a problem, inside `counting`."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._notes: list[_Note] = []
        self._held: list[tuple[MutableMapping[str, Any], str, Tensor]] = []

    def calls(self) -> OracleCalls:
        """The calls so far."""
        total = Counter[str]()
        for note in self._notes:
            found = {
                "upper_gradients": note.most("gradient", "upper"),
                "lower_gradients": note.most("gradient", "lower"),
                "hessian_products": note.most("product", "lower"),
                "cross_products": note.most("product", "upper"),
            }
            total.update(found)
            total["samples"] += note.rows * sum(found.values())
        return OracleCalls(forward=len(self._notes), **total)

    def begin(self, module: nn.Module, given: tuple[Any, ...]) -> None:
        """Put tapped variables in their places; called before a loss."""
        note = _Note(_rows(given[-1]))
        self._notes.append(note)
        tapped: dict[int, Tensor] = {}
        levels: tuple[Level, ...] = ("lower", "upper")
        for level in levels:  # what belongs to both is lower
            for part in getattr(self._problem, level).modules():
                for name, value in part._parameters.items():
                    if value is None or not value.requires_grad:
                        continue
                    if id(value) not in tapped:
                        place = note, level, len(tapped)
                        tapped[id(value)] = _Tap.apply(value, place)  # type: ignore[no-untyped-call]
                    self._held.append((part._parameters, name, value))
        for store, name, value in self._held:
            store[name] = tapped[id(value)]

    def end(self, module: nn.Module, given: Any, answer: Any) -> None:
        """Put the variables back; called after a loss, also after one that raises."""
        while self._held:
            store, name, value = self._held.pop()
            store[name] = value


@contextlib.contextmanager
def counting(problem: Problem) -> Iterator[Tally]:
    """Count the oracle calls of the problem inside; evaluations get slower, numbers stay the same.

    Not for compiled solvers, whose graphs call no code of the problem, and recurrent layers, which keep
    a list of their weights beside the parameters: what they do is not seen.

    Example:
        >>> from bilevel import Implicit, Neumann
        >>> problem = Problem.from_functions(
        ...     lambda x, y, _: (y["y"] - 3) ** 2, lambda x, y, _: (y["y"] - x["x"].sin()) ** 2,
        ...     {"x": torch.ones(())}, {"y": torch.zeros(())},
        ... )
        >>> solver = Implicit(Neumann(num_steps=4, step_size=0.1))
        >>> _ = solver.hypergradient(problem, throw=False)  # looks at the losses, once
        >>> with counting(problem) as tally:
        ...     _ = solver.hypergradient(problem, throw=False)
        >>> tally.calls().hessian_products, tally.calls().cross_products
        (4, 1)
    """
    tally = Tally(problem)
    handles = [
        problem.register_forward_pre_hook(tally.begin),
        problem.register_forward_hook(tally.end, always_call=True),
    ]
    try:
        yield tally
    finally:
        for handle in handles:
            handle.remove()


def _rows(batch: Any) -> int:
    """Rows of the first tensor of a batch; 1 where there are none."""
    leaves: list[Any] = optree.tree_leaves(batch)
    return next((len(leaf) for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim), 1)


def _times(gradient: Tensor) -> int:
    """How many products a pass makes at once: the columns of a whole Hessian have one between them."""
    if not torch._C._functorch.is_legacy_batchedtensor(gradient):
        return 1
    columns: Tensor = torch._remove_batch_dim(gradient, 1, 1, 0)
    return len(columns)


@final
class _Tap(torch.autograd.Function):
    """The identity; notices gradients."""

    @staticmethod
    def forward(value: Tensor, place: _Place) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.place = inputs[1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        note, level, number = ctx.place
        note.reached(level, number, _times(gradient))
        if forward_ad.unpack_dual(gradient).tangent is not None:  # forward over reverse
            note.passes["product", level, number] += 1
        if torch.is_grad_enabled():
            gradient = _Turn.apply(gradient, note)  # type: ignore[no-untyped-call]
        return gradient, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, place: None) -> Tensor:
        return tangent.clone()


@final
class _Turn(torch.autograd.Function):
    """The identity on a gradient; notices that it is differentiated."""

    @staticmethod
    def forward(gradient: Tensor, note: _Note) -> Tensor:
        return gradient.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.note = inputs[1]

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None]:
        ctx.note.turned = True
        return cotangent, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, note: None) -> Tensor:
        return tangent.clone()

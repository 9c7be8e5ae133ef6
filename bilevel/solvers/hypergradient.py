"""`Hypergradient`: the record that a solver returns, with what it tells about itself."""

from dataclasses import dataclass, field, fields
from itertools import islice
from typing import Any, final

import optree
from torch import Tensor

from bilevel.cards import Card, digits, numbers_by_name, plural
from bilevel.errors import Result
from bilevel.tree import Tree, norm

_LISTED = 4  # parts of a gradient, and entries of one, that its text lists


@final
@dataclass(frozen=True)
class Stats:
    """What a hypergradient tells about itself; scalars stay on the device, `None` is "not computed".

    Attributes:
        direct_norm: norm of the direct term.
        response_norm: norm of the response term (0 where the solver drops it).
        lower_residual: norm of dG/dy where the hypergradient was taken (`Unrolled`: one step before;
            `Alternating` takes no lower gradient, see `Step.lower_residual`).
        linear_residual: relative residual of the linear solve.
        negative_curvature: whether the linear solver met negative curvature.
        num_products: number of Hessian-vector products, or of differentiated lower steps.
        unreached: names of the upper variables that no loss uses (with `Alternating`, that the upper
            loss does not use), so that their exact 0 is not a derivative.
        note: what the linear solver says of a failure in numbers; empty if it says nothing.
    """

    direct_norm: Tensor
    response_norm: Tensor
    lower_residual: Tensor | None = None
    linear_residual: Tensor | None = None
    negative_curvature: bool = False
    num_products: int = 0
    unreached: tuple[str, ...] = ()
    note: str = ""

    def __repr__(self) -> str:
        words = ("unreached", "note")
        computed = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in words}
        computed["negative_curvature"] = self.negative_curvature or None
        missed = f", unreached {', '.join(self.unreached)}" if self.unreached else ""
        return f"Stats: {numbers_by_name(computed)}{missed}{self.note and ', '}{self.note}"


@final
@dataclass(frozen=True)
class Hypergradient:
    """The record a solver returns; nothing is written into the problem.

    Attributes:
        value: the upper loss F(x, y_hat), a detached scalar.
        grad: the hypergradient, a tree over the upper variables.
        result: how the computation ended; print its `.value` for a sentence.
        stats: residuals, norms and counts.
        state: what the solver wants back at the next call (its auxiliary variables, warm starts), or
            `None`.
        logs: what the upper loss logged.
        buffers: the problem's buffers as one evaluation of the upper loss left them.
        lower_grad: what takes the place of dG/dy for the lower optimizer, from a solver that moves both
            levels at once (`Solver.moves_lower`); `None` from others. It has no entry for a variable
            that neither loss uses.
    """

    value: Tensor
    grad: Tree
    result: Result
    stats: Stats
    state: Any = None
    logs: dict[str, Tensor] = field(default_factory=dict)
    buffers: Tree = field(default_factory=dict)
    lower_grad: Tree | None = None

    def is_finite(self) -> bool:
        """Whether upper loss, gradient and lower residual hold no NaN, nor the first two infinity.

        It waits for the device.
        """
        if self.stats.lower_residual is not None and bool(self.stats.lower_residual.isnan()):
            return False
        told = self.value, self.stats.direct_norm, self.stats.response_norm
        if all(bool(number.isfinite()) for number in told):
            return True
        parts = self.value, *self.grad.values()  # finite entries may have a norm that overflows
        return all(bool(part.isfinite().all()) for part in parts)

    def __repr__(self) -> str:
        return str(self._card())

    def _repr_html_(self) -> str:
        return self._card().html()

    def _card(self) -> Card:
        found = {n: g for n, g in self.grad.items() if isinstance(g, Tensor)}
        rows = [
            (
                "upper loss",
                ", ".join(filter(None, [digits(self.value), numbers_by_name(self.logs)])),
            ),
            ("norm", f"{digits(norm(found))} over {plural(len(found), 'variable')}"),
            *[(name, _entries(g)) for name, g in islice(found.items(), _LISTED)],
            ("stats", str(self.stats).removeprefix("Stats: ")),
        ]
        if len(found) > _LISTED:
            rows.insert(-1, ("...", f"and {len(found) - _LISTED} more in `.grad`"))
        ended = self.result.value if isinstance(self.result, Result) else self.result
        return Card(f"Hypergradient: {ended}", rows)


def _entries(grad: Tensor) -> str:
    """The numbers of a part of a gradient if they are few, else their norm."""
    if grad.numel() <= _LISTED and not grad.is_meta:
        return str([float(f"{entry:.4g}") for entry in grad.detach().reshape(-1).tolist()])
    return f"norm {digits(norm([grad]))}, shape {tuple(grad.shape)}"


def _as_tree(record: type[Any]) -> None:
    """Let `optree` look into a record: a compiled step returns new tensors each time."""
    names = [f.name for f in fields(record)]
    optree.register_pytree_node(
        record,
        lambda r: ([getattr(r, name) for name in names], None),
        lambda _, values: record(*values),
        namespace="bilevel",
    )


_as_tree(Stats)
_as_tree(Hypergradient)

"""What a solver answers: the lower level's answer with its derivative, or directions of both levels."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeAlias, final

from torch import Tensor

from bilevel.autodiff import fill
from bilevel.compile import EagerUnits
from bilevel.errors import Result
from bilevel.losses.purity import unused
from bilevel.oracles import Evaluation, Oracles
from bilevel.problem import Level
from bilevel.solvers.hypergradient import Hypergradient, Stats
from bilevel.tree import Tree, norm


@final
class ResponseProduct(NamedTuple):
    """The product (dy_hat/dx)^T v and what is known about it."""

    product: Tree
    result: Result = Result.SUCCESS
    linear_residual: Tensor | None = None
    negative_curvature: bool = False
    num_products: int = 0
    state: Any = None
    note: str = ""


@final
class Response(NamedTuple):
    """The lower answer a solver takes the upper loss at, and its derivative.

    Attributes:
        lower: the answer y_hat.
        vjp: v -> (dy_hat/dx)^T v; `None` if the solver drops the term.
        lower_residual: norm of dG/dy at the answer, if it was computed.
    """

    lower: Tree
    vjp: Callable[[Tree], ResponseProduct] | None
    lower_residual: Tensor | None = None

    def at(self, oracles: Oracles) -> Tree:
        """The lower variables that the upper loss is taken at."""
        return self.lower

    def hypergradient(self, oracles: Oracles) -> Hypergradient:
        """The upper loss at the answer, and the direct term and the response term together."""
        upper, shared = oracles.upper, oracles.shared
        lower = {name: y.detach() for name, y in self.lower.items()}
        wanted = list(lower if self.vjp is not None else shared.values())
        evaluation, found = oracles.upper_gradient(upper, lower, wanted)
        grads = fill(found, [*upper.values(), *(lower[name] for name in wanted)])
        by_upper = dict(zip(upper, grads[: len(upper)], strict=True))
        by_lower = dict(zip(wanted, grads[len(upper) :], strict=True))
        direct = {
            name: by_lower[shared[name]] if name in shared else by_upper[name]
            for name in oracles.names
        }
        product = ResponseProduct({}) if self.vjp is None else self.vjp(by_lower)
        return _summed(
            oracles,
            evaluation,
            direct,
            product.product,
            result=product.result,
            state=product.state,
            stats={
                "lower_residual": self.lower_residual,
                "linear_residual": product.linear_residual,
                "negative_curvature": product.negative_curvature,
                "num_products": product.num_products,
                "note": product.note,
                "unreached": _unreached(oracles, upper, found[: len(upper)], self.vjp is not None),
            },
        )


@final
class Directions(NamedTuple):
    """Where a solver sends the variables of both levels at once, from where they are now.

    Attributes:
        evaluation: the upper loss.
        direct: the direct term, a tree over the upper variables.
        response: the response term, too; the upper optimizer is given the sum of the two.
        lower: what takes the place of dG/dy for the lower optimizer, a tree over the lower variables.
        state: the auxiliary variables for the next call.
        result: how the computation ended.
        lower_residual: norm of dG/dy here, if it was computed.
        linear_residual: relative residual of a linear system that was looked at.
        num_products: number of Hessian-vector products.
    """

    evaluation: Evaluation
    direct: Tree
    response: Tree
    lower: Tree
    state: Any = None
    result: Result = Result.SUCCESS
    lower_residual: Tensor | None = None
    linear_residual: Tensor | None = None
    num_products: int = 0

    def at(self, oracles: Oracles) -> Tree:
        """The lower variables that the upper loss is taken at."""
        return oracles.lower

    def hypergradient(self, oracles: Oracles) -> Hypergradient:
        """The sum of the two terms, and the direction of the lower variables."""
        both: tuple[Level, ...] = ("upper", "lower")
        idle, still = (
            frozenset.intersection(*(unused(oracles.problem, level, of) for level in both))
            for of in both
        )
        answer = _summed(
            oracles,
            self.evaluation,
            {name: self.direct[name] for name in oracles.names},
            self.response,
            result=self.result,
            state=self.state,
            stats={
                "lower_residual": self.lower_residual,
                "linear_residual": self.linear_residual,
                "num_products": self.num_products,
                "unreached": tuple(name for name in oracles.names if name in idle),
            },
        )
        lower = {name: g for name, g in self.lower.items() if name not in still}
        return replace(answer, lower_grad=lower)


@final
class UnrolledSteps(NamedTuple):
    """Optimizer steps whose end a solver takes for the lower level's answer.

    Attributes:
        num_steps: how many, from the current lower variables.
        optimizer: the torchopt transformation that takes them; `None` for the running optimizers.
        max_grad_norm: the lower gradient is clipped to this norm; `None` for no clipping.
    """

    num_steps: int
    optimizer: Any = None
    max_grad_norm: float | None = None


Answer: TypeAlias = Response | Directions


@final
class AtOnce(NamedTuple):
    """A hypergradient as one piece of work.

    Attributes:
        key: what tells it from others; it holds all that it depends on besides batches, variables and
            what is given.
        given: a tree of tensors and numbers that it reads.
        respond: `(oracles, given, sure) -> Answer`, which looks at no values. To the list `sure` it
            appends truth values that must all hold, or the answer is not used.
    """

    key: Hashable
    given: Any
    respond: Callable[[Oracles, Any, list[Tensor]], Answer]

    def hypergradient(self, oracles: Oracles) -> Hypergradient | None:
        """The answer of one graph; `None` where there is none, or it was not sure."""

        def piece(
            upper_batch: Any, lower_batches: list[Any], upper: Tree, lower: Tree, given: Any
        ) -> tuple[Hypergradient, list[Tensor]]:
            here = oracles.on(upper_batch, lower_batches).at(upper, lower)
            here.units = EagerUnits()
            sure: list[Tensor] = []
            return self.respond(here, given, sure).hypergradient(here), sure

        arguments = (
            oracles.upper_batch,
            list(oracles.lower_batches),
            oracles.upper,
            oracles.lower,
            self.given,
        )
        key, units = ("at once", self.key, oracles.precision), oracles.units
        found = units.attempt(key, piece, *map(units.ready, arguments))
        return found[0] if found is not None and all(map(bool, found[1])) else None


def _summed(
    oracles: Oracles,
    evaluation: Evaluation,
    direct: Tree,
    response: Tree,
    *,
    result: Result,
    state: Any,
    stats: Mapping[str, Any],
) -> Hypergradient:
    """The record of two terms and what is known about them."""
    grad, direct_norm, response_norm = oracles.units.call(
        "sum", _sum, *map(oracles.units.ready, (direct, response))
    )
    return Hypergradient(
        value=evaluation.loss,
        grad=grad,
        result=result,
        stats=Stats(direct_norm=direct_norm, response_norm=response_norm, **stats),
        state=state,
        logs=evaluation.logs,
        buffers=evaluation.buffers,
    )


def _sum(direct: Tree, response: Tree) -> tuple[Tree, Tensor, Tensor]:
    """The sum of the two terms, and their norms."""
    total = {name: g + response[name] if name in response else g for name, g in direct.items()}
    return total, norm(direct), norm(response)


def _unreached(
    oracles: Oracles, upper: Tree, direct: Sequence[Tensor | None], through_lower: bool
) -> tuple[str, ...]:
    """The upper variables that the upper loss does not use, nor the lower loss if that counts."""
    names = [name for name, g in zip(upper, direct, strict=True) if g is None]
    return tuple(n for n in names if not through_lower or n in unused(oracles.problem, "lower"))

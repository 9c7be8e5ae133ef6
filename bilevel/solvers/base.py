r"""`Solver`: how the upper level feels the lower level's answer, and the record it returns.

Every hypergradient has the same shape. With $\hat y(x)$ the answer a solver attributes to the lower
level,

$$ \frac{d}{dx} F(x, \hat y(x)) = \partial_x F(x, \hat y) +
   \Big(\frac{d\hat y}{dx}\Big)^{\!\top} \partial_y F(x, \hat y), $$

the *direct* term and the *response* term. A new solver writes `respond`: what $\hat y$ is and how to
multiply a vector by the transposed Jacobian of the best response.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields
from itertools import islice
from typing import Any, ClassVar, NamedTuple, final

import optree
import torch
from torch import Tensor

from bilevel.autodiff import fill
from bilevel.batches import refuse_no_list
from bilevel.cards import Card, digits, numbers_by_name, plural
from bilevel.errors import HypergradientError, Result
from bilevel.losses.purity import examine, examined, unused
from bilevel.losses.references import refuse_graphs
from bilevel.losses.substitution import attentive
from bilevel.optimizers import Optimizers, optimizers_of
from bilevel.oracles import Oracles
from bilevel.problem import Level, Problem
from bilevel.refusals import SEEDS, flag, whole
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
    """

    direct_norm: Tensor
    response_norm: Tensor
    lower_residual: Tensor | None = None
    linear_residual: Tensor | None = None
    negative_curvature: bool = False
    num_products: int = 0
    unreached: tuple[str, ...] = ()

    def __repr__(self) -> str:
        computed = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "unreached"}
        computed["negative_curvature"] = self.negative_curvature or None
        missed = f", unreached {', '.join(self.unreached)}" if self.unreached else ""
        return f"Stats: {numbers_by_name(computed)}{missed}"


@final
@dataclass(frozen=True)
class Hypergradient:
    """The record a solver returns; nothing is written into the problem.

    Attributes:
        value: the upper loss F(x, y_hat), a detached scalar.
        grad: the hypergradient, a tree over the upper variables.
        result: how the computation ended; print its `.value` for a sentence.
        stats: residuals, norms and counts.
        state: what the solver wants back at the next call (warm starts), or `None`.
        logs: what the upper loss logged.
        buffers: the problem's buffers as one evaluation of the upper loss left them.
    """

    value: Tensor
    grad: Tree
    result: Result
    stats: Stats
    state: Any = None
    logs: dict[str, Tensor] = field(default_factory=dict)
    buffers: Tree = field(default_factory=dict)

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


@final
class ResponseProduct(NamedTuple):
    """The product (dy_hat/dx)^T v and what is known about it."""

    product: Tree
    result: Result = Result.SUCCESS
    linear_residual: Tensor | None = None
    negative_curvature: bool = False
    num_products: int = 0
    state: Any = None


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


class Solver(ABC):
    """Abstract base of the solvers; each is a frozen record of its settings.

    Attributes:
        drops_response: whether the upper loss is all that a solver evaluates, at the current lower
            variables: it drops what comes through the lower level.
    """

    drops_response: ClassVar[bool] = False

    @abstractmethod
    def respond(self, oracles: Oracles, state: Any, lower_optimizer: Optimizers | None) -> Response:
        """The lower level's answer at the current variables, and its vector-Jacobian product.

        Args:
            oracles: the losses and their derivatives; the only access to the problem.
            state: what this solver returned as `Hypergradient.state` last time, or `None`.
            lower_optimizer: the running optimizer(s) of the lower level, if there are any.

        Returns:
            The answer and its derivative.
        """

    def context(self, oracles: Oracles) -> AbstractContextManager[None]:
        """The context `hypergradient` runs in; solvers of second order check the problem here."""
        return nullcontext()

    def bound(
        self, problem: Problem, upper_batch: Any, lower_batches: Sequence[Any], seed: int
    ) -> Oracles:
        """The problem bound to the batches of one hypergradient."""
        return Oracles(problem, upper_batch, lower_batches, seed=seed)

    def check(self, oracles: Oracles, lower_optimizer: Optimizers | None) -> None:
        """Refuse, before the first step, what this solver cannot do.

        Args:
            oracles: the problem, bound to no data yet.
            lower_optimizer: the running optimizer(s) of the lower level, if there are any.

        Raises:
            ValueError: if the problem does not fit the solver.
            TypeError: if the optimizer does not.
        """
        with self.context(oracles):
            pass

    def num_lower_batches(self) -> int:
        """How many fresh lower batches one hypergradient can use."""
        return 0

    def unrolled_steps(self) -> UnrolledSteps | None:
        """The steps whose end is the lower level's answer; `None` if it is not made by steps.

        `check_hypergradient` takes these steps in a plain loop.
        """
        return None

    def approximates(self) -> bool:
        """Whether the response term is an approximation on purpose, even with exact arithmetic."""
        return self.drops_response

    @final
    def hypergradient(
        self,
        problem: Problem,
        upper_batch: Any = None,
        lower_batches: Sequence[Any] = (None,),
        *,
        state: Any = None,
        lower_optimizer: Optimizers | None = None,
        seed: int = 0,
        throw: bool = True,
    ) -> Hypergradient:
        """The gradient of the upper loss in the upper variables, response included.

        The problem, its buffers, its `.grad` fields and the optimizers are left as they were.

        Args:
            problem: the problem, at its current variables.
            upper_batch: batch of the upper loss.
            lower_batches: list of batches of the lower loss; `Unrolled` uses one per step, or one for
                all.
            state: `Hypergradient.state` of the previous call, for warm starts.
            lower_optimizer: running optimizer(s) of the lower level, which `Unrolled` branches from.
            seed: seed of the random numbers drawn inside the losses (dropout masks).
            throw: raise if the computation did not succeed; otherwise the caller reads `result`.

        Returns:
            Value, gradient, result and statistics.

        Raises:
            HypergradientError: if `throw` and the result is not a success.
            ValueError: if the problem does not fit the solver, a loss is not a function of its
                variables and its batch (looked at once for each problem), or a batch depends on a
                variable.
            TypeError: if an argument is of the wrong kind (`lower_batches` must be a list).
        """
        flag("throw", throw)
        oracles = self.bound(problem, upper_batch, lower_batches, whole("seed", seed, *SEEDS))
        refuse_no_list(lower_batches, upper_batch)
        if not len(lower_batches) and self.num_lower_batches():
            raise ValueError(
                "`lower_batches` is empty; give a list with at least one batch, `[batch]`"
            )
        lower_optimizer = optimizers_of("lower_optimizer", lower_optimizer) or None
        for batch in (upper_batch, *lower_batches):
            refuse_graphs(problem, batch, "the batch given to `hypergradient`")
        both = self.num_lower_batches() > 0
        levels: tuple[Level, ...] = ("upper", "lower") if both else ("upper",)
        if not examined(problem, levels):
            with self.context(oracles):
                examine(oracles, levels, whole=both)
        return self.solve(oracles, state=state, lower_optimizer=lower_optimizer, throw=throw)

    @final
    def solve(
        self,
        oracles: Oracles,
        *,
        state: Any = None,
        lower_optimizer: Optimizers | None = None,
        throw: bool = True,
    ) -> Hypergradient:
        """`hypergradient` for a caller that holds the oracles already."""
        with attentive, self.context(oracles), torch.enable_grad():
            response = self.respond(oracles, state, lower_optimizer)
            answer = self._assemble(oracles, response)
        if throw and answer.result is not Result.SUCCESS:
            raise HypergradientError(_explain(self, answer), answer)
        return answer

    def _assemble(self, oracles: Oracles, response: Response) -> Hypergradient:
        upper, shared = oracles.upper, oracles.shared
        lower = {name: y.detach() for name, y in response.lower.items()}
        wanted = list(lower if response.vjp is not None else shared.values())
        evaluation, found = oracles.upper_gradient(upper, lower, wanted)
        grads = fill(found, [*upper.values(), *(lower[name] for name in wanted)])
        by_upper = dict(zip(upper, grads[: len(upper)], strict=True))
        by_lower = dict(zip(wanted, grads[len(upper) :], strict=True))
        direct = {
            name: by_lower[shared[name]] if name in shared else by_upper[name]
            for name in oracles.names
        }
        product = ResponseProduct({}) if response.vjp is None else response.vjp(by_lower)
        grad, direct_norm, response_norm = oracles.units.call(
            "sum", _sum, *map(oracles.units.ready, (direct, product.product))
        )
        return Hypergradient(
            value=evaluation.loss,
            grad=grad,
            result=product.result,
            stats=Stats(
                direct_norm=direct_norm,
                response_norm=response_norm,
                lower_residual=response.lower_residual,
                linear_residual=product.linear_residual,
                negative_curvature=product.negative_curvature,
                num_products=product.num_products,
                unreached=_unreached(oracles, upper, found[: len(upper)], response.vjp is not None),
            ),
            state=product.state,
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


def _explain(solver: Solver, answer: Hypergradient) -> str:
    residual = answer.stats.linear_residual
    number = "" if residual is None else f" (relative residual {float(residual):.2e}"
    number += "" if residual is None else f" after {answer.stats.num_products} products)"
    return f"`{solver}` did not succeed{number}: {answer.result.value}"

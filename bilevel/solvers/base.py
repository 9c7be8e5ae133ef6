r"""`Solver`: how the upper level feels the lower level's answer, and the record it returns.

Every hypergradient has the same shape. With $\hat y(x)$ the answer a solver attributes to the lower
level,

$$ \frac{d}{dx} F(x, \hat y(x)) = \partial_x F(x, \hat y) +
   \Big(\frac{d\hat y}{dx}\Big)^{\!\top} \partial_y F(x, \hat y), $$

the *direct* term and the *response* term. A new solver writes `respond`: what $\hat y$ is and how to
multiply a vector by the transposed Jacobian of the best response. One that moves both levels at once
(a single loop) answers with directions instead. Variables of its own, moved from call to call, are its
state (`begin`).
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, ClassVar, final

import torch

from bilevel.batches import refuse_no_list
from bilevel.errors import HypergradientError, Result
from bilevel.losses.purity import examine, examined
from bilevel.losses.references import refuse_graphs
from bilevel.losses.substitution import attentive
from bilevel.optimizers import Optimizers, optimizers_of
from bilevel.oracles import Oracles
from bilevel.problem import Level, Problem
from bilevel.refusals import SEEDS, flag, whole
from bilevel.solvers.answers import (
    Answer,
    AtOnce,
    Directions,
    Response,
    ResponseProduct,
    UnrolledSteps,
)
from bilevel.solvers.hypergradient import Hypergradient, Stats
from bilevel.solvers.kept_state import refuse_other_state

__all__ = [
    "AtOnce",
    "Directions",
    "Hypergradient",
    "Response",
    "ResponseProduct",
    "Solver",
    "Stats",
    "UnrolledSteps",
]


class Solver(ABC):
    """Abstract base of the solvers; each is a frozen record of its settings.

    Attributes:
        drops_response: whether the upper loss is all that a solver evaluates, at the current lower
            variables: it drops what comes through the lower level.
        moves_lower: whether it answers with directions of both levels, which `train` gives to the
            optimizers of both at once, without lower steps besides.
    """

    drops_response: ClassVar[bool] = False
    moves_lower: ClassVar[bool] = False

    @abstractmethod
    def respond(self, oracles: Oracles, state: Any, lower_optimizer: Optimizers | None) -> Answer:
        """The lower level's answer at the current variables, and its vector-Jacobian product.

        Args:
            oracles: the losses and their derivatives; the only access to the problem.
            state: what this solver returned as `Hypergradient.state` last time; at first what `begin`
                returned. It must not be written into.
            lower_optimizer: the running optimizer(s) of the lower level, if there are any.

        Returns:
            The answer and its derivative, a `Response`; or `Directions` from a solver that moves both
            levels.
        """

    def begin(self, oracles: Oracles) -> Any:
        """The auxiliary variables at the start: a pytree of tensors and plain numbers, or `None`.

        Lower runs of a solver's own, a linear system's running solution, tables of gradients. `train`
        keeps them with the rest of a run: saved, resumed to the bit, the same on all ranks. They keep
        their names, shapes and dtypes from call to call; only lists may become longer or shorter.
        """
        return None

    def at_once(
        self, oracles: Oracles, state: Any, lower_optimizer: Optimizers | None
    ) -> AtOnce | None:
        """The same as one piece of work, which is compiled whole; `None` where it would be too long.

        Args:
            oracles: as in `respond`.
            state: as in `respond`.
            lower_optimizer: as in `respond`.
        """
        return None

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

    def rehearse(self, oracles: Oracles) -> None:
        """Refuse, before anything has moved, what only the first batches can show.

        Args:
            oracles: the problem, bound to these.

        Raises:
            ValueError: if the problem does not fit the solver.
        """
        return

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

    def separates(self) -> bool:
        """Whether independent problems side by side get what each of them would get alone."""
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
            state: `Hypergradient.state` of the previous call, which goes on from there.
            lower_optimizer: running optimizer(s) of the lower level, which `Unrolled` branches from.
            seed: seed of the random numbers drawn inside the losses (dropout masks).
            throw: raise if the computation did not succeed; otherwise the caller reads `result`.

        Returns:
            Value, gradient, result and statistics.

        Raises:
            HypergradientError: if `throw` and the result is not a success.
            ValueError: if the problem does not fit the solver, a loss is not a function of its
                variables and its batch (looked at once for each problem), a batch depends on a
                variable, or the state is that of another solver or problem.
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
        if state is not None:
            with self.context(oracles):
                refuse_other_state(type(self).__name__, state, self.begin(oracles))
        answer = self.solve(oracles, state=state, lower_optimizer=lower_optimizer, throw=False)
        if answer.result is Result.SUCCESS and not answer.is_finite():
            answer = replace(answer, result=Result.NOT_FINITE)
        return self._or_raised(answer) if throw else answer

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
            if state is None:
                state = self.begin(oracles)
            answer = self._in_one_piece(oracles, state, lower_optimizer)
            if answer is None:
                answer = self.respond(oracles, state, lower_optimizer).hypergradient(oracles)
        return self._or_raised(answer) if throw else answer

    def _or_raised(self, answer: Hypergradient) -> Hypergradient:
        if answer.result is not Result.SUCCESS:
            raise HypergradientError(_explain(self, answer), answer)
        return answer

    def _in_one_piece(
        self, oracles: Oracles, state: Any, lower_optimizer: Optimizers | None
    ) -> Hypergradient | None:
        """The answer of one graph; `None` where there is none, or it was not sure."""
        if not oracles.units.compiled:
            return None
        at_once = self.at_once(oracles, state, lower_optimizer)
        return None if at_once is None else at_once.hypergradient(oracles)


def _explain(solver: Solver, answer: Hypergradient) -> str:
    residual = answer.stats.linear_residual
    number = "" if residual is None else f" (relative residual {float(residual):.2e}"
    number += "" if residual is None else f" after {answer.stats.num_products} products)"
    note = answer.stats.note and f". {answer.stats.note[0].upper()}{answer.stats.note[1:]}"
    return f"`{solver}` did not succeed{number}: {answer.result.value}{note}"

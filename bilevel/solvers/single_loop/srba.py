r"""`SRBA`: SOBA with estimates that are carried along, and taken on all rows once in a period.

Every `period` calls the five derivatives of `SOBA` are taken on all rows; in between the last estimate
is corrected by what one minibatch says at both points about the move since,

$$ d_t = d_{t-1} + g(x_t, y_t, v_t) - g(x_{t-1}, y_{t-1}, v_{t-1}) . $$
"""

from dataclasses import dataclass
from typing import Any, ClassVar, final

from torch import Tensor

from bilevel.arguments import explained_settings
from bilevel.optimizers import Optimizers
from bilevel.oracles import Oracles
from bilevel.problem import Problem
from bilevel.refusals import SEEDS, whole
from bilevel.solvers.answers import Directions
from bilevel.solvers.single_loop import rows, samples
from bilevel.solvers.single_loop.base import Stochastic
from bilevel.solvers.step_sizes import check_step_size
from bilevel.tree import Tree, leaves


@final
@explained_settings
@dataclass(frozen=True)
class SRBA(Stochastic):
    """Stochastic recursive bilevel algorithm: exact directions once in a period, differences between.

    It converges with constant step sizes. Its batch is all rows (`train(batch_size=None)`). Memory:
    6 n + 3 m numbers with n lower and m upper entries, for any rows; `memory` says it in bytes. With
    several ranks each cuts its own rows: other minibatches than those of one process.

    Args:
        batch_size: rows of a minibatch, of either level.
        period: calls from one restart to the next; `None` for half a pass over the rows of both levels.
        step_size: of v; `None` for the learning rate that the lower optimizer has now.
        seed: of the order of the minibatches.

    Raises:
        ValueError: if a setting is out of range, or there is neither a step size nor an optimizer.

    Example:
        >>> SRBA(period=16).batch_size
        64

    References:
        A Lower Bound and a Near-Optimal Algorithm for Bilevel Empirical Risk Minimization (Dagreou,
        Moreau, Vaiter, Ablin, 2024), https://arxiv.org/abs/2302.08766, Algorithm 1. Differs from it in:
        v is not projected onto a ball; minibatches come in shuffled passes.
    """

    moves_lower: ClassVar[bool] = True

    batch_size: int = 64
    period: int | None = None
    step_size: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        whole("batch_size", self.batch_size)
        whole("seed", self.seed, *SEEDS)
        whole("period", 1 if self.period is None else self.period)
        check_step_size(self.step_size)

    def memory(self, problem: Problem) -> int:
        """The bytes that the solver's tensors take, whatever the data."""
        n, m = samples.entry_bytes(problem)
        return 6 * n + 3 * m

    def num_lower_batches(self) -> int:
        return 1

    def begin(self, oracles: Oracles) -> dict[str, Any]:
        y, x = samples.zeros(oracles.lower), samples.zeros(oracles.upper)
        held = {"vector": y, "before": samples.point(oracles, y), "estimate": [[y, y, x], [y, x]]}
        return held | {"calls": 0, "seed": self.seed}

    def respond(
        self, oracles: Oracles, state: Any, lower_optimizer: Optimizers | None
    ) -> Directions:
        rate = self.rate(oracles, lower_optimizer)
        blocks, calls = rows.of_both(oracles, self.batch_size, "SRBA"), state["calls"]
        period = self.period or max(1, sum(r.rows for r in blocks) // (2 * self.batch_size))
        given, batches = [state["vector"], rate], None
        if calls % period:
            given += [state["before"], state["estimate"]]
            batches = rows.batches(blocks, rows.drawn(blocks, state["seed"], calls))
        key = type(self), len(given)
        told, of_g, of_f, vector = samples.at_once(oracles, key, _step, *given, batches=batches)
        after = state | {"calls": calls + 1, "estimate": [list(of_g), list(of_f)]}
        after |= {"before": samples.point(oracles, state["vector"]), "vector": vector}
        return samples.move_both(oracles, told, of_g, of_f, after, num_products=len(given) // 2)


def _step(
    here: Oracles, upper: Tree, lower: Tree, vector: Tensor, rate: Tensor, *last: Any
) -> tuple[Any, ...]:
    """The estimate of these rows alone, or the last one and their difference."""
    told, of_f = samples.of_upper(here, upper, lower)
    of_g = samples.of_lower(here, upper, lower, vector)
    if last:
        (x, y, v), (was_g, was_f) = last
        old_g = samples.of_lower(here, leaves(x), leaves(y), v)
        old_f = samples.of_upper(here, leaves(x), leaves(y))[1]
        of_g = type(of_g)(*(d + (g - o) for d, g, o in zip(was_g, of_g, old_g, strict=True)))
        of_f = type(of_f)(*(d + (g - o) for d, g, o in zip(was_f, of_f, old_f, strict=True)))
    return told, of_g, of_f, samples.stepped_vector(vector, of_g.product + of_f.by_lower, rate)

r"""`SABA`: SOBA with the variance taken out by tables of past samples.

A table keeps the last sample $g_i$ that each block $i$ of the rows gave of a derivative, and their
weighted mean $\bar g$. At a block with the new sample $g$,

$$ d = g - g_i + \bar g, \qquad \bar g \mathrel{+}= w_i (g - g_i), \qquad g_i \leftarrow g , $$

takes the place of $g$ in all five derivatives of `SOBA`. With blocks of one size the mean of d over the
blocks is the full derivative whatever the table holds. Its variance vanishes where the iterates come to
rest.
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
from bilevel.tree import Tree


@final
@explained_settings
@dataclass(frozen=True)
class SABA(Stochastic):
    """Stochastic average bilevel algorithm: SOBA with a table of gradients for each block of rows.

    It converges with constant step sizes. Its batch is all rows (`train(batch_size=None)`), which it
    cuts into blocks. Memory: with n lower and m upper entries, 2 n + m numbers for each block of the
    lower data and n + m for each of the upper data, one more of each, and n for v; `memory` says it in
    bytes. With several ranks each cuts its own rows: other minibatches than those of one process.

    Args:
        batch_size: rows of a block, of either level.
        step_size: of v; `None` for the learning rate that the lower optimizer has now.
        seed: of the order of the blocks.

    Raises:
        ValueError: if a setting is out of range, or there is neither a step size nor an optimizer.

    Example:
        >>> SABA(batch_size=64).seed
        0

    References:
        A framework for bilevel optimization that enables stochastic and global variance reduction
        algorithms (Dagreou, Ablin, Vaiter, Moreau, 2022), https://arxiv.org/abs/2201.13409, Eq. 14.
        Differs from the paper in: tables begin at zero; blocks come in shuffled passes.
    """

    moves_lower: ClassVar[bool] = True

    batch_size: int = 64
    step_size: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        whole("batch_size", self.batch_size)
        whole("seed", self.seed, *SEEDS)
        check_step_size(self.step_size)

    def memory(self, problem: Problem, upper_batch: Any, lower_batch: Any) -> int:
        """The bytes that the solver's tensors will take for these data, all rows of either level."""
        n, m = samples.entry_bytes(problem)
        blocks = rows.of_both(Oracles(problem, upper_batch, [lower_batch]), self.batch_size, "SABA")
        return n + (blocks[0].count + 1) * (2 * n + m) + (blocks[1].count + 1) * (n + m)

    def num_lower_batches(self) -> int:
        return 1

    def begin(self, oracles: Oracles) -> dict[str, Any]:
        y, x = samples.zeros(oracles.lower), samples.zeros(oracles.upper)
        blocks = rows.of_both(oracles, self.batch_size, "SABA")
        tables = [[row] * (r.count + 1) for row, r in zip(([y, y, x], [y, x]), blocks, strict=True)]
        return {"calls": 0, "seed": self.seed, "vector": y, "tables": tables}

    def respond(
        self, oracles: Oracles, state: Any, lower_optimizer: Optimizers | None
    ) -> Directions:
        rate = self.rate(oracles, lower_optimizer)
        blocks, tables = rows.of_both(oracles, self.batch_size, "SABA"), state["tables"]
        numbers = rows.drawn(blocks, state["seed"], state["calls"])
        given = rows.looked_up(oracles, tables, blocks, numbers)
        batches = rows.batches(blocks, numbers)
        told, of_g, of_f, new, means, vector = samples.at_once(
            oracles, type(self), _step, state["vector"], given, rate, batches=batches
        )
        tables = [rows.replaced(*row) for row in zip(tables, numbers, new, means, strict=True)]
        after = state | {"calls": state["calls"] + 1, "vector": vector, "tables": tables}
        return samples.move_both(oracles, told, of_g, of_f, after, num_products=1)


def _step(
    here: Oracles, upper: Tree, lower: Tree, vector: Tensor, given: Any, rate: Tensor
) -> tuple[Any, ...]:
    """SOBA's step with reduced variance; the new rows of the tables and their means."""
    told, of_f = samples.of_upper(here, upper, lower)
    of_g = samples.of_lower(here, upper, lower, vector)
    new = [list(of_g), list(of_f)]
    reduced, means = zip(*map(rows.reduced, new, given), strict=True)
    of_g, of_f = samples.OfLower(*reduced[0]), samples.OfUpper(*reduced[1])
    vector = samples.stepped_vector(vector, of_g.product + of_f.by_lower, rate)
    return told, of_g, of_f, new, means, vector

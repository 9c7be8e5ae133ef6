"""Minibatches that a solver takes out of all rows by itself: contiguous blocks in a random order."""

from functools import lru_cache
from typing import Any, final

import optree
import torch
from torch import Tensor

from bilevel.oracles import Oracles
from bilevel.solvers.single_loop.samples import as_scalar


@final
class RowBlocks:
    """The rows of a batch, cut into blocks of one size; the last one may be smaller.

    Args:
        batch: a pytree; its tensors with dimensions hold the rows. Without one there is one block.
        size: rows of a block.
        solver: name of the solver.

    Attributes:
        rows: how many rows there are; 1 where there are none to count.
        count: how many blocks.

    Raises:
        ValueError: if the tensors have different numbers of rows.
    """

    def __init__(self, batch: Any, size: int, solver: str) -> None:
        leaves: list[Any] = optree.tree_leaves(batch)
        rows = {len(leaf) for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim}
        if len(rows) > 1:
            raise ValueError(
                f"`{solver}` takes its minibatches out of all rows, but the tensors of the batch have "
                f"{sorted(rows)} rows; give them one first dimension, or take `SOBA`, which reads "
                "batches as they come"
            )
        self._batch = batch
        self._size = size
        self._solver = solver
        self.rows = rows.pop() if rows else 1
        self.count = -(-self.rows // size)

    def refuse_other_rows(self, count: int) -> None:
        """Refuse a batch with another number of blocks than one before had.

        Raises:
            ValueError: if there are not `count` blocks.
        """
        if count != self.count:
            raise ValueError(
                f"`{self._solver}` needs all rows at every step, in the same order, but had {count} "
                f"blocks of up to {self._size} rows and now has {self.count}; train with "
                "`batch_size=None`, or take `SOBA`, which reads batches as they come"
            )

    def block(self, number: int) -> Any:
        """The rows of a block; views where tensors can be."""
        if self.count == 1:
            return self._batch
        rows = slice(number * self._size, (number + 1) * self._size)
        return optree.tree_map(
            lambda leaf: leaf[rows] if isinstance(leaf, Tensor) and leaf.ndim else leaf, self._batch
        )

    def weight(self, number: int) -> float:
        """The share of the rows that a block holds."""
        return min(self._size, self.rows - number * self._size) / self.rows


def of_both(oracles: Oracles, size: int, solver: str) -> list[RowBlocks]:
    """The blocks of the lower and of the upper data."""
    batches = oracles.lower_batches[0], oracles.upper_batch
    return [RowBlocks(batch, size, solver) for batch in batches]


def drawn(rows: list[RowBlocks], seed: int, call: int) -> list[int]:
    """The block of each level at a call; every pass goes through all once, in an order of its own."""
    places = enumerate(rows)
    return [_order(seed, i, call // r.count, r.count)[call % r.count] for i, r in places]


def batches(rows: list[RowBlocks], numbers: list[int]) -> tuple[Any, Any]:
    """The upper and the lower batch that these blocks are."""
    lower, upper = (blocks.block(i) for blocks, i in zip(rows, numbers, strict=True))
    return upper, lower


def looked_up(
    oracles: Oracles, tables: list[Any], rows: list[RowBlocks], numbers: list[int]
) -> list[tuple[Any, Any, Tensor]]:
    """What the tables hold of these blocks: their rows, the means and the weights in them.

    Raises:
        ValueError: if the tables are of other data.
    """
    found = []
    for table, number, blocks in zip(tables, numbers, rows, strict=True):
        blocks.refuse_other_rows(len(table) - 1)
        found.append((table[number], table[-1], as_scalar(oracles, blocks.weight(number))))
    return found


def reduced(new: list[Tensor], held: tuple[Any, Any, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """A sample without what its block says apart from others, and the table's new mean."""
    old, mean, weight = held
    away = [g - was for g, was in zip(new, old, strict=True)]
    pairs = list(zip(away, mean, strict=True))
    return [a + g for a, g in pairs], [g + weight * a for a, g in pairs]


def replaced(table: list[Any], number: int, row: Any, mean: Any) -> list[Any]:
    """A table with another row and another mean, which is its last entry; rows are shared."""
    return [*table[:number], row, *table[number + 1 : -1], mean]


@lru_cache(maxsize=64)
def _order(seed: int, level: int, epoch: int, count: int) -> list[int]:
    generator = torch.Generator().manual_seed(hash((seed, level, epoch)) % 2**62)
    order: list[int] = torch.randperm(count, generator=generator).tolist()
    return order

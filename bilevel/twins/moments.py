"""An optimizer's state as what is differentiated, the *moments*, and what is counted."""

from collections.abc import Callable
from typing import Any

import optree
import torch
from torch import Tensor


def _is_moment(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def moments_of(state: Any) -> list[Tensor]:
    """The floating-point tensors of an optimizer state, in a fixed order."""
    leaves: list[Any] = optree.tree_leaves(state)
    return [leaf for leaf in leaves if _is_moment(leaf)]


def map_moments(function: Callable[[Tensor], Tensor], state: Any) -> Any:
    """The state with a function of each moment in its place."""
    return optree.tree_map(lambda s: function(s) if _is_moment(s) else s, state)


def replace_moments(state: Any, moments: list[Tensor]) -> Any:
    """The state with other moments."""
    new = iter(moments)
    return map_moments(lambda _: next(new), state)


def live(held: Any) -> Any:
    """Numbers that are not 0 as tensors: a graph reads them, so that they may move."""
    return optree.tree_map(
        lambda v: (
            torch.tensor(float(v), dtype=torch.double) if isinstance(v, (int, float)) and v else v
        ),
        held,
    )


def count_tensors(state: Any) -> Any:
    """Counts of steps as tensors."""
    return optree.tree_map(lambda v: torch.tensor(int(v)) if isinstance(v, float) else v, state)

"""Random directions of the upper variables, the same on every machine and rank."""

from collections.abc import Iterator
from typing import Any

import torch

from bilevel.tree import Tree


def random_directions(state: dict[str, Any], upper: Tree, count: int) -> Iterator[Tree]:
    """Standard normal directions; another call (`state["calls"]`) draws others.

    Args:
        state: the solver's state: its seed and the number of calls before this one.
        upper: the upper variables.
        count: how many directions.
    """
    generator = torch.Generator().manual_seed(hash((state["seed"], state["calls"])) % 2**62)
    for _ in range(count):
        yield {
            name: torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)
            for name, x in upper.items()
        }


def next_call(state: dict[str, Any]) -> dict[str, Any]:
    """The state after a call."""
    return {**state, "calls": state["calls"] + 1}

"""What a problem of `benchmarks.dropped_term` is, and what all of them are solved by."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from bilevel import Alternating, Problem, Solver, Unrolled
from bilevel.tree import Tree

SEEDS = 3
FIRST: dict[str, Solver] = {
    "Alternating": Alternating(),
    **{f"Unrolled({n})": Unrolled(num_steps=n) for n in (1, 5, 20)},
}


@final
@dataclass(frozen=True)
class Case:
    """A problem, how it is trained, and what is known of it exactly.

    Attributes:
        name: short name, in the records.
        title: a row of the table.
        make: the problem with the initial variables of a seed; with `together`, of all seeds.
        data: training data of a seed.
        judge: exact log-likelihood of held-out data, one number per seed that is trained at once.
        target: gradient of what the upper level should descend, at the problem's point.
        probe: the problem, at the same variables, that the response is measured in.
        probe_batch: its upper and lower batch.
        solver: what measures it.
        solvers: those that are compared, by name.
        steps: upper steps.
        lower_steps: lower steps before each.
        rate: learning rate of both levels.
        betas: of Adam.
        batch_size: rows per batch, `None` for all.
        compile: whether the steps are compiled.
        together: whether all seeds are trained at once, as blocks of the same tables.
        ceiling: the largest log-likelihood, if it is known.
        reference: the problem without a lower level whose gradient an exact response gives.
        shares: whether the probe looks at every tensor of the upper level by itself.
        ahead: whether the probe's solver looks from variables ahead of the problem's, so that its own
            norms count.
    """

    name: str
    title: str
    make: Callable[[int], Problem]
    data: Callable[[int], Tensor]
    judge: Callable[[Any], list[float]]
    target: Callable[[Any, Any], Tree]
    probe: Callable[[Any], Any]
    probe_batch: Callable[[Any], tuple[Any, Any]]
    solver: Solver
    solvers: dict[str, Solver]
    steps: int
    lower_steps: int
    rate: float
    betas: tuple[float, float]
    batch_size: int | None = None
    compile: bool = False
    together: bool = False
    ceiling: float | None = None
    reference: Callable[[int], Problem] | None = None
    shares: bool = False
    ahead: bool = False


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)

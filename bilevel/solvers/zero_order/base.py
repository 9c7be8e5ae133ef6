"""`ZeroOrder`: what solvers share that displace the upper variables and run the lower level there."""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor

from bilevel.optimizers import Optimizers
from bilevel.oracles import Oracles
from bilevel.solvers.answers import Response, ResponseProduct
from bilevel.solvers.first_order.base import FirstOrder
from bilevel.solvers.first_order.runs import lower_run
from bilevel.solvers.step_sizes import Rates
from bilevel.solvers.zero_order.directions import next_call, random_directions
from bilevel.tree import Tree, add, norm


class ZeroOrder(FirstOrder):
    """Abstract base of the solvers that add up slopes along random directions of the upper variables.

    Attributes:
        num_steps: number of steps of a lower run, from the current lower variables.
        seed: of the directions.
    """

    num_steps: int
    seed: int

    def num_lower_batches(self) -> int:
        return self.num_steps

    def begin(self, oracles: Oracles) -> dict[str, Any]:
        return {"seed": self.seed, "calls": 0}

    @abstractmethod
    def estimate(
        self, oracles: Oracles, state: Any, rates: Rates, answer: Tree, cotangent: Tree
    ) -> Tree:
        """The response term.

        Args:
            oracles: the losses.
            state: as `begin` returns it.
            rates: the step sizes of a lower run.
            answer: the end of the lower run at the upper variables as they are.
            cotangent: the gradient of the upper loss there in the lower variables.
        """

    def respond(self, oracles: Oracles, state: Any, lower_optimizer: Optimizers | None) -> Response:
        rates, upper = self.rates(oracles, lower_optimizer), oracles.upper
        answer, _ = lower_run(oracles, oracles.lower, rates, self.num_steps)
        _, _, residual = oracles.partials("lower", upper, answer)

        def vjp(cotangent: Tree) -> ResponseProduct:
            product = self.estimate(oracles, state, rates, answer, cotangent)
            return ResponseProduct(product, state=next_call(state))

        return Response(answer, vjp, norm(residual))

    @final
    def displaced_run(
        self, oracles: Oracles, rates: Rates, direction: Tree, length: float
    ) -> tuple[Tree, Tree]:
        """Upper variables displaced along a direction, and the end of the lower run at them."""
        there = {n: x.detach() for n, x in add(oracles.upper, direction, length).items()}
        end, _ = lower_run(oracles, oracles.lower, rates, self.num_steps, upper=there)
        return there, end


def along_random_directions(
    state: dict[str, Any], upper: Tree, count: int, slope: Callable[[Tree], Tensor]
) -> Tree:
    """The sum of random directions, each times the slope along it."""
    total = {name: torch.zeros_like(x) for name, x in upper.items()}
    for u in random_directions(state, upper, count):
        along = slope(u)
        total = {name: g + along.to(g.dtype) * u[name] for name, g in total.items()}
    return total

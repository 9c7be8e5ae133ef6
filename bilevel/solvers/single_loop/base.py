"""`Stochastic`: what the solvers have in common that take steps on a linear system of their own."""

from contextlib import AbstractContextManager
from typing import final

import torch
from torch import Tensor

from bilevel.losses.true_gradient import refuse_no_lower_loss
from bilevel.optimizers import Optimizers
from bilevel.oracles import Oracles
from bilevel.solvers.base import Solver
from bilevel.solvers.step_sizes import own_step_sizes


class Stochastic(Solver):
    """Abstract base of the solvers that approach the linear system by steps on minibatches.

    Attributes:
        step_size: of these steps; `None` for the learning rate that the lower optimizer has now.
    """

    step_size: float | None

    def approximates(self) -> bool:
        return True

    def context(self, oracles: Oracles) -> AbstractContextManager[None]:
        name = type(self).__name__
        refuse_no_lower_loss(oracles.problem, f"`{name}`")
        return oracles.differentiated_twice(name)

    def check(self, oracles: Oracles, lower_optimizer: Optimizers | None) -> None:
        with self.context(oracles):
            self.rate(oracles, lower_optimizer)

    @final
    def rate(self, oracles: Oracles, lower_optimizer: Optimizers | None) -> Tensor:
        """The step size of the linear system's variable, a scalar or one number for each entry.

        It is 0 for the entries of a lower variable that no optimizer moves: the system leaves it out.

        Args:
            oracles: the problem.
            lower_optimizer: the running optimizer(s) of the lower level.

        Raises:
            ValueError: if there is neither a step size nor an optimizer, or the optimizers move other
                variables or have options that are learned.
        """
        name, purpose = type(self).__name__, "solves a linear system"
        found = own_step_sizes(oracles, self.step_size, lower_optimizer, name, purpose)
        variables = oracles.slots.variables("lower")
        rates = [found.get(name, 0.0) for name in variables]
        if len({id(rate) if isinstance(rate, Tensor) else rate for rate in rates}) == 1:
            like = next(iter(variables.values()))
            return torch.as_tensor(rates[0], dtype=like.dtype, device=like.device)
        pairs = zip(variables.values(), rates, strict=True)
        return torch.cat([p.new_full((p.numel(),), float(rate)) for p, rate in pairs])

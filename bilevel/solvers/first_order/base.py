"""`FirstOrder`: what solvers that take gradient steps of their own on the lower level have in common."""

from contextlib import AbstractContextManager, nullcontext
from typing import final

from bilevel.losses.true_gradient import refuse_no_true_loss
from bilevel.optimizers import Optimizers
from bilevel.oracles import Oracles
from bilevel.solvers.base import Solver
from bilevel.solvers.step_sizes import Rates, own_step_sizes


class FirstOrder(Solver):
    """Abstract base of the solvers that need first derivatives only, and copies of the lower variables.

    Attributes:
        step_size: of the copies; `None` for the learning rate that the lower optimizer has now.
    """

    step_size: float | None

    def approximates(self) -> bool:
        return True

    def context(self, oracles: Oracles) -> AbstractContextManager[None]:
        variables = oracles.slots.variables("lower")
        refuse_no_true_loss(oracles.problem, variables, type(self).__name__)
        return nullcontext()

    def check(self, oracles: Oracles, lower_optimizer: Optimizers | None) -> None:
        with self.context(oracles):
            self.rates(oracles, lower_optimizer)

    @final
    def rates(self, oracles: Oracles, lower_optimizer: Optimizers | None) -> Rates:
        """The step size of each lower variable's copy."""
        name, purpose = type(self).__name__, "moves a copy of the lower variables"
        return own_step_sizes(oracles, self.step_size, lower_optimizer, name, purpose)

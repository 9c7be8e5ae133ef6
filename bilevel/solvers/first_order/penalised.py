"""One run of a penalised copy of the lower level, and the hypergradient that it gives."""

from typing import final

from bilevel.oracles import Oracles
from bilevel.solvers.answers import Response, ResponseProduct
from bilevel.solvers.first_order.advice import secant_curvature, warn_if_small
from bilevel.solvers.first_order.runs import last_batch, lower_run
from bilevel.solvers.step_sizes import Rates
from bilevel.tree import Tree, norm


@final
class Penalised:
    """The steps of a copy on F / penalty + G, from where it was left.

    Args:
        oracles: the losses.
        penalty: the weight of the lower loss.
        start: where the copy is.
        step_sizes: of its variables.
        num_steps: how many steps it takes.
    """

    def __init__(
        self, oracles: Oracles, penalty: float, start: Tree, step_sizes: Rates, num_steps: int
    ) -> None:
        self.oracles = oracles
        self.penalty = penalty
        self.start = start
        pull = 1 / penalty
        self.end, self.pulled = lower_run(oracles, start, step_sizes, num_steps, pull=pull)

    def response(self, solver: str, calls: int) -> Response:
        """The upper loss at the copy, and penalty times the difference of the two dG/dx.

        Args:
            solver: name of the solver, for a warning at the first call.
            calls: calls before this one.
        """
        oracles, batch = self.oracles, last_batch(self.oracles)
        _, here, residual = oracles.partials("lower", oracles.upper, oracles.lower, batch)

        def vjp(cotangent: Tree) -> ResponseProduct:
            _, there, grads = oracles.partials("lower", oracles.upper, self.end, batch)
            if not calls:  # the copy began at the lower variables
                upper = secant_curvature(self.start, self.end, self.pulled, cotangent)
                lower = secant_curvature(self.start, self.end, residual, grads)
                warn_if_small(solver, self.penalty, upper, lower)
            product = {name: self.penalty * (g - here[name]) for name, g in there.items()}
            return ResponseProduct(product, state={"calls": calls + 1, "copy": self.end})

        return Response(self.end, vjp, lower_residual=norm(residual))

r"""`Alternating`: the upper level treats the lower variables as constants.

$$ \frac{d}{dx} F(x, \hat y(x)) \approx \partial_x F(x, y) $$

Exact where $\partial_y F = 0$ at the lower solution (minimax problems, realisable BiDVL); elsewhere
the best-response term is dropped. Cost: one gradient of the upper loss.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, final

from bilevel.arguments import explained_settings
from bilevel.optimizers import Optimizers
from bilevel.oracles import Oracles
from bilevel.solvers.base import Response, Solver


@final
@explained_settings
@dataclass(frozen=True)
class Alternating(Solver):
    """First-order solver: drops the best-response Jacobian.

    Example:
        >>> Alternating()
        Alternating()
    """

    drops_response: ClassVar[bool] = True

    def respond(self, oracles: Oracles, state: Any, lower_optimizer: Optimizers | None) -> Response:
        return Response(lower=oracles.lower, vjp=None)

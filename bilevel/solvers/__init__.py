"""The three families of solvers: alternating, unrolled, implicit."""

from bilevel.solvers.alternating import Alternating
from bilevel.solvers.base import (
    Hypergradient,
    Response,
    ResponseProduct,
    Solver,
    Stats,
    UnrolledSteps,
)
from bilevel.solvers.compiled import Compiled
from bilevel.solvers.implicit import Implicit
from bilevel.solvers.unrolled import Unrolled

__all__ = [
    "Alternating",
    "Compiled",
    "Hypergradient",
    "Implicit",
    "Response",
    "ResponseProduct",
    "Solver",
    "Stats",
    "Unrolled",
    "UnrolledSteps",
]

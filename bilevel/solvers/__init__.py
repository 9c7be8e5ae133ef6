"""The three families of solvers: alternating, unrolled, implicit."""

from bilevel.solvers.alternating import Alternating
from bilevel.solvers.base import (
    Directions,
    Hypergradient,
    Response,
    ResponseProduct,
    Solver,
    Stats,
    UnrolledSteps,
)
from bilevel.solvers.compiled import Compiled
from bilevel.solvers.first_order import BDA, BOME, F2BA, F2SA, GPBGD, MEHA, VPBGD, F2SAp
from bilevel.solvers.implicit import Implicit
from bilevel.solvers.single_loop import (
    FSLA,
    MASOBA,
    MRBO,
    SABA,
    SOBA,
    SRBA,
    SUSTAIN,
    TTSA,
    AmIGO,
    StocBiO,
)
from bilevel.solvers.unrolled import Unrolled

__all__ = [
    "BDA",
    "BOME",
    "F2BA",
    "F2SA",
    "FSLA",
    "GPBGD",
    "MASOBA",
    "MEHA",
    "MRBO",
    "SABA",
    "SOBA",
    "SRBA",
    "SUSTAIN",
    "TTSA",
    "VPBGD",
    "Alternating",
    "AmIGO",
    "Compiled",
    "Directions",
    "F2SAp",
    "Hypergradient",
    "Implicit",
    "Response",
    "ResponseProduct",
    "Solver",
    "Stats",
    "StocBiO",
    "Unrolled",
    "UnrolledSteps",
]

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
from bilevel.solvers.iaptt import IAPTT
from bilevel.solvers.implicit import Implicit
from bilevel.solvers.one_step import DARTS, SAMA
from bilevel.solvers.rtho import RTHO
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
from bilevel.solvers.zero_order import PZOBO, EvolutionStrategies

__all__ = [
    "BDA",
    "BOME",
    "DARTS",
    "F2BA",
    "F2SA",
    "FSLA",
    "GPBGD",
    "IAPTT",
    "MASOBA",
    "MEHA",
    "MRBO",
    "PZOBO",
    "RTHO",
    "SABA",
    "SAMA",
    "SOBA",
    "SRBA",
    "SUSTAIN",
    "TTSA",
    "VPBGD",
    "Alternating",
    "AmIGO",
    "Compiled",
    "Directions",
    "EvolutionStrategies",
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

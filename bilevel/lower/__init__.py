"""The lower level as it comes: solved by anything, its solution as a layer, many side by side."""

from bilevel.lower.ensemble import Hypergradients, hypergradients
from bilevel.lower.layer import best_response, hyperobjective
from bilevel.lower.level import LowerLevel, LowerSolver
from bilevel.lower.tasks import Tasks

__all__ = [
    "Hypergradients",
    "LowerLevel",
    "LowerSolver",
    "Tasks",
    "best_response",
    "hypergradients",
    "hyperobjective",
]

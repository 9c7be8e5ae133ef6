"""The lower level as it comes: solved by anything, and its solution as a differentiable layer."""

from bilevel.lower.layer import best_response, hyperobjective
from bilevel.lower.level import LowerLevel, LowerSolver

__all__ = ["LowerLevel", "LowerSolver", "best_response", "hyperobjective"]

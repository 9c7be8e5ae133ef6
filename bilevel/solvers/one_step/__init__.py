"""Solvers that look one lower step ahead: no second derivatives, no more memory than a gradient."""

from bilevel.solvers.one_step.darts import DARTS
from bilevel.solvers.one_step.sama import SAMA

__all__ = ["DARTS", "SAMA"]

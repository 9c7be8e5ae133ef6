"""Solvers that only whole trainings can judge: their variables of their own need many calls."""

from collections.abc import Mapping

from bilevel.solvers import Solver

TRAINED: Mapping[str, Solver] = {}
"""By the name they have on the command line."""

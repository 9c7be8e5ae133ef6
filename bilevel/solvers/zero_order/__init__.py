"""Zero-order solvers: values of a procedure at displaced upper variables, no derivative through it."""

from bilevel.solvers.zero_order.evolution_strategies import EvolutionStrategies
from bilevel.solvers.zero_order.pzobo import PZOBO

__all__ = ["PZOBO", "EvolutionStrategies"]

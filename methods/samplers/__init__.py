"""Samplers of any energy of real visibles: Langevin dynamics and Hamiltonian Monte Carlo."""

from bilevel.methods.samplers.base import ChainEnds, ChainState, Sampler
from bilevel.methods.samplers.hamiltonian import HamiltonianMonteCarlo
from bilevel.methods.samplers.langevin import Langevin

__all__ = ["ChainEnds", "ChainState", "HamiltonianMonteCarlo", "Langevin", "Sampler"]

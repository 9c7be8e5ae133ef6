"""Single-loop and stochastic solvers, one file each."""

from bilevel.solvers.single_loop.amigo import AmIGO
from bilevel.solvers.single_loop.fsla import FSLA
from bilevel.solvers.single_loop.masoba import MASOBA
from bilevel.solvers.single_loop.mrbo import MRBO
from bilevel.solvers.single_loop.saba import SABA
from bilevel.solvers.single_loop.soba import SOBA
from bilevel.solvers.single_loop.srba import SRBA
from bilevel.solvers.single_loop.stocbio import StocBiO
from bilevel.solvers.single_loop.sustain import SUSTAIN
from bilevel.solvers.single_loop.ttsa import TTSA

__all__ = [
    "FSLA",
    "MASOBA",
    "MRBO",
    "SABA",
    "SOBA",
    "SRBA",
    "SUSTAIN",
    "TTSA",
    "AmIGO",
    "StocBiO",
]

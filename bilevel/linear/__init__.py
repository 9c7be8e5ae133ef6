"""Linear solvers for `Implicit`, each from products with the operator alone."""

from bilevel.linear.base import LinearSolution, LinearSolver
from bilevel.linear.cholesky import Cholesky
from bilevel.linear.conjugate_gradient import ConjugateGradient
from bilevel.linear.gmres import GMRES
from bilevel.linear.identity import Identity
from bilevel.linear.neumann import Neumann

__all__ = [
    "GMRES",
    "Cholesky",
    "ConjugateGradient",
    "Identity",
    "LinearSolution",
    "LinearSolver",
    "Neumann",
]

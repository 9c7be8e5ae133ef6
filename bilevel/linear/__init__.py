"""Linear solvers for `Implicit`, each from products with the operator alone."""

from bilevel.linear.base import LinearSolution, LinearSolver
from bilevel.linear.bicgstab import BiCGStab
from bilevel.linear.cholesky import Cholesky
from bilevel.linear.conjugate_gradient import ConjugateGradient
from bilevel.linear.ekfac import EKFAC
from bilevel.linear.fixed_point import FixedPoint
from bilevel.linear.gmres import GMRES
from bilevel.linear.identity import T1T2, Identity
from bilevel.linear.kfac import KFAC
from bilevel.linear.krylov import Krylov
from bilevel.linear.minres import MINRES
from bilevel.linear.neumann import Neumann
from bilevel.linear.normal_cg import NormalCG
from bilevel.linear.nystrom import Nystrom
from bilevel.linear.scipy_solver import SciPy

__all__ = [
    "EKFAC",
    "GMRES",
    "KFAC",
    "MINRES",
    "T1T2",
    "BiCGStab",
    "Cholesky",
    "ConjugateGradient",
    "FixedPoint",
    "Identity",
    "Krylov",
    "LinearSolution",
    "LinearSolver",
    "Neumann",
    "NormalCG",
    "Nystrom",
    "SciPy",
]

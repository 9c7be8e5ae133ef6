"""Bilevel optimization in PyTorch, and energy-based latent-variable models trained by it."""

import pathlib as _pathlib

if not (_pathlib.Path(__file__).parent / "methods" / "__init__.py").is_file():
    # a checkout that could not make the symbolic link `bilevel/methods`
    __path__.append(str(_pathlib.Path(__file__).resolve().parent.parent))

from bilevel.batches import Batches
from bilevel.check import (
    Certificate,
    Comparison,
    HypergradientCheck,
    certify,
    check_hypergradient,
    compare,
)
from bilevel.check.explaining import Explanation, explain
from bilevel.condition import ConditionProblem
from bilevel.constraints import L1, Affine, Box, Constraint, Simplex
from bilevel.errors import CheckpointError, DivergenceError, HypergradientError, Result
from bilevel.linear import (
    EKFAC,
    GMRES,
    KFAC,
    MINRES,
    T1T2,
    BiCGStab,
    Cholesky,
    ConjugateGradient,
    FixedPoint,
    Identity,
    LinearSolver,
    Neumann,
    NormalCG,
    Nystrom,
    SciPy,
)
from bilevel.loop.step import Step
from bilevel.lower import (
    Hypergradients,
    LowerLevel,
    Tasks,
    best_response,
    hypergradients,
    hyperobjective,
)
from bilevel.moved import follow as _follow
from bilevel.oracles import Oracles
from bilevel.pieces import Pieces
from bilevel.problem import Problem
from bilevel.second_order import check_second_order
from bilevel.solvers import (
    BDA,
    BOME,
    DARTS,
    F2BA,
    F2SA,
    FSLA,
    GPBGD,
    IAPTT,
    MASOBA,
    MEHA,
    MRBO,
    PZOBO,
    RTHO,
    SABA,
    SAMA,
    SOBA,
    SRBA,
    SUSTAIN,
    TTSA,
    VPBGD,
    Alternating,
    AmIGO,
    Compiled,
    Directions,
    EvolutionStrategies,
    F2SAp,
    Hypergradient,
    Implicit,
    Response,
    ResponseProduct,
    Solver,
    Stats,
    StocBiO,
    Unrolled,
)
from bilevel.state import State
from bilevel.training import train

_follow()

__version__ = "0.1.0"
__all__ = [
    "BDA",
    "BOME",
    "DARTS",
    "EKFAC",
    "F2BA",
    "F2SA",
    "FSLA",
    "GMRES",
    "GPBGD",
    "IAPTT",
    "KFAC",
    "L1",
    "MASOBA",
    "MEHA",
    "MINRES",
    "MRBO",
    "PZOBO",
    "RTHO",
    "SABA",
    "SAMA",
    "SOBA",
    "SRBA",
    "SUSTAIN",
    "T1T2",
    "TTSA",
    "VPBGD",
    "Affine",
    "Alternating",
    "AmIGO",
    "Batches",
    "BiCGStab",
    "Box",
    "Certificate",
    "CheckpointError",
    "Cholesky",
    "Comparison",
    "Compiled",
    "ConditionProblem",
    "ConjugateGradient",
    "Constraint",
    "Directions",
    "DivergenceError",
    "EvolutionStrategies",
    "Explanation",
    "F2SAp",
    "FixedPoint",
    "Hypergradient",
    "HypergradientCheck",
    "HypergradientError",
    "Hypergradients",
    "Identity",
    "Implicit",
    "LinearSolver",
    "LowerLevel",
    "Neumann",
    "NormalCG",
    "Nystrom",
    "Oracles",
    "Pieces",
    "Problem",
    "Response",
    "ResponseProduct",
    "Result",
    "SciPy",
    "Simplex",
    "Solver",
    "State",
    "Stats",
    "Step",
    "StocBiO",
    "Tasks",
    "Unrolled",
    "best_response",
    "certify",
    "check_hypergradient",
    "check_second_order",
    "compare",
    "explain",
    "hypergradients",
    "hyperobjective",
    "train",
]

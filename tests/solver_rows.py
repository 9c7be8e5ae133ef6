"""The solvers of the contract: one row each, with what its answers must be worth.

A new solver adds a row in the section of its family. `tests/test_contract_solvers.py` and
`tests/core/compile/test_compiled_solvers.py` do the rest.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import scipy.sparse.linalg
import torch
import torchopt

from bilevel import (
    BDA,
    BOME,
    DARTS,
    EKFAC,
    F2BA,
    F2SA,
    FSLA,
    GMRES,
    GPBGD,
    IAPTT,
    KFAC,
    MASOBA,
    MEHA,
    MINRES,
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
    BiCGStab,
    Cholesky,
    ConjugateGradient,
    EvolutionStrategies,
    F2SAp,
    FixedPoint,
    Identity,
    Implicit,
    Neumann,
    NormalCG,
    Nystrom,
    Problem,
    SciPy,
    Solver,
    StocBiO,
    Unrolled,
)

Optimizer: TypeAlias = Callable[[Problem], torch.optim.Optimizer]


def sgd(problem: Problem) -> torch.optim.Optimizer:
    return torch.optim.SGD(problem.lower.parameters(), 0.05, momentum=0.9)


def adam(problem: Problem) -> torch.optim.Optimizer:
    return torch.optim.Adam(problem.lower.parameters(), 0.05)


def adamw(problem: Problem) -> torch.optim.Optimizer:
    return torch.optim.AdamW(problem.lower.parameters(), 0.05, weight_decay=0.1)


def plain(problem: Problem) -> torch.optim.Optimizer:
    return torch.optim.SGD(problem.lower.parameters(), 0.1)


@dataclass(frozen=True)
class Exact:
    """At the lower solution of the quadratic the answer is the closed form.

    Attributes:
        within: the largest relative error.
        solver: settings with which this holds, if they are not the row's own.
    """

    within: float = 1e-10
    solver: Solver | None = None


@dataclass(frozen=True)
class Falls:
    """At the lower solution of the quadratic the error falls with the work, as theory says.

    Attributes:
        rungs: the solver with more and more work (or a larger and larger multiplier).
        ratio: the error of a rung, divided by that of the rung before.
        rtol: how far from this ratio it may lie, relatively.
    """

    rungs: tuple[Solver, ...]
    ratio: float
    rtol: float = 0.1


@dataclass(frozen=True)
class SolverRow:
    """A solver of the contract.

    Attributes:
        solver: its settings, for the small problems of `tests/problems.py`.
        optimizer: the running lower optimizer it needs.
        procedure: whether the answer is the derivative of what it does at its settings, so that finite
            differences of its steps must agree.
        solution: settings with which the answer is the derivative of the lower solution, if there are.
        law: what the error is on the quadratic; `None` if it stays of the order of the response.
        calls: hypergradients in a row, each with the state of the one before, until auxiliary variables
            have settled there. A solver that moves the lower variables moves them in between.
        lower_step: by how much of its direction, then.
        silent: whether the response may be 0.
        alone: why two ranks are another run than one, if they are.
        refuses: problem -> the sentence with which it refuses, for problems that it cannot take.
    """

    solver: Solver
    optimizer: Optimizer | None = None
    procedure: bool = False
    solution: Solver | None = None
    law: Exact | Falls | None = None
    calls: int = 1
    lower_step: float = 0.1
    silent: bool = False
    alone: str = ""
    refuses: Mapping[str, str] = field(default_factory=dict)


def steps(count: int, mode: str = "reverse", truncate: int | None = None) -> Unrolled:
    return Unrolled(count, torchopt.sgd(0.2), mode=mode, truncate=truncate)  # type: ignore[arg-type]


# The smallest eigenvalue of the quadratic is 1/2: a step of 0.2 shrinks the error by 0.9.
GEOMETRIC = 0.9**20

# problems whose lower loss calls no layer with a lower variable as its weight
NO_LAYERS = dict.fromkeys(
    (
        "quadratic",
        "ridge",
        "nested dicts",
        "mixed dtypes",
        "spectral norm (parametrization)",
        "spectral norm (old style)",
    ),
    "found no layer",
)

ROWS: dict[str, SolverRow] = {
    # ------------------------------------------------------------------ alternating
    "alternating": SolverRow(Alternating(), silent=True),
    # ------------------------------------------------------------------ unrolled
    "unrolled torchopt sgd": SolverRow(
        Unrolled(3, torchopt.sgd(0.05)),
        procedure=True,
        law=Falls((steps(40), steps(60), steps(80)), GEOMETRIC),
    ),
    # from a fresh state Adam's first step is g / (|g| + eps), a kink that differences step over
    "unrolled torchopt adam": SolverRow(Unrolled(3, torchopt.adam(0.05, eps=0.1)), procedure=True),
    "unrolled running sgd": SolverRow(Unrolled(3), sgd, procedure=True),
    "unrolled running adam": SolverRow(Unrolled(3), adam, procedure=True),
    "unrolled running adamw": SolverRow(Unrolled(3), adamw, procedure=True),
    "recompute running adam": SolverRow(
        Unrolled(3, mode="recompute"),
        adam,
        procedure=True,
        law=Falls((steps(40, "recompute"), steps(60, "recompute")), GEOMETRIC),
    ),
    "forward running sgd": SolverRow(
        Unrolled(2, mode="forward"),
        sgd,
        procedure=True,
        law=Falls((steps(40, "forward"), steps(60, "forward")), GEOMETRIC),
    ),
    "truncated": SolverRow(
        Unrolled(3, torchopt.sgd(0.05), truncate=2),
        law=Falls((steps(90, truncate=40), steps(90, truncate=60)), GEOMETRIC),
    ),
    # ------------------------------------------------------------------ implicit
    "implicit cg": SolverRow(
        Implicit(ConjugateGradient(damping=1.0)),
        solution=Implicit(ConjugateGradient(rtol=1e-12)),
        law=Exact(solver=Implicit(ConjugateGradient(rtol=1e-12))),
    ),
    "implicit cholesky": SolverRow(
        Implicit(Cholesky()), solution=Implicit(Cholesky()), law=Exact(1e-12)
    ),
    "implicit gmres": SolverRow(
        Implicit(GMRES()),
        solution=Implicit(GMRES(rtol=1e-12)),
        law=Exact(solver=Implicit(GMRES(rtol=1e-12))),
    ),
    "implicit neumann": SolverRow(
        Implicit(Neumann(num_steps=5, step_size=0.05)),
        solution=Implicit(Neumann(num_steps=2000, step_size=0.1, rtol=1e-9)),
        law=Falls(
            tuple(Implicit(Neumann(num_steps=k, step_size=0.2)) for k in (40, 60, 80)), GEOMETRIC
        ),
    ),
    "implicit identity": SolverRow(Implicit(Identity())),
    # ------------------------------------------------------------------ implicit, more systems
    "implicit minres": SolverRow(
        Implicit(MINRES(max_steps=6, rtol=None)),
        law=Exact(solver=Implicit(MINRES(rtol=1e-12))),
    ),
    "implicit bicgstab": SolverRow(
        Implicit(BiCGStab(max_steps=4, rtol=None, damping=1.0)),
        law=Exact(solver=Implicit(BiCGStab(rtol=1e-12))),
    ),
    "implicit normal cg": SolverRow(
        Implicit(NormalCG(max_steps=4, rtol=None)),
        law=Exact(solver=Implicit(NormalCG(rtol=1e-12))),
    ),
    "implicit fixed point": SolverRow(
        Implicit(FixedPoint(step_size=1e-3, max_steps=5)),
        law=Exact(solver=Implicit(FixedPoint(step_size=0.2, rtol=1e-12))),
    ),
    "implicit nystrom": SolverRow(
        Implicit(Nystrom(rank=5, damping=1.0)),
        # of full rank it is exact but for the damping
        law=Exact(solver=Implicit(Nystrom(rank=50, damping=1e-12))),
    ),
    "implicit preconditioned cg": SolverRow(
        Implicit(ConjugateGradient(5, damping=1.0, preconditioner=Nystrom(rank=4))),
        law=Exact(solver=Implicit(ConjugateGradient(rtol=1e-12, preconditioner=Nystrom(rank=2)))),
    ),
    "implicit kfac": SolverRow(Implicit(KFAC(damping=1.0)), refuses=NO_LAYERS),
    "implicit ekfac": SolverRow(Implicit(EKFAC(damping=1.0)), refuses=NO_LAYERS),
    "implicit scipy": SolverRow(
        Implicit(SciPy(scipy.sparse.linalg.lsmr, options={"maxiter": 5})),
        law=Exact(solver=Implicit(SciPy(scipy.sparse.linalg.gmres, rtol=1e-12))),
    ),
    # ------------------------------------------------------------------ unrolled, more modes
    # finite differences: `test_unrolled_modes` compares these with reverse mode on every problem
    "checkpoint running adam": SolverRow(
        Unrolled(5, mode="checkpoint"),
        adam,
        law=Falls((steps(40, "checkpoint"), steps(60, "checkpoint")), GEOMETRIC),
    ),
    "mixed running adam": SolverRow(
        Unrolled(4, mode="mixed"),
        adam,
        law=Falls((steps(40, "mixed"), steps(60, "mixed")), GEOMETRIC),
    ),
    "iaptt": SolverRow(IAPTT(3, torchopt.sgd(0.05), step_size=0.1)),
    "rtho running sgd": SolverRow(RTHO(), sgd),
    "darts": SolverRow(DARTS(), adam),
    "sama running adam": SolverRow(SAMA(), adam),
    # ------------------------------------------------------------------ first order and penalty
    # begun at the lower solution, so that the copies of it are all that has to settle
    "f2sa": SolverRow(
        F2SA(penalty=100.0, step_size=0.05),
        law=Falls(tuple(F2SA(lam, 0.0, None, 50, 0.45) for lam in (1e2, 1e3)), 0.1),
    ),
    "f2ba": SolverRow(
        F2BA(penalty=100.0, num_steps=2),
        sgd,
        law=Falls(tuple(F2BA(lam, 50, 0.45) for lam in (1e2, 1e3)), 0.1),
    ),
    "f2sa-2": SolverRow(
        F2SAp(penalty=100.0, num_steps=2, step_size=0.05),
        law=Falls(tuple(F2SAp(2, lam, 40, 0.45) for lam in (10.0, 20.0)), 2.0**-2),
    ),
    "f2sa-3": SolverRow(
        F2SAp(order=3, penalty=100.0, num_steps=2, step_size=0.05),
        law=Falls(tuple(F2SAp(3, lam, 40, 0.45) for lam in (10.0, 20.0)), 2.0**-3, rtol=0.15),
    ),
    "bome": SolverRow(BOME(num_steps=2), sgd, silent=True),  # where the barrier is not needed
    "v-pbgd": SolverRow(
        VPBGD(step_size=0.05),
        calls=60,
        lower_step=0.023,
        law=Falls(tuple(VPBGD(gamma, step_size=0.05) for gamma in (10.0, 20.0)), 0.5),
    ),
    "g-pbgd": SolverRow(GPBGD()),
    "meha": SolverRow(
        MEHA(step_size=0.05),
        calls=60,
        lower_step=0.0105,
        law=Falls(tuple(MEHA(c, 0.0, 4.0, step_size=0.2) for c in (25.0, 50.0)), 0.5),
    ),
    "bda": SolverRow(
        BDA(3), sgd, law=Falls(tuple(BDA(steps, step_size=0.4) for steps in (60, 120)), 0.5)
    ),
    # ------------------------------------------------------------------ single loop, stochastic
    # with one minibatch of all rows the error of v shrinks by 0.78 at a step of 0.44
    "soba": SolverRow(SOBA(), plain, calls=110, law=Exact(solver=SOBA(step_size=0.44))),
    "masoba": SolverRow(
        MASOBA(weight=0.5), plain, calls=110, law=Exact(solver=MASOBA(0.5, step_size=0.44))
    ),
    "fsla": SolverRow(FSLA(), plain, calls=110, law=Exact(solver=FSLA(step_size=0.44))),
    "saba": SolverRow(
        SABA(batch_size=3),
        plain,
        calls=110,
        law=Exact(solver=SABA(step_size=0.44)),
        alone="each rank cuts its own rows",
    ),
    "srba": SolverRow(
        SRBA(batch_size=3, period=2),
        plain,
        calls=110,
        law=Exact(solver=SRBA(step_size=0.44)),
        alone="each rank cuts its own rows",
    ),
    "sustain": SolverRow(SUSTAIN(num_terms=3, step_size=0.1, eta=1.0, decay=0.0), plain),
    "mrbo": SolverRow(
        MRBO(num_terms=3),
        plain,
        law=Falls(tuple(MRBO(num_terms=k, step_size=0.2) for k in (40, 60)), GEOMETRIC),
    ),
    "ttsa": SolverRow(TTSA(num_terms=3, step_size=0.1)),
    "stocbio": SolverRow(
        StocBiO(num_terms=3, step_size=0.1),
        law=Falls(tuple(StocBiO(num_terms=k, step_size=0.2) for k in (40, 60)), GEOMETRIC),
    ),
    "amigo": SolverRow(
        AmIGO(num_steps=3, step_size=0.05),
        calls=12,
        law=Exact(solver=AmIGO(num_steps=20, step_size=0.2)),
    ),
    # ------------------------------------------------------------------ zero order
    # the laws of their errors are means over many seeds: `test_small_memory`
    "evolution strategies": SolverRow(EvolutionStrategies(3, 0.05, num_pairs=2)),
    "pzobo": SolverRow(PZOBO(3, 0.05, num_directions=2)),
}

"""The entrants of `benchmarks.hyper_cleaning`: solvers with their settings, and how long they train."""

from dataclasses import dataclass
from typing import final

from bilevel import (
    BOME,
    F2BA,
    F2SA,
    GPBGD,
    MASOBA,
    MEHA,
    SOBA,
    VPBGD,
    Alternating,
    AmIGO,
    ConjugateGradient,
    Identity,
    Implicit,
    Neumann,
    Nystrom,
    Solver,
    StocBiO,
    Unrolled,
)


@final
@dataclass(frozen=True)
class Entrant:
    """A solver, and a training by it.

    Attributes:
        name: in the table.
        solver: with its settings.
        steps: upper steps.
        lower_rate: learning rate of SGD in the lower level.
        upper_rate: of the upper level: of SGD, or of Adam.
        adam: whether the upper optimizer is Adam, which needs far fewer steps here than SGD.
        lower_steps: per upper step.
        retrained: steps of a lower run from its start, for the solver's own lower variables never move.
        published_steps: of the code released with V-PBGD, where it has the solver.
        network: which classifier.
    """

    name: str
    solver: Solver
    steps: int
    lower_rate: float = 0.1
    upper_rate: float = 0.1
    adam: bool = True
    lower_steps: int = 10
    retrained: int = 0
    published_steps: int | None = None
    network: str = "linear"


def _rhg(name: str, kept: int, steps: int) -> Entrant:
    """500 steps, of which the last so many are differentiated: the released settings but the length."""
    solver = Unrolled(500, truncate=kept)
    settings = {"upper_rate": 0.001, "adam": False, "lower_steps": 0, "retrained": 500}
    return Entrant(name, solver, steps, published_steps=100, **settings)  # type: ignore[arg-type]


def v_pbgd(steps: int, network: str = "linear") -> Entrant:
    """The released step sizes of y and of its copy; the penalty grows as there, in fewer steps."""
    most, rate, there = (0.2, 0.1, 40_000) if network == "linear" else (0.1, 0.01, 80_000)
    growing = 0.75 if network == "linear" else 0.125  # of the steps, as published
    growth = most / (growing * steps)
    solver = VPBGD(penalty=0.0, growth=growth, max_penalty=most, step_size=0.01)
    return Entrant(
        "V-PBGD", solver, steps, rate, lower_steps=0, published_steps=there, network=network
    )


ENTRANTS = (
    Entrant("no cleaning", Alternating(), 30),
    _rhg("RHG", 500, 1),
    _rhg("T-RHG", 100, 1),
    Entrant("unrolled, 20 steps", Unrolled(20), 6),
    Entrant("implicit, CG", Implicit(ConjugateGradient(10, damping=0.01)), 12),
    Entrant("implicit, Neumann", Implicit(Neumann(num_steps=10, step_size=0.1)), 12),
    Entrant("implicit, Nystrom", Implicit(Nystrom(rank=10, damping=0.1)), 12),
    Entrant("implicit, identity", Implicit(Identity()), 25),
    Entrant("stocBiO", StocBiO(num_terms=10), 12),
    Entrant("AmIGO", AmIGO(num_steps=10), 12),
    Entrant("SOBA", SOBA(), 90, lower_steps=0),
    Entrant("MA-SOBA", MASOBA(), 90, lower_steps=0),
    Entrant("F2SA", F2SA(num_steps=10), 12),
    Entrant("F2BA", F2BA(), 8),
    Entrant("BOME", BOME(), 18, lower_steps=0),
    v_pbgd(50),
    Entrant("G-PBGD", GPBGD(penalty=1.0), 80, 0.03, lower_steps=0),
    Entrant("MEHA", MEHA(penalty=1.0), 60, 0.03, lower_steps=0),
    v_pbgd(8, "mlp"),
    Entrant("SOBA", SOBA(), 14, lower_steps=0, network="mlp"),
    Entrant("implicit, CG", Implicit(ConjugateGradient(10, damping=0.1)), 3, network="mlp"),
)

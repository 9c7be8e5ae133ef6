"""The problems of `benchmarks.dropped_term`: models whose likelihood is a finite sum."""

from benchmarks.cases.dropped_case import Case
from benchmarks.cases.dropped_machines import bism, rbm
from benchmarks.cases.dropped_tables import tables


def cases() -> dict[str, Case]:
    """All of them by name."""
    found = [
        *(
            tables(divergence, limited=limited, lower_steps=k)
            for limited in (False, True)
            for divergence in ("kl", "symmetric")
            for k in (1, 10)
        ),
        *(rbm(divergence) for divergence in ("kl", "symmetric")),
        *(
            bism(where, expectation)
            for where, expectation in (
                ("checkerboard", "exact"),
                ("checkerboard", "sampled"),
                ("moons", "exact"),
            )
        ),
    ]
    return {case.name: case for case in found}

"""Solvers that only whole trainings can judge: variables of their own need many calls."""

from collections.abc import Mapping

from bilevel.solvers import (
    BOME,
    F2BA,
    F2SA,
    FSLA,
    GPBGD,
    MASOBA,
    MEHA,
    MRBO,
    SABA,
    SOBA,
    SRBA,
    SUSTAIN,
    TTSA,
    VPBGD,
    AmIGO,
    F2SAp,
    Solver,
    StocBiO,
)

TRAINED: Mapping[str, Solver] = {
    "f2sa": F2SA(num_steps=10),
    "f2ba": F2BA(),
    "f2sa-p": F2SAp(),
    "bome": BOME(),
    "v-pbgd": VPBGD(),
    "g-pbgd": GPBGD(),
    "meha": MEHA(),
    "soba": SOBA(),
    "saba": SABA(batch_size=16),
    "srba": SRBA(batch_size=16),
    "ma-soba": MASOBA(),
    "fsla": FSLA(),
    "mrbo": MRBO(),
    "sustain": SUSTAIN(),
    "amigo": AmIGO(),
    "stocbio": StocBiO(),
    "ttsa": TTSA(),
}
"""By the name they have on the command line."""

"""Solvers that only whole trainings can judge: variables of their own need many calls."""

from collections.abc import Mapping

from bilevel.solvers import BOME, F2BA, F2SA, GPBGD, MEHA, VPBGD, F2SAp, Solver

TRAINED: Mapping[str, Solver] = {
    "f2sa": F2SA(),
    "f2ba": F2BA(),
    "f2sa-p": F2SAp(),
    "bome": BOME(),
    "v-pbgd": VPBGD(),
    "g-pbgd": GPBGD(),
    "meha": MEHA(),
}
"""By the name they have on the command line."""

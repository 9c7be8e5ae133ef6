"""First-order and penalty solvers: the lower level as a penalty of the upper loss."""

from bilevel.solvers.first_order.bda import BDA
from bilevel.solvers.first_order.bome import BOME
from bilevel.solvers.first_order.f2ba import F2BA
from bilevel.solvers.first_order.f2sa import F2SA
from bilevel.solvers.first_order.f2sa_p import F2SAp
from bilevel.solvers.first_order.gpbgd import GPBGD
from bilevel.solvers.first_order.meha import MEHA
from bilevel.solvers.first_order.vpbgd import VPBGD

__all__ = ["BDA", "BOME", "F2BA", "F2SA", "GPBGD", "MEHA", "VPBGD", "F2SAp"]

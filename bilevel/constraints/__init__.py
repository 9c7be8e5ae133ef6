"""What the lower variables must obey, and penalties with corners: one record per file."""

from bilevel.constraints.affine import Affine
from bilevel.constraints.base import Constraint
from bilevel.constraints.box import Box
from bilevel.constraints.l1 import L1
from bilevel.constraints.simplex import Simplex

__all__ = ["L1", "Affine", "Box", "Constraint", "Simplex"]

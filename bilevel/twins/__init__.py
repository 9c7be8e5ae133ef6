"""Differentiable twins of the lower level's optimizer, for `Unrolled`."""

from bilevel.twins.base import NOT_LEARNED, Gradients, Twin, clip
from bilevel.twins.functional import TransformationTwin, as_transformation, describe, refuse_learned
from bilevel.twins.running import RunningTwin, move, rule_of

__all__ = [
    "NOT_LEARNED",
    "Gradients",
    "RunningTwin",
    "TransformationTwin",
    "Twin",
    "as_transformation",
    "clip",
    "describe",
    "move",
    "refuse_learned",
    "rule_of",
]

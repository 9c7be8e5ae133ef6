"""Differentiable twins of the lower level's optimizer, for `Unrolled`."""

from bilevel.twins.base import Gradients, Twin, clip
from bilevel.twins.functional import TransformationTwin, as_transformation, describe
from bilevel.twins.running import RunningTwin, rule_of

__all__ = [
    "Gradients",
    "RunningTwin",
    "TransformationTwin",
    "Twin",
    "as_transformation",
    "clip",
    "describe",
    "rule_of",
]

"""Differentiable twins of the lower level's optimizer, for `Unrolled`."""

from bilevel.twins.base import NOT_LEARNED, Gradients, Twin, clip
from bilevel.twins.functional import (
    TransformationTwin,
    as_transformation,
    describe,
    made_at,
    makes_transformation,
    refuse_learned,
    transformation_at,
)
from bilevel.twins.running import RunningTwin, learns, move, rule_of

__all__ = [
    "NOT_LEARNED",
    "Gradients",
    "RunningTwin",
    "TransformationTwin",
    "Twin",
    "as_transformation",
    "clip",
    "describe",
    "learns",
    "made_at",
    "makes_transformation",
    "move",
    "refuse_learned",
    "rule_of",
    "transformation_at",
]

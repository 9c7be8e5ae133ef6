"""Differentiable twins of the lower level's optimizer, for `Unrolled`."""

from bilevel.twins.base import Twin, clip
from bilevel.twins.functional import TransformationTwin, as_transformation
from bilevel.twins.running import RunningTwin, rule_of

__all__ = ["RunningTwin", "TransformationTwin", "Twin", "as_transformation", "clip", "rule_of"]

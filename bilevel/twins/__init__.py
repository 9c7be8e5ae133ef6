"""Differentiable twins of the lower level's optimizer, for `Unrolled`."""

from bilevel.twins.base import Twin
from bilevel.twins.functional import TransformationTwin, as_transformation
from bilevel.twins.running import RunningTwin

__all__ = ["RunningTwin", "TransformationTwin", "Twin", "as_transformation"]

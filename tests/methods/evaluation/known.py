"""Models, images and features whose answers are known."""

from functools import cache

from bilevel.methods.data.images import Images, load_images
from bilevel.methods.evaluation.features import FeatureNetwork, default_features


@cache
def digits() -> Images:
    return load_images("digits")


@cache
def digits_judge() -> FeatureNetwork:
    return default_features(digits())

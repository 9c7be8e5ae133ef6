"""Presets: one published experiment, or a small one of our own, as a typed configuration.

A preset names its method, its data, the options of the method's `for_images`, the fields of `Training`,
and where all of that comes from. Where paper and official code disagree, `source` says which it follows;
`note` says what was left to us. Lengths are in steps: epochs times whole batches of the published set.
"""

from collections.abc import Mapping

from bilevel.methods.presets import images, scores, small
from bilevel.methods.presets.base import Preset
from bilevel.methods.presets.images import CIFAR10
from bilevel.methods.presets.small import DIGITS

PRESETS: Mapping[str, Preset] = {
    preset.name: preset
    for preset in [*small.SMALL_EXPERIMENTS, *images.IMAGE_EXPERIMENTS, *scores.SCORE_EXPERIMENTS]
}
"""All presets by name, the small ones first."""

__all__ = ["CIFAR10", "DIGITS", "PRESETS", "Preset"]

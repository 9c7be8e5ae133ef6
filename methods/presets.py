"""Presets: a model's recipe and its training settings, for data they are known to suit."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Preset:
    """Settings that belong together.

    Attributes:
        data: the source of the images, as `load_images` takes it.
        model: options of the model's `for_images`.
        training: fields of `Training` that differ from its defaults.
    """

    data: str
    model: dict[str, Any]
    training: dict[str, Any]


DIGITS = Preset(
    data="digits",
    model={
        "latent_dim": 16,
        "width": 16,  # the published 64 is for images with 16 times as many pixels
        "ratio": 0.1,  # the published 0.05 leaves reconstructions of so few pixels blurred
        "latent_weight": 0.15,
    },
    training={
        "num_steps": 2000,
        "upper_lr": 4e-3,
        "lower_lr": 2e-3,
        "lower_weight_decay": 0.0,
        "schedule": "cosine",
        "log_every": 20,
        "checkpoint_every": 250,
        "max_seconds": 90.0,
    },
)
"""BiDVL on scikit-learn's digits: about a minute on two processor cores that are free."""

"""Data: images and tables by name or path, what a model takes for visibles, and known densities."""

from bilevel.methods.data.images import (
    NAMES,
    Images,
    constant_images,
    inverted,
    load_images,
    scaled,
    shuffled_pixels,
    uniform_noise,
)
from bilevel.methods.data.showing import show
from bilevel.methods.data.tables import Table, load_table

__all__ = [
    "NAMES",
    "Images",
    "Table",
    "constant_images",
    "inverted",
    "load_images",
    "load_table",
    "scaled",
    "show",
    "shuffled_pixels",
    "uniform_noise",
]

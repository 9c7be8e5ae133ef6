"""Initial weights of a machine."""

import torch
from torch import nn

from bilevel.refusals import a_generator


def uniform(bound: float, *shape: int, generator: torch.Generator) -> nn.Parameter:
    """A parameter drawn from U(-bound, bound)."""
    unit = torch.rand(shape, generator=generator, device=generator.device)
    return nn.Parameter(bound * (2 * unit - 1))


def seeded(generator: torch.Generator | None) -> torch.Generator:
    """The generator, or a fresh one: a model without one is the same every time."""
    a_generator("generator", generator)
    return generator if generator is not None else torch.Generator().manual_seed(0)

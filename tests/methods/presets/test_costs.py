"""The table of what presets cost, against the count it was made with."""

import pytest
import torch

from bilevel.methods.presets import PRESETS
from bilevel.methods.presets.costs import COSTS, counted


def test_every_preset_has_a_cost() -> None:
    assert COSTS.keys() == PRESETS.keys()


def test_the_costs_are_those_that_are_counted() -> None:
    cost, known = counted(PRESETS["vae-mnist"]), COSTS["vae-mnist"]
    assert cost.parameters == known.parameters
    assert cost.operations == pytest.approx(known.operations, rel=1e-3)


@pytest.mark.parametrize("name", ["cifar10", "bism-cifar10", "vages-celeba64"])
def test_the_sizes_are_those_of_the_networks(name: str) -> None:
    with torch.device("meta"):
        model = PRESETS[name].build()
    assert sum(p.numel() for p in model.parameters()) == COSTS[name].parameters

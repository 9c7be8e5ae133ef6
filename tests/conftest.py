"""Fixtures that tests of several rooms share."""

from typing import Any

import pytest
import torch._inductor

from bilevel.methods import EBLVM
from bilevel.methods.training.footprint import Footprint


@pytest.fixture
def traced_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """`compile=True` traces a step and runs the graph as it is: the compiler takes half a minute."""
    monkeypatch.setattr(torch._inductor, "compile", lambda graph, inputs, options: graph)


@pytest.fixture
def line(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step takes at least 10 kB and a visible 100 bytes: counting takes seconds."""

    def stand_in(model: EBLVM, batch_size: int, **_: Any) -> Footprint:
        parts = {"energy": 1709, "generator": 847}
        activations = max(6000, 100 * batch_size)
        return Footprint(
            batch_size,
            parameters=parts,
            operations=5 * 10**8,
            weights=1000,
            optimizer=2000,
            gradients=1000,
            activations=activations,
        )

    for module in ("methods.training.footprint", "cli.dry_run"):
        monkeypatch.setattr(f"bilevel.{module}.footprint", stand_in)

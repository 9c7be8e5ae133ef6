"""Fixtures that tests of several rooms share."""

import pytest
import torch._inductor


@pytest.fixture
def traced_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """`compile=True` traces a step and runs the graph as it is: the compiler takes half a minute."""
    monkeypatch.setattr(torch._inductor, "compile", lambda graph, inputs, options: graph)

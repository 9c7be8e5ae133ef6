"""Every test of a machine that asks for a device runs on each there is."""

import pytest

from tests.devices import DEVICES


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)

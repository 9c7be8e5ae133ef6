"""What the tests of the check share."""

from typing import Any

import torch
from torch import Tensor

DOUBLE: dict[str, Any] = {"dtype": torch.float64}


def number(value: float) -> Tensor:
    return torch.tensor(value, **DOUBLE)

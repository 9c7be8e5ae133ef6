"""The network of the published FID, by torchmetrics and torch-fidelity."""

import os
from pathlib import Path
from typing import final

from torch import Tensor, nn


@final
class Inception(nn.Module):
    """Images in [-1, 1] as the published FID takes them: 255 (x / 2 + 1/2), grey ones in three channels.

    Differs from the paper in: values are rounded to bytes, as torch-fidelity wants them.
    """

    def __init__(self, weights: Path) -> None:
        super().__init__()
        try:
            from torchmetrics.image.fid import NoTrainInceptionV3

            self.net = NoTrainInceptionV3(
                "inception-v3-compat", ["2048"], os.fspath(weights), antialias=False
            )
        except (ImportError, RuntimeError) as error:  # torchvision was built for another torch
            raise ImportError(
                "Inception features need torchmetrics and torch-fidelity; install them with "
                f"`pip install 'bilevel[images]'` ({error})"
            ) from None

    def forward(self, v: Tensor) -> Tensor:
        levels = (255 * (v.clamp(-1, 1) / 2 + 0.5)).round().byte()
        features: Tensor = self.net(levels.expand(-1, 3, -1, -1))
        return features

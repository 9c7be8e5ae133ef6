"""A transformer of a million parameters that is pretrained on reweighted text, for the certificate."""

from typing import Any, final

import torch
from torch import Tensor, nn

from bilevel import Problem

WORDS, LENGTH, KINDS = 64, 16, 12


@final
class Block(nn.Module):
    """Attention and a network, each after a norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.before = nn.LayerNorm(width)
        self.attend = nn.MultiheadAttention(width, 4, batch_first=True)
        self.between = nn.LayerNorm(width)
        self.think = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, hidden: Tensor) -> Tensor:
        seen = self.before(hidden)
        hidden = hidden + self.attend(seen, seen, seen, need_weights=False)[0]
        out: Tensor = hidden + self.think(self.between(hidden))
        return out


@final
class Pretraining(Problem):
    """Which soft words to put before a text, and how much each of its words counts.

    The upper level is an embedding of every word's loss weight and the positions; the lower level is
    the transformer, a little over a million parameters.
    """

    def __init__(self, seed: int, width: int = 144, depth: int = 4) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.lower = nn.ModuleDict(
                {
                    "words": nn.Embedding(WORDS, width),
                    "blocks": nn.Sequential(*(Block(width) for _ in range(depth))),
                    "head": nn.Linear(width, WORDS),
                }
            )
            self.upper = nn.ParameterDict(
                {
                    "places": 0.1 * torch.randn(LENGTH, width),
                    "weights": torch.zeros(WORDS, KINDS),
                }
            )

    def _losses(self, batch: Any) -> Tensor:
        text = batch[0]
        hidden = self.lower["words"](text[:, :-1]) + self.upper["places"][: text.shape[1] - 1]
        scores = self.lower["head"](self.lower["blocks"](hidden))
        return nn.functional.cross_entropy(scores.mT, text[:, 1:], reduction="none")

    def upper_loss(self, batch: Any) -> Tensor:
        return self._losses(batch).mean()

    def lower_loss(self, batch: Any) -> Tensor:
        text, kinds = batch
        weights = self.upper["weights"][text[:, 1:], kinds[:, None]].sigmoid()
        return (weights * self._losses(batch)).mean()


def text(seed: int, rows: int = 4) -> tuple[Tensor, Tensor]:
    """Counting modulo the number of words by a step that is the row's kind, with mistakes."""
    generator = torch.Generator().manual_seed(seed)
    kinds = torch.randint(KINDS, (rows,), generator=generator)
    start = torch.randint(WORDS, (rows, 1), generator=generator)
    words = (start + (kinds[:, None] + 1) * torch.arange(LENGTH)) % WORDS
    noise = torch.randint(WORDS, words.shape, generator=generator)
    wrong = torch.rand(words.shape, generator=generator) < 0.1
    return torch.where(wrong, noise, words), kinds

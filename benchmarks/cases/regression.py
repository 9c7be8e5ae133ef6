"""The problem all libraries get in `benchmarks.peers`: weighted, regularised regression by an MLP.

The upper level holds one logit per training example and the logarithm of a weight decay, the lower
level an MLP. Every library gets the same module; the hand-written loops get its tensors.
"""

import copy
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from bilevel import Problem

Batch = tuple[Tensor, Tensor]
ROWS, FEATURES = 256, 64


@final
@dataclass(frozen=True)
class Size:
    """The hidden layers of the lower level's MLP."""

    name: str
    widths: tuple[int, ...]


SIZES = {"small": Size("small", (16,)), "large": Size("large", (128, 128, 128))}


def decayed(residual: Tensor, logits: Tensor, log_decay: Tensor, weights: list[Tensor]) -> Tensor:
    """The lower loss from residuals and weights."""
    decay = torch.stack([w.square().sum() for w in weights]).sum() * log_decay.exp() / 2
    return (logits.sigmoid() * residual.square()).mean() + decay


@final
class Regression(Problem):
    """The problem as a user of this library writes it."""

    def __init__(self, size: Size, dtype: torch.dtype, log_decay: float = -1.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        widths = (FEATURES, *size.widths, 1)
        layers: list[nn.Module] = []
        for m, n in zip(widths, widths[1:], strict=False):  # noqa: RUF007 - reads like the layers
            linear = nn.Linear(m, n, dtype=dtype)
            linear.weight.data = torch.randn(n, m, generator=generator, dtype=dtype) / m**0.5
            linear.bias.data = torch.zeros(n, dtype=dtype)
            layers += [linear, nn.Tanh()]
        self.lower = nn.Sequential(*layers[:-1])
        self.upper = nn.ParameterDict(
            {
                "logits": torch.randn(ROWS, generator=generator, dtype=dtype),
                "log_decay": torch.tensor(log_decay, dtype=dtype),
            }
        )

    def residual(self, batch: Batch) -> Tensor:
        prediction: Tensor = self.lower(batch[0])
        return prediction.squeeze(1) - batch[1]

    def upper_loss(self, batch: tuple[Batch, Batch]) -> Tensor:
        return self.residual(batch[1]).square().mean()

    def lower_loss(self, batch: tuple[Batch, Batch]) -> Tensor:
        x = dict(self.upper.named_parameters())
        weights = list(self.lower.parameters())
        return decayed(self.residual(batch[0]), x["logits"], x["log_decay"], weights)


@final
@dataclass(frozen=True)
class Setting:
    """One problem with its data, in the forms that the libraries want."""

    problem: Regression
    batch: tuple[Batch, Batch]
    names: ClassVar = ("logits", "log_decay")

    def leaves(self) -> tuple[list[Tensor], list[Tensor]]:
        """Upper and lower variables as fresh leaves."""
        x = self.problem.variables("upper")
        upper, lower = (x["logits"], x["log_decay"]), self.problem.lower.parameters()
        return (
            [p.detach().clone().requires_grad_() for p in upper],
            [p.detach().clone().requires_grad_() for p in lower],
        )

    def module(self) -> nn.Module:
        """A copy of the lower level's module."""
        return copy.deepcopy(self.problem.lower)

    def residual(self, lower: list[Tensor], part: int) -> Tensor:
        """Prediction minus target from the MLP's tensors."""
        h, targets = self.batch[part]
        for i in range(0, len(lower), 2):
            h = h if i == 0 else h.tanh()
            h = torch.addmm(lower[i + 1], h, lower[i].t())
        return h.squeeze(1) - targets

    def lower_loss(self, upper: list[Tensor], lower: list[Tensor]) -> Tensor:
        return decayed(self.residual(lower, 0), upper[0], upper[1], lower)

    def upper_loss(self, lower: list[Tensor]) -> Tensor:
        return self.residual(lower, 1).square().mean()

    def module_lower_loss(self, upper: list[Tensor], net: nn.Module) -> Tensor:
        inputs, targets = self.batch[0]
        residual = net(inputs).squeeze(1) - targets
        return decayed(residual, upper[0], upper[1], list(net.parameters()))

    def module_upper_loss(self, net: nn.Module) -> Tensor:
        inputs, targets = self.batch[1]
        loss: Tensor = (net(inputs).squeeze(1) - targets).square().mean()
        return loss


def setting(size: Size, dtype: torch.dtype) -> Setting:
    """The problem and its data, the same at every call."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, ROWS, FEATURES, generator=generator, dtype=dtype)
    x = x * torch.linspace(0.1, 2, FEATURES, dtype=dtype)  # a spectrum that takes CG its steps
    y = x[..., -8:].sum(-1).sin() + 0.1 * torch.randn(2, ROWS, generator=generator, dtype=dtype)
    return Setting(Regression(size, dtype), ((x[0], y[0]), (x[1], y[1])))

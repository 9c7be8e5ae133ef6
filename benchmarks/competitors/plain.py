"""What the plain PyTorch loops of `benchmarks.learner_speed` share: a machine and a turn.

Written the way one writes them first, without this library. A step's noise lies in the same tuples as
this library's, so that both can be given the same.
"""

from abc import ABC, abstractmethod
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

SIGMA, TEMPERATURE = 0.05, 0.1


@final
class Machine(nn.Module):
    """An RBM, with Gaussian visibles if it has a `log_scale`; parameters named as in this library."""

    def __init__(self, visible_dim: int, latent_dim: int, *, gaussian: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(visible_dim, latent_dim))
        self.visible_bias = nn.Parameter(torch.zeros(visible_dim))
        self.latent_bias = nn.Parameter(torch.zeros(latent_dim))
        if gaussian:
            self.log_scale = nn.Parameter(torch.zeros(visible_dim))
        self.gaussian = gaussian

    def visible_energy(self, v: Tensor) -> Tensor:
        if not self.gaussian:
            return -(v * self.visible_bias).sum(1)
        return 0.5 * ((v - self.visible_bias) ** 2 / torch.exp(2 * self.log_scale)).sum(1)

    def logits(self, v: Tensor) -> Tensor:
        return self.latent_bias + v @ self.weight

    def energy(self, v: Tensor, h: Tensor) -> Tensor:
        return self.visible_energy(v) - (self.logits(v) * h).sum(1)

    def free_energy(self, v: Tensor) -> Tensor:
        return self.visible_energy(v) - softplus(self.logits(v)).sum(1)

    def log_partition(self) -> Tensor:
        h = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * len(self.latent_bias))
        field = h @ self.weight.T
        gain = field @ self.visible_bias + 0.5 * (field**2) @ torch.exp(2 * self.log_scale)
        log_sum = torch.logsumexp(h @ self.latent_bias + gain, 0)
        return log_sum + self.log_scale.sum() + 0.5 * len(self.visible_bias) * 1.8378770664093453

    @torch.no_grad()
    def gibbs(self, h: Tensor) -> tuple[Tensor, Tensor]:
        field = h @ self.weight.T
        if self.gaussian:
            scale = torch.exp(self.log_scale)
            v = self.visible_bias + scale**2 * field + scale * torch.randn_like(field)
        else:
            v = torch.bernoulli(torch.sigmoid(self.visible_bias + field))
        return v, torch.bernoulli(torch.sigmoid(self.logits(v)))

    @torch.no_grad()
    def latent(self, v: Tensor) -> Tensor:
        return torch.bernoulli(torch.sigmoid(self.logits(v)))


def log_bernoulli(logits: Tensor, x: Tensor) -> Tensor:
    return (logits * x - softplus(logits)).sum(1)


def logistic(rows: int, columns: int) -> Tensor:
    return torch.logit(torch.rand(rows, columns), eps=1e-7)


def noised(v: Tensor) -> tuple[Tensor, Tensor, None]:
    """Noised rows and the scores that denoising aims at."""
    noise = torch.randn_like(v)
    return v + SIGMA * noise, -noise / SIGMA, None


def score(log_density: Any, v: Tensor) -> tuple[Tensor, Tensor]:
    v = v.detach().requires_grad_()
    return v, torch.autograd.grad(log_density(v).sum(), v, create_graph=True)[0]


def descend(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


class Plain(ABC):
    """One learner: `draw` the noise, take a `step`.

    Attributes:
        lower_steps: lower batches of a step.
        unrolled: lower batches that a step looks ahead with.
    """

    lower_steps = 0
    unrolled = 0

    @abstractmethod
    def modules(self) -> dict[str, nn.Module]:
        """By their name in this library's learner."""

    @abstractmethod
    def draw(self, v: Tensor) -> Any:
        """The batch of the upper step."""

    @abstractmethod
    def draw_lower(self, batch: Any, step: int) -> Any:
        """The batch of a lower step."""

    @abstractmethod
    def step(self, batch: Any, lower: list[Any], ahead: list[Any]) -> None:
        """Move the parameters."""

    @final
    def turn(self, data: Tensor) -> None:
        """Draw everything and take a step."""
        batch = self.draw(data[torch.randint(len(data), (100,))])
        lower = [self.draw_lower(batch, i) for i in range(self.lower_steps)]
        self.step(batch, lower, [self.draw_lower(batch, i) for i in range(self.unrolled)])

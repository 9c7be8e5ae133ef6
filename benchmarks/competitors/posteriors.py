"""Learners with a posterior in the lower level as plain PyTorch loops: BiSM and VaGES."""

from collections.abc import Callable
from typing import Any, TypeAlias, final

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from benchmarks.competitors.plain import (
    TEMPERATURE,
    Machine,
    Plain,
    descend,
    log_bernoulli,
    logistic,
    noised,
    score,
)

Weights: TypeAlias = list[Tensor]
Relaxed: TypeAlias = Callable[[Tensor, Tensor], Tensor]


def sampled(logits: Tensor, noise: Tensor) -> Tensor:
    return torch.sigmoid((logits + noise) / TEMPERATURE)


def expected(logits: Tensor, noise: Tensor) -> Tensor:
    """In place of a draw, where the lower loss is exact."""
    return torch.sigmoid(logits)


UpperStep: TypeAlias = Callable[["PosteriorFirst", Any, Weights, list[Any]], None]
DAMPING = 1e-3  # of the best response's Hessian


@final
class PosteriorFirst(Plain):
    """K = 5 steps of the posterior q(h|v), then one step of the machine.

    Args:
        machine: the model.
        upper_step: moves the machine after the posterior, from the upper batch and those ahead.
        latent: what the lower loss takes for h.
        draws: latents of each row in the upper batch.
        unrolled: lower batches that the upper step looks ahead with.
    """

    lower_steps = 5

    def __init__(
        self,
        machine: Machine,
        upper_step: UpperStep,
        *,
        latent: Relaxed = sampled,
        draws: int = 1,
        unrolled: int = 0,
    ) -> None:
        self.machine, self.upper_step, self.latent = machine, upper_step, latent
        self.draws, self.unrolled = draws, unrolled
        self.posterior = nn.Linear(*machine.weight.shape)
        self.optimizer = torch.optim.Adam(machine.parameters(), 1e-3, (0.9, 0.95))
        self.lower_optimizer = torch.optim.Adam(self.posterior.parameters(), 1e-3, (0.9, 0.95))

    def modules(self) -> dict[str, nn.Module]:
        return {"upper.model": self.machine, "lower.posterior.networks.0": self.posterior}

    def draw(self, v: Tensor) -> Any:
        return v, noised(v), self.latents(self.draws * len(v))

    def draw_lower(self, batch: Any, step: int) -> Any:
        data = batch[0]
        return noised(data)[0], self.latents(len(data)), None

    def latents(self, rows: int) -> Tensor:
        return logistic(rows, len(self.machine.latent_bias))

    def lower_loss(self, batch: Any, weights: Weights) -> Tensor:
        logits = linear(batch[0], *weights)
        h = self.latent(logits, batch[1])
        return (self.machine.energy(batch[0], h) + log_bernoulli(logits, h)).mean()

    def upper_loss(self, batch: Any, weights: Weights) -> Tensor:
        """BiSM's: denoising score matching on log p(v, h) - log q(h|v) at a draw h."""
        _, (points, target, _), noise = batch
        h = sampled(linear(points, *weights), noise)

        def log_ratio(v: Tensor) -> Tensor:
            return -self.machine.energy(v, h) - log_bernoulli(linear(v, *weights), h)

        _, s = score(log_ratio, points)
        return 0.5 * ((s - target) ** 2).sum(1).mean()

    def step(self, batch: Any, lower: list[Any], ahead: list[Any]) -> None:
        weights = list(self.posterior.parameters())
        for now in lower:
            descend(self.lower_optimizer, self.lower_loss(now, weights))
        self.upper_step(self, batch, weights, ahead)


def unrolled(loop: PosteriorFirst, batch: Any, weights: Weights, ahead: list[Any]) -> None:
    """BiSM with N unrolled steps of Adam by hand."""
    states = [loop.lower_optimizer.state[p] for p in weights]
    moments = [(s["exp_avg"], s["exp_avg_sq"]) for s in states]
    for count, now in enumerate(ahead, 1 + int(states[0]["step"])):
        grads = torch.autograd.grad(loop.lower_loss(now, weights), weights, create_graph=True)
        new = []
        for i, (p, g) in enumerate(zip(weights, grads, strict=True)):
            m, s = moments[i]
            m, s = 0.9 * m + 0.1 * g, 0.95 * s + 0.05 * g**2
            moments[i] = (m, s)
            root = torch.sqrt(s) / (1 - 0.95**count) ** 0.5 + 1e-8
            new.append(p - 1e-3 / (1 - 0.9**count) * m / root)
        weights = new
    descend(loop.optimizer, loop.upper_loss(batch, weights))


def best_response(loop: PosteriorFirst, batch: Any, weights: Weights, ahead: list[Any]) -> None:
    """BiSM with a dense Hessian, row by row, of the exact lower loss."""
    theta = list(loop.machine.parameters())
    loss = loop.upper_loss(batch, weights)
    both = torch.autograd.grad(loss, [*theta, *weights], allow_unused=True)
    rhs = torch.cat([g.flatten() for g in both[len(theta) :]])
    slopes = torch.autograd.grad(loop.lower_loss(ahead[0], weights), weights, create_graph=True)
    slope = torch.cat([g.flatten() for g in slopes])
    rows = [torch.autograd.grad(g, weights, retain_graph=True) for g in slope]
    hessian = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    w = torch.linalg.solve(hessian + DAMPING * torch.eye(len(hessian)), rhs)
    cross = torch.autograd.grad(slope @ w, theta, allow_unused=True)
    for p, direct, response in zip(theta, both, cross, strict=False):
        kept = torch.zeros_like(p) if direct is None else direct
        p.grad = kept if response is None else kept - response
    loop.optimizer.step()


def variational(loop: PosteriorFirst, batch: Any, weights: Weights, ahead: list[Any]) -> None:
    """VaGES with L = 2 draws in each of three groups."""
    _, (points, target, _), noise, *_ = batch
    first, second, third = noise.reshape(len(points), 3, 2, -1).unbind(1)
    s = samples(loop, points, first)[0].mean(1).detach()
    z = s - target
    slope = samples(loop, points, second)[0].mean(1)
    g, log_density = samples(loop, points, third)
    along = (g.detach() * z[:, None]).sum(2)
    centred = along - along.mean(1, keepdim=True)
    surrogate = (z * slope).sum(1) + (centred * log_density).sum(1)
    descend(loop.optimizer, surrogate.mean())


def samples(loop: PosteriorFirst, v: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Scores (n, 2, d) and log-densities (n, 2) at draws of the posterior."""
    n = len(v)
    v = v.repeat_interleave(2, 0).detach().requires_grad_()
    with torch.no_grad():
        h = (loop.posterior(v) + noise.reshape(2 * n, -1) > 0).float()
    log_density = -loop.machine.energy(v, h)
    g = torch.autograd.grad(log_density.sum(), v, create_graph=True)[0]
    return g.view(n, 2, -1), log_density.view(n, 2)


def bism(machine: Machine, steps: int = 0) -> PosteriorFirst:
    return PosteriorFirst(machine, unrolled, unrolled=steps)


def bism_implicit(machine: Machine) -> PosteriorFirst:
    return PosteriorFirst(machine, best_response, latent=expected, unrolled=1)


def vages(machine: Machine) -> PosteriorFirst:
    return PosteriorFirst(machine, variational, draws=6)

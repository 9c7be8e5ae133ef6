"""More plain PyTorch loops of `benchmarks.learner_speed`: VaGES, AdvIL and BiDVL."""

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.plain_learners import (
    TEMPERATURE,
    Bilevel,
    Machine,
    Plain,
    descend,
    log_bernoulli,
    logistic,
)


class Variational(Bilevel):
    """VaGES: L = 2 draws in each of three groups, K = 5 lower steps."""

    def draw(self, v: Tensor) -> Any:
        data, points, _ = super().draw(v)
        return data, points, logistic(6 * len(v), len(self.machine.latent_bias))

    def draw_lower(self, batch: Any, step: int) -> Any:
        _, points, latent = Bilevel.draw(self, batch[0])
        return points[0], latent, None

    def step(self, batch: Any, lower: list[Any], ahead: list[Any]) -> None:
        self.fit_posterior(lower)
        _, (noised, target, _), noise = batch
        n = len(noised)
        first, second, third = noise.view(3, n, 2, -1)
        s = self.samples(noised, first)[0].mean(1).detach()
        z = s - target
        slope = self.samples(noised, second)[0].mean(1)
        g, log_density = self.samples(noised, third)
        along = (g.detach() * z[:, None]).sum(2)
        centred = along - along.mean(1, keepdim=True)
        surrogate = (z * slope).sum(1) + (centred * log_density).sum(1)
        descend(self.optimizer, surrogate.mean())

    def samples(self, v: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Scores (n, 2, d) and log-densities (n, 2) at draws of the posterior."""
        n = len(v)
        v = v.repeat_interleave(2, 0).detach().requires_grad_()
        with torch.no_grad():
            h = (self.posterior(v) + noise.reshape(2 * n, -1) > 0).float()
        log_density = -self.machine.energy(v, h)
        g = torch.autograd.grad(log_density.sum(), v, create_graph=True)[0]
        return g.view(n, 2, -1), log_density.view(n, 2)


class Sampler(nn.Module):
    """q(z) q(h|z) q(v|h) with the auxiliary r(z|h); z is Gaussian."""

    def __init__(self, machine: Machine) -> None:
        super().__init__()
        nv, nh = machine.weight.shape
        self.gaussian, self.sizes = machine.gaussian, [nv, nh, 15]
        top: nn.Module = nn.Linear(15, nh)
        if not machine.gaussian:
            top = nn.Sequential(nn.Linear(15, 15), nn.ReLU(), nn.Linear(15, nh))
        self.networks = nn.ModuleList([top, nn.Linear(nh, 2 * nv if machine.gaussian else nv)])
        self.auxiliary = nn.Sequential(nn.Linear(nh, 15), nn.Sigmoid(), nn.Linear(15, 30))

    def noise(self, n: int) -> Tensor:
        nv, nh, nz = self.sizes
        visible = torch.randn(n, nv) if self.gaussian else logistic(n, nv)
        return torch.cat([visible, logistic(n, nh), torch.randn(n, nz)], 1)

    def forward(self, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """v, h and log q(z, h, v) - log r(z|h)."""
        v_noise, h_noise, z = noise.split(self.sizes, 1)
        logits = self.networks[0](z)
        h = torch.sigmoid((logits + h_noise) / TEMPERATURE)
        output = self.networks[1](h)
        if self.gaussian:
            mean, log_variance = output.chunk(2, 1)
            visible = torch.distributions.Normal(mean, torch.exp(log_variance / 2))
            v = mean + torch.exp(log_variance / 2) * v_noise
            log_v = visible.log_prob(v).sum(1)
        else:
            v = torch.sigmoid((output + v_noise) / TEMPERATURE)
            log_v = log_bernoulli(output, v)
        mean, log_variance = self.auxiliary(h).chunk(2, 1)
        auxiliary = torch.distributions.Normal(mean, torch.exp(log_variance / 2))
        prior = torch.distributions.Normal(0.0, 1.0)
        log_z = (prior.log_prob(z) - auxiliary.log_prob(z)).sum(1)
        return v, h, log_v + log_bernoulli(logits, h) + log_z


class Doubly(Plain):
    """BiDVL with KL (lower level first) and AdvIL (1 : 100 : 1, upper level first)."""

    machine_name = "upper.energy"
    upper_first = False

    def __init__(
        self, machine: Machine, rate: float = 1e-3, betas: Any = (0.5, 0.999), lower_steps: int = 1
    ) -> None:
        super().__init__(machine, rate, betas)
        self.lower_steps = lower_steps
        self.posterior, self.sampler = nn.Linear(*machine.weight.shape), Sampler(machine)
        lower = [*self.posterior.parameters(), *self.sampler.parameters()]
        self.lower_optimizer = torch.optim.Adam(lower, rate, betas)

    def modules(self) -> dict[str, nn.Module]:
        return {
            self.machine_name: self.machine,
            "lower.posterior.networks.0": self.posterior,
            "lower.joint": self.sampler,
        }

    def draw(self, v: Tensor) -> Any:
        return v, logistic(len(v), len(self.machine.latent_bias)), self.sampler.noise(len(v))

    def draw_lower(self, batch: Any, step: int) -> Any:
        return self.draw(batch[0])

    def with_data(self, batch: Any) -> Tensor:
        v, noise = batch[:2]
        logits = self.posterior(v)
        h = torch.sigmoid((logits + noise) / TEMPERATURE)
        return (self.machine.energy(v, h) + log_bernoulli(logits, h)).mean()

    def generated(self, batch: Any) -> Tensor:
        v, h, log_joint = self.sampler(batch[2])
        return (self.machine.energy(v, h) + log_joint).mean()

    def step(self, batch: Any, lower: list[Any], ahead: list[Any]) -> None:
        if self.upper_first:
            descend(self.optimizer, self.with_data(batch) - self.generated(batch))
        for now in lower:
            loss = self.generated(now)
            if now[0] is not None:
                loss = loss + self.with_data(now)
            descend(self.lower_optimizer, loss)
        if not self.upper_first:
            descend(self.optimizer, self.with_data(batch) - self.generated(batch))


class Adversarial(Doubly):
    machine_name = "upper.model"
    upper_first = True

    def __init__(self, machine: Machine) -> None:
        super().__init__(machine, 3e-4, (0.5, 0.999), 100)

    def draw_lower(self, batch: Any, step: int) -> Any:
        return self.draw(batch[0]) if step == 0 else (None, None, self.sampler.noise(100))

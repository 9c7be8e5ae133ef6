"""Learners with a posterior and a sampler in the lower level as plain PyTorch loops: BiDVL, AdvIL."""

from typing import Any, final

import torch
from torch import Tensor, nn

from benchmarks.competitors.plain import (
    TEMPERATURE,
    Machine,
    Plain,
    descend,
    log_bernoulli,
    logistic,
)


@final
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


@final
class WithSampler(Plain):
    """A machine against q(h|v) on the data and a sampler of (v, h).

    Args:
        machine: the model.
        machine_name: what it is called in this library's learner.
        rate: learning rate of both levels.
        lower_steps: lower steps of each upper step.
        upper_first: which level moves first.
        data_once: whether the posterior moves in the first lower step only.
    """

    def __init__(
        self,
        machine: Machine,
        machine_name: str,
        *,
        rate: float,
        lower_steps: int,
        upper_first: bool = False,
        data_once: bool = False,
    ) -> None:
        self.machine, self.machine_name, self.lower_steps = machine, machine_name, lower_steps
        self.upper_first, self.data_once = upper_first, data_once
        self.posterior, self.sampler = nn.Linear(*machine.weight.shape), Sampler(machine)
        lower = [*self.posterior.parameters(), *self.sampler.parameters()]
        self.optimizer = torch.optim.Adam(machine.parameters(), rate, (0.5, 0.999))
        self.lower_optimizer = torch.optim.Adam(lower, rate, (0.5, 0.999))

    def modules(self) -> dict[str, nn.Module]:
        return {
            self.machine_name: self.machine,
            "lower.posterior.networks.0": self.posterior,
            "lower.joint": self.sampler,
        }

    def draw(self, v: Tensor) -> Any:
        return v, logistic(len(v), len(self.machine.latent_bias)), self.sampler.noise(len(v))

    def draw_lower(self, batch: Any, step: int) -> Any:
        if step > 0 and self.data_once:
            return None, None, self.sampler.noise(len(batch[0]))
        return self.draw(batch[0])

    def with_data(self, batch: Any) -> Tensor:
        v, noise = batch[:2]
        logits = self.posterior(v)
        h = torch.sigmoid((logits + noise) / TEMPERATURE)
        return (self.machine.energy(v, h) + log_bernoulli(logits, h)).mean()

    def generated(self, batch: Any) -> Tensor:
        v, h, log_joint = self.sampler(batch[2])
        return (self.machine.energy(v, h) + log_joint).mean()

    def lower_loss(self, batch: Any) -> Tensor:
        loss = self.generated(batch)
        return loss if batch[0] is None else loss + self.with_data(batch)

    def step(self, batch: Any, lower: list[Any], ahead: list[Any]) -> None:
        if self.upper_first:
            self.upper_step(batch)
        for now in lower:
            descend(self.lower_optimizer, self.lower_loss(now))
        if not self.upper_first:
            self.upper_step(batch)

    def upper_step(self, batch: Any) -> None:
        descend(self.optimizer, self.with_data(batch) - self.generated(batch))


def bidvl(machine: Machine) -> WithSampler:
    """With the KL, five lower steps first."""
    return WithSampler(machine, "upper.energy", rate=1e-3, lower_steps=5)


def advil(machine: Machine) -> WithSampler:
    """1 : 100 : 1, the upper level first."""
    return WithSampler(
        machine, "upper.model", rate=3e-4, lower_steps=100, upper_first=True, data_once=True
    )

"""Learners without a lower level as plain PyTorch loops: score matching, CD, likelihood, NCE."""

from abc import ABC, abstractmethod
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from benchmarks.competitors.plain import Machine, Plain, descend, noised, score


class Objective(nn.Module, ABC):
    """What a machine descends, with parameters of its own if it has any."""

    @abstractmethod
    def draw(self, machine: Machine, v: Tensor) -> Any:
        """The batch of a step."""

    @abstractmethod
    def loss(self, machine: Machine, batch: Any) -> Tensor:
        """The loss on a batch."""


@final
class OneLevel(Plain):
    """Adam on an objective."""

    def __init__(self, machine: Machine, objective: Objective) -> None:
        self.machine, self.objective = machine, objective
        parameters = [*machine.parameters(), *objective.parameters()]
        self.optimizer = torch.optim.Adam(parameters, 1e-3, (0.9, 0.95))

    def modules(self) -> dict[str, nn.Module]:
        return {"upper.model": self.machine}

    def draw(self, v: Tensor) -> Any:
        return self.objective.draw(self.machine, v)

    def draw_lower(self, batch: Any, step: int) -> Any:
        raise NotImplementedError("there is no lower level")

    def step(self, batch: Any, lower: list[Any], ahead: list[Any]) -> None:
        descend(self.optimizer, self.objective.loss(self.machine, batch))


@final
class Denoising(Objective):
    def draw(self, machine: Machine, v: Tensor) -> Any:
        return noised(v)

    def loss(self, machine: Machine, batch: Any) -> Tensor:
        _, s = score(lambda v: -machine.free_energy(v), batch[0])
        return 0.5 * ((s - batch[1]) ** 2).sum(1).mean()


@final
class Sliced(Objective):
    def draw(self, machine: Machine, v: Tensor) -> Any:
        return v, torch.sign(torch.randn_like(v))

    def loss(self, machine: Machine, batch: Any) -> Tensor:
        v, s = score(lambda v: -machine.free_energy(v), batch[0])
        slope = torch.autograd.grad((s * batch[1]).sum(), v, create_graph=True)[0]
        return (0.5 * (s**2).sum(1) + (slope * batch[1]).sum(1)).mean()


@final
class Contrastive(Objective):
    """Contrastive divergence with one sweep, from the data or, if `persistent`, from kept chains."""

    def __init__(self, *, persistent: bool = False) -> None:
        super().__init__()
        self.persistent = persistent
        self.chains: Tensor | None = None

    def draw(self, machine: Machine, v: Tensor) -> Any:
        start = self.chains if self.chains is not None else machine.latent(v)
        samples, h = machine.gibbs(start)
        if self.persistent:
            self.chains = h
        return v, None, samples, None

    def loss(self, machine: Machine, batch: Any) -> Tensor:
        return machine.free_energy(batch[0]).mean() - machine.free_energy(batch[2]).mean()


@final
class Likelihood(Objective):
    def draw(self, machine: Machine, v: Tensor) -> Any:
        return v

    def loss(self, machine: Machine, batch: Any) -> Tensor:
        return machine.free_energy(batch).mean() + machine.log_partition()


@final
class Noise(Objective):
    """Noise-contrastive estimation against a standard normal distribution."""

    def __init__(self) -> None:
        super().__init__()
        self.constant = nn.Parameter(torch.zeros(()))

    def draw(self, machine: Machine, v: Tensor) -> Any:
        noise = torch.randn_like(v)
        normal = torch.distributions.Normal(0.0, 1.0)
        return v, noise, normal.log_prob(v).sum(1), normal.log_prob(noise).sum(1)

    def loss(self, machine: Machine, batch: Any) -> Tensor:
        v, noise, of_data, of_noise = batch
        data = -machine.free_energy(v) - self.constant - of_data
        other = -machine.free_energy(noise) - self.constant - of_noise
        return -logsigmoid(data).mean() - logsigmoid(-other).mean()

"""The learners of `benchmarks.learner_speed` as plain PyTorch loops, with `torch.optim.Adam`.

Written the way one writes them first, without this library. A step's noise lies in the same tuples as
this library's, so that both can be given the same.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, softplus

SIGMA, TEMPERATURE = 0.05, 0.1


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


def score(log_density: Any, v: Tensor) -> tuple[Tensor, Tensor]:
    v = v.detach().requires_grad_()
    return v, torch.autograd.grad(log_density(v).sum(), v, create_graph=True)[0]


class Plain:
    """One learner: `draw` the noise, take a `step`."""

    lower_steps = unrolled = 0

    def __init__(self, machine: Machine, rate: float = 1e-3, betas: Any = (0.9, 0.95)) -> None:
        self.machine = machine
        self.optimizer = torch.optim.Adam(machine.parameters(), rate, betas)

    def modules(self) -> dict[str, nn.Module]:
        """By their name in this library's learner."""
        return {"upper.model": self.machine}

    def draw(self, v: Tensor) -> Any:
        return v

    def draw_lower(self, batch: Any, step: int) -> Any:
        raise NotImplementedError

    def turn(self, data: Tensor) -> None:
        batch = self.draw(data[torch.randint(len(data), (100,))])
        lower = [self.draw_lower(batch, i) for i in range(self.lower_steps)]
        self.step(batch, lower, [self.draw_lower(batch, i) for i in range(self.unrolled)])

    def step(self, batch: Any, lower: list[Any], ahead: list[Any]) -> None:
        descend(self.optimizer, self.loss(batch))

    def loss(self, batch: Any) -> Tensor:
        raise NotImplementedError


def descend(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


class Denoising(Plain):
    def draw(self, v: Tensor) -> Any:
        noise = torch.randn_like(v)
        return v + SIGMA * noise, -noise / SIGMA, None

    def loss(self, batch: Any) -> Tensor:
        _, s = score(lambda v: -self.machine.free_energy(v), batch[0])
        return 0.5 * ((s - batch[1]) ** 2).sum(1).mean()


class Sliced(Plain):
    def draw(self, v: Tensor) -> Any:
        return v, torch.sign(torch.randn_like(v))

    def loss(self, batch: Any) -> Tensor:
        v, s = score(lambda v: -self.machine.free_energy(v), batch[0])
        slope = torch.autograd.grad((s * batch[1]).sum(), v, create_graph=True)[0]
        return (0.5 * (s**2).sum(1) + (slope * batch[1]).sum(1)).mean()


class Contrastive(Plain):
    chains: Tensor | None = None
    persistent = False

    def draw(self, v: Tensor) -> Any:
        start = self.chains if self.chains is not None else self.machine.latent(v)
        samples, h = self.machine.gibbs(start)
        if self.persistent:
            self.chains = h
        return v, None, samples, None

    def loss(self, batch: Any) -> Tensor:
        return self.machine.free_energy(batch[0]).mean() - self.machine.free_energy(batch[2]).mean()


class Persistent(Contrastive):
    persistent = True


class Likelihood(Plain):
    def loss(self, batch: Any) -> Tensor:
        return self.machine.free_energy(batch).mean() + self.machine.log_partition()


class Noise(Plain):
    def __init__(self, machine: Machine) -> None:
        super().__init__(machine)
        self.constant = nn.Parameter(torch.zeros(()))
        self.optimizer.add_param_group({"params": [self.constant]})

    def draw(self, v: Tensor) -> Any:
        noise = torch.randn_like(v)
        normal = torch.distributions.Normal(0.0, 1.0)
        return v, noise, normal.log_prob(v).sum(1), normal.log_prob(noise).sum(1)

    def loss(self, batch: Any) -> Tensor:
        v, noise, of_data, of_noise = batch
        data = -self.machine.free_energy(v) - self.constant - of_data
        other = -self.machine.free_energy(noise) - self.constant - of_noise
        return -logsigmoid(data).mean() - logsigmoid(-other).mean()


class Bilevel(Denoising):
    """BiSM: K lower steps, N unrolled steps of Adam by hand."""

    lower_steps = 5

    def __init__(self, machine: Machine, unrolled: int = 0) -> None:
        super().__init__(machine)
        self.posterior = nn.Linear(*machine.weight.shape)
        self.lower_optimizer = torch.optim.Adam(self.posterior.parameters(), 1e-3, (0.9, 0.95))
        self.unrolled = unrolled

    def modules(self) -> dict[str, nn.Module]:
        return {"upper.model": self.machine, "lower.posterior.networks.0": self.posterior}

    def draw(self, v: Tensor) -> Any:
        return v, super().draw(v), logistic(len(v), len(self.machine.latent_bias))

    def draw_lower(self, batch: Any, step: int) -> Any:
        _, points, latent = self.draw(batch[0])
        return points[0], latent, None

    def relaxed(self, v: Tensor, noise: Tensor, weights: list[Tensor]) -> tuple[Tensor, Tensor]:
        logits = torch.nn.functional.linear(v, *weights)
        return logits, torch.sigmoid((logits + noise) / TEMPERATURE)

    def lower_loss(self, batch: Any, weights: list[Tensor]) -> Tensor:
        logits, h = self.relaxed(batch[0], batch[1], weights)
        return (self.machine.energy(batch[0], h) + log_bernoulli(logits, h)).mean()

    def upper_loss(self, batch: Any, weights: list[Tensor]) -> Tensor:
        _, (noised, target, _), noise = batch
        _, h = self.relaxed(noised, noise, weights)

        def log_ratio(v: Tensor) -> Tensor:
            logits = torch.nn.functional.linear(v, *weights)
            return -self.machine.energy(v, h) - log_bernoulli(logits, h)

        _, s = score(log_ratio, noised)
        return 0.5 * ((s - target) ** 2).sum(1).mean()

    def fit_posterior(self, lower: list[Any]) -> list[Tensor]:
        for batch in lower:
            descend(self.lower_optimizer, self.lower_loss(batch, list(self.posterior.parameters())))
        return list(self.posterior.parameters())

    def step(self, batch: Any, lower: list[Any], ahead: list[Any]) -> None:
        weights = self.fit_posterior(lower)
        states = [self.lower_optimizer.state[p] for p in weights]
        moments = [(s["exp_avg"], s["exp_avg_sq"]) for s in states]
        for count, now in enumerate(ahead, 1 + int(states[0]["step"])):
            grads = torch.autograd.grad(self.lower_loss(now, weights), weights, create_graph=True)
            new = []
            for i, (p, g) in enumerate(zip(weights, grads, strict=True)):
                m, s = moments[i]
                m, s = 0.9 * m + 0.1 * g, 0.95 * s + 0.05 * g**2
                moments[i] = (m, s)
                root = torch.sqrt(s) / (1 - 0.95**count) ** 0.5 + 1e-8
                new.append(p - 1e-3 / (1 - 0.9**count) * m / root)
            weights = new
        descend(self.optimizer, self.upper_loss(batch, weights))


class BilevelImplicit(Bilevel):
    """The exact best response: a dense Hessian, row by row, of the lower loss in closed form."""

    unrolled = 1
    damping = 1e-3

    def __init__(self, machine: Machine) -> None:
        super().__init__(machine, 1)

    def lower_loss(self, batch: Any, weights: list[Tensor]) -> Tensor:
        logits = torch.nn.functional.linear(batch[0], *weights)
        mean = torch.sigmoid(logits)
        return (self.machine.energy(batch[0], mean) + log_bernoulli(logits, mean)).mean()

    def step(self, batch: Any, lower: list[Any], ahead: list[Any]) -> None:
        weights, theta = self.fit_posterior(lower), list(self.machine.parameters())
        loss = self.upper_loss(batch, weights)
        both = torch.autograd.grad(loss, [*theta, *weights], allow_unused=True)
        rhs = torch.cat([g.flatten() for g in both[len(theta) :]])
        slopes = torch.autograd.grad(self.lower_loss(ahead[0], weights), weights, create_graph=True)
        slope = torch.cat([g.flatten() for g in slopes])
        rows = [torch.autograd.grad(g, weights, retain_graph=True) for g in slope]
        hessian = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
        w = torch.linalg.solve(hessian + self.damping * torch.eye(len(hessian)), rhs)
        cross = torch.autograd.grad(slope @ w, theta, allow_unused=True)
        for p, direct, response in zip(theta, both, cross, strict=False):
            kept = torch.zeros_like(p) if direct is None else direct
            p.grad = kept if response is None else kept - response
        self.optimizer.step()

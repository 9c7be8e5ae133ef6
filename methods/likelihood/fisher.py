r"""The Fisher divergence of a model from data, with a critic in place of the data's unknown score.

For the scores $s = \nabla_v \log p$ of the model and $s_d = \nabla_v \log p_d$ of the data,

$$ D_F = \tfrac12 \mathbb{E}_{p_d} \lVert s - s_d \rVert^2
   = \max_f \; \mathbb{E}_{p_d}\big[ s(v)^T f(v) + \mathrm{tr}\, \nabla_v f(v)
     - \tfrac12 \lVert f(v) \rVert^2 \big], $$

because $\mathbb{E}_{p_d}[\mathrm{tr}\, \nabla_v f] = -\mathbb{E}_{p_d}[s_d^T f]$ by partial
integration, which completes the square: the maximum is at $f = s - s_d$. The trace is estimated by
$u^T (\nabla_v f) u$ with random signs u. Any critic gives a lower bound, so the one that is best on
validation data is reported on data it was neither trained on nor picked by.
"""

import math
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from itertools import pairwise
from typing import cast, final

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from bilevel.arguments import explained

Score = Callable[[Tensor], Tensor]

_PROBES = 10  # sign vectors per row where the critic is judged
_CHECKS = 50  # times the critic is judged on the validation data


@final
@dataclass(frozen=True)
class FisherDivergence:
    """A lower bound on the Fisher divergence.

    Attributes:
        value: the critic's objective on the test split.
        standard_error: of `value`, from the spread over the test split.
        validation: the objective that picked the critic.
        step: the training step the critic is of.
    """

    value: float
    standard_error: float
    validation: float
    step: int


@explained
def fisher_divergence(
    score: Score,
    data: Tensor,
    *,
    hidden: tuple[int, ...] | None = None,
    num_steps: int = 20_000,
    batch_size: int = 100,
    learning_rate: float = 2e-4,
    generator: torch.Generator,
) -> FisherDivergence:
    """Estimate 0.5 E|s - s_d|^2 by training a critic on 80% of the data.

    Args:
        score: v (n, d) -> the model's score (n, d); it may be a random estimate whose mean is the score,
            such as VaES with draws of its own.
        data: draws from the data distribution, shape (n, d), at least 10.
        hidden: widths of the critic's hidden layers, of ELU units; (d, d) by default.
        num_steps: steps of Adam.
        batch_size: rows per step.
        learning_rate: Adam's.
        generator: splits the data (80/10/10) and draws weights, batches and signs; on its device.

    Raises:
        ValueError: if the data has no two dimensions or fewer than 10 rows, or there are no steps.

    References:
        Variational (Gradient) Estimate of the Score Function in Energy-based Latent Variable Models (Bao
        et al., ICML 2021), https://arxiv.org/abs/2010.08258.
        Differs from the paper in: the critic's last layer starts at zero, so an untrained critic
        reports 0 and not a negative divergence.
    """
    if data.ndim != 2 or len(data) < 10:
        raise ValueError(
            "`data` must have shape (n, d) with n of at least 10, to be split into training, validation "
            f"and test rows; got {tuple(data.shape)}"
        )
    if num_steps < 1 or batch_size < 1:
        raise ValueError(
            f"`num_steps` and `batch_size` must be at least 1, got {num_steps!r} and {batch_size!r}"
        )
    n, d = data.shape
    rows = data[torch.randperm(n, generator=generator, device=data.device)]
    held = n // 10
    train, validation, test = rows[2 * held :], rows[:held], rows[held : 2 * held]
    critic = _critic((d, *((d, d) if hidden is None else hidden), d), generator, data)
    signs = rademacher(validation, generator)
    reached, at, chosen = -math.inf, 0, critic
    for step in _trained(critic, score, train, num_steps, batch_size, learning_rate, generator):
        value = float(fisher_objective(critic, score, validation, signs).detach().mean())
        if value > reached:
            reached, at, chosen = value, step, deepcopy(critic)
    probed = [
        fisher_objective(chosen, score, test, rademacher(test, generator)).detach()
        for _ in range(_PROBES)
    ]
    values = torch.stack(probed).mean(0)
    error = float(values.std()) / math.sqrt(len(test)) if len(test) > 1 else math.inf
    return FisherDivergence(float(values.mean()), error, reached, at)


def fisher_divergence_exact(model_score: Score, data_score: Score, data: Tensor) -> float:
    """0.5 E|s - s_d|^2 over the rows of `data`, where both scores are known."""
    difference = model_score(data) - data_score(data)
    return 0.5 * float(difference.detach().square().sum(1).mean())


def fisher_objective(critic: Score, score: Score, v: Tensor, signs: Tensor) -> Tensor:
    r"""$s^T f + u^T (\nabla_v f) u - \frac12 |f|^2$ per row, shape (n,), differentiable in the critic.

    The term in u is the trace of the critic's Jacobian on average over random signs; for each single u
    it is so only if the Jacobian is diagonal.

    Args:
        critic: f, rows (n, d) -> (n, d), each row from its own.
        score: s, the same.
        v: shape (n, d).
        signs: u, from `rademacher`, shape (n, d).
    """
    v = v.detach().requires_grad_()
    with torch.enable_grad():
        f = critic(v)
        (product,) = torch.autograd.grad((f * signs).sum(), v, create_graph=True)
    s = score(v.detach()).detach()
    return (s * f - 0.5 * f.square() + product * signs).sum(1)


def rademacher(like: Tensor, generator: torch.Generator) -> Tensor:
    """Independent signs +1 and -1, of the shape, dtype and device of `like`."""
    bits = torch.randint(0, 2, like.shape, generator=generator, device=like.device)
    return (2 * bits - 1).to(like.dtype)


def _trained(
    critic: nn.Module,
    score: Score,
    train: Tensor,
    num_steps: int,
    batch_size: int,
    learning_rate: float,
    generator: torch.Generator,
) -> Iterator[int]:
    """Train the critic in place; stops `_CHECKS` times, and at the end, with the number of steps."""
    optimizer = torch.optim.Adam(critic.parameters(), lr=learning_rate)
    parameters = list(critic.parameters())
    every = max(1, num_steps // _CHECKS)
    for step in range(1, num_steps + 1):
        rows = torch.randint(len(train), (batch_size,), generator=generator, device=train.device)
        v = train[rows]
        loss = -fisher_objective(critic, score, v, rademacher(v, generator)).mean()
        # not `.backward()`: the score's module would get gradients too
        for parameter, gradient in zip(
            parameters, torch.autograd.grad(loss, parameters), strict=True
        ):
            parameter.grad = gradient
        optimizer.step()
        if step % every == 0 or step == num_steps:
            yield step


def _critic(widths: tuple[int, ...], generator: torch.Generator, like: Tensor) -> nn.Sequential:
    """ELU layers, torch's uniform start from `generator`, and a last layer of zeros."""
    layers: list[nn.Module] = []
    for below, above in pairwise(widths):
        layer = cast(
            nn.Linear, skip_init(nn.Linear, below, above, device=like.device, dtype=like.dtype)
        )
        for parameter in layer.parameters():
            bound = 1 / math.sqrt(below)
            nn.init.uniform_(parameter, -bound, bound, generator=generator)
        layers += [layer, nn.ELU()]
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers[:-1])

r"""Score-matching losses of an unnormalised log-density $w(v)$, with $s(v) = \nabla_v w(v)$ its score.

All of them are, up to a constant, $\tfrac12 E \lVert s - \nabla \log p_{data} \rVert^2$ for the data
or a noised version of it, rewritten so that the data's own score is not needed. With $u$ a vector of
random signs and $\epsilon \sim N(0, I)$,

| objective | loss of one visible | taken at |
| --- | --- | --- |
| exact | $\tfrac12 \lVert s \rVert^2 + \mathrm{tr} \nabla_v s$ | $v$ |
| sliced | $\tfrac12 \lVert s \rVert^2 + u^T \nabla_v (u^T s)$ | $v$ |
| denoising | $\tfrac12 \lVert s + \epsilon / \sigma \rVert^2$ | $v + \sigma \epsilon$ |
| multiscale | $\tfrac12 \lVert s / \sigma_i + \epsilon / \sigma^2 \rVert^2$ | $v + \sigma_i \epsilon$ |

where $\sigma_i$ is the i-th point of a geometric or linear grid over the batch, the same in every step.
The last two regress the score, times a gain, on a target, so their derivative in the score is
$\mathrm{gain} \cdot (\mathrm{gain} \cdot s - \mathrm{target})$. Everything random is drawn by `draw`.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias, final

import torch
from torch import Tensor

from bilevel.methods.variational.base import normal_like
from bilevel.refusals import one_of, positive, shown

ObjectiveName: TypeAlias = Literal["denoising", "sliced", "multiscale", "exact"]
Grid: TypeAlias = Literal["geometric", "linear"]
LogDensity: TypeAlias = Callable[[Tensor], Tensor]


@final
class Probed(NamedTuple):
    """Clean visibles, and directions of random signs (all zero where none are needed)."""

    visible: Tensor
    direction: Tensor

    @property
    def gain(self) -> None:
        """The score itself counts."""
        return None


@final
class Noised(NamedTuple):
    """Noised visibles, and what the score there is regressed on.

    Attributes:
        visible: shape (n, ...).
        target: what `gain` times the score should be, shape (n, ...).
        gain: shape (n, 1, ...), or `None` for 1.
    """

    visible: Tensor
    target: Tensor
    gain: Tensor | None


def score(log_density: LogDensity, v: Tensor) -> tuple[Tensor, Tensor]:
    """A copy of v to differentiate in and the score there, which is differentiable itself.

    Args:
        log_density: (n, ...) -> (n,), row by row.
        v: visibles, shape (n, ...).
    """
    with torch.enable_grad():  # the caller may want the loss only
        v = v.detach().requires_grad_()
        return v, torch.autograd.grad(log_density(v).sum(), v, create_graph=True)[0]


def square_norm(x: Tensor) -> Tensor:
    """Squared Euclidean norm of every row, shape (n,)."""
    return x.flatten(1).square().sum(1)


class ScoreObjective(ABC):
    """A score-matching loss: a frozen record of its settings."""

    @property
    @abstractmethod
    def blur(self) -> float:
        """Deviation of the noise whose density with the data's is fitted; 0 for that of the data."""

    @abstractmethod
    def draw(self, v: Tensor, generator: torch.Generator) -> Probed | Noised:
        """Where the score is taken and the noise it is compared with."""

    @abstractmethod
    def loss(self, log_density: LogDensity, points: Any) -> Tensor:
        """The loss, averaged over the batch.

        Args:
            log_density: the unnormalised log-density w, (n, ...) -> (n,), row by row.
            points: from `draw`.
        """


@final
@dataclass(frozen=True)
class Exact(ScoreObjective):
    """Score matching with the exact trace: as many backward passes as there are visible units.

    References:
        Estimation of Non-Normalized Statistical Models by Score Matching (Hyvarinen, 2005),
        https://jmlr.org/papers/v6/hyvarinen05a.html
    """

    @property
    def blur(self) -> float:
        return 0.0

    def draw(self, v: Tensor, generator: torch.Generator) -> Probed:
        return Probed(v, torch.zeros_like(v))

    def loss(self, log_density: LogDensity, points: Probed) -> Tensor:
        v, s = score(log_density, points.visible)
        with torch.enable_grad():
            rows = [
                torch.autograd.grad(component.sum(), v, create_graph=True)[0].flatten(1)[:, i]
                for i, component in enumerate(s.flatten(1).unbind(1))
            ]
        return (0.5 * square_norm(s) + torch.stack(rows).sum(0)).mean()


@final
@dataclass(frozen=True)
class Sliced(ScoreObjective):
    """Sliced score matching with one direction of random signs per visible.

    References:
        Sliced Score Matching: A Scalable Approach to Density and Score Estimation (Song, Garg, Shi,
        Ermon, 2019), https://arxiv.org/abs/1905.07088
    """

    @property
    def blur(self) -> float:
        return 0.0

    def draw(self, v: Tensor, generator: torch.Generator) -> Probed:
        coins = torch.rand(v.shape, generator=generator, dtype=v.dtype, device=v.device)
        return Probed(v, 1 - 2 * coins.round())

    def loss(self, log_density: LogDensity, points: Probed) -> Tensor:
        v, s = score(log_density, points.visible)
        u = points.direction
        with torch.enable_grad():
            slope = torch.autograd.grad((s * u).sum(), v, create_graph=True)[0]
        return (0.5 * square_norm(s) + (slope * u).flatten(1).sum(1)).mean()


class Regression(ScoreObjective):
    """An objective that regresses the score of noised visibles on a target."""

    sigma: float

    @final
    @property
    def blur(self) -> float:
        return self.sigma

    @abstractmethod
    def draw(self, v: Tensor, generator: torch.Generator) -> Noised: ...

    @final
    def loss(self, log_density: LogDensity, points: Noised) -> Tensor:
        _, s = score(log_density, points.visible)
        return 0.5 * square_norm(residual(s, points)).mean()


@final
@dataclass(frozen=True)
class Denoising(Regression):
    """Denoising score matching at one noise level.

    Args:
        sigma: standard deviation of the noise.

    References:
        A Connection Between Score Matching and Denoising Autoencoders (Vincent, 2011),
        https://www.iro.umontreal.ca/~vincentp/Publications/smdae_techreport.pdf
    """

    sigma: float = 0.05

    def draw(self, v: Tensor, generator: torch.Generator) -> Noised:
        noise = normal_like(v, generator)
        return Noised(v + self.sigma * noise, noise / -self.sigma, None)


@final
@dataclass(frozen=True)
class MultiScale(Regression):
    """Denoising score matching at a grid of noise levels spread over the batch.

    Args:
        sigma: the noise level whose density the model is meant to fit.
        sigma_range: first and last level of the grid.
        grid: levels with equal ratios, or with equal differences.

    References:
        Learning Energy-Based Models in High-Dimensional Spaces with Multi-scale Denoising Score
        Matching (Li, Chen, Sommer, 2019), https://arxiv.org/abs/1910.07762
    """

    sigma: float = 0.05
    sigma_range: tuple[float, float] = (0.05, 1.0)
    grid: Grid = "geometric"

    def draw(self, v: Tensor, generator: torch.Generator) -> Noised:
        noise, levels = normal_like(v, generator), self.levels(v)
        return Noised(v + levels * noise, noise / -(self.sigma**2), 1 / levels)

    def levels(self, v: Tensor) -> Tensor:
        """The noise level of every row, shape (n, 1, ...)."""
        geometric = self.grid == "geometric"
        low, high = map(math.log, self.sigma_range) if geometric else self.sigma_range
        levels = torch.linspace(low, high, len(v), dtype=v.dtype, device=v.device)
        return (levels.exp() if geometric else levels).view(-1, *[1] * (v.ndim - 1))


def residual(s: Tensor, points: Noised) -> Tensor:
    """Gain times score, less the target; half its squared norm is the loss of a visible."""
    return (s if points.gain is None else points.gain * s) - points.target


def residual_slope(s: Tensor, points: Noised) -> Tensor:
    """The derivative in the score of half the residual's squared norm, shape of `s`."""
    r = residual(s, points)
    return r if points.gain is None else points.gain * r


def score_objective(
    name: ObjectiveName,
    sigma: float,
    sigma_range: tuple[float, float],
    grid: Grid = "geometric",
) -> ScoreObjective:
    """The objective of that name.

    Args:
        name: "denoising", "sliced", "multiscale" or "exact".
        sigma: noise level of the denoising objectives.
        sigma_range: first and last noise level of "multiscale".
        grid: of the levels between: "geometric" or "linear".

    Raises:
        ValueError: for an unknown name, or a noise level that is not positive.

    Example:
        >>> score_objective("denoising", 0.05, (0.05, 1.0))
        Denoising(sigma=0.05)
    """
    one_of("objective", name, ("denoising", "sliced", "multiscale", "exact"))
    one_of("grid", grid, ("geometric", "linear"))
    if not isinstance(sigma_range, Sequence) or isinstance(sigma_range, str):
        raise TypeError(f"`sigma_range` is a first and a last level, got {shown(sigma_range)}")
    for setting, value in (("sigma", sigma), *(("sigma_range", s) for s in sigma_range)):
        positive(setting, value)
    if len(sigma_range) != 2:
        raise ValueError(f"`sigma_range` is a first and a last level, got {sigma_range!r}")
    first, last = sigma_range
    objectives: dict[str, ScoreObjective] = {
        "denoising": Denoising(sigma),
        "sliced": Sliced(),
        "multiscale": MultiScale(sigma, (first, last), grid),
        "exact": Exact(),
    }
    return objectives[name]

r"""VaGES: score-based learning of a latent-variable model by variational estimates.

With $g(h) = \nabla_v \log \tilde p(v, h)$ and $\tilde p = e^{-E}$, the score of the marginal and its
derivative are expectations under the true posterior, which a learned $q(h|v; \phi)$ stands in for:

$$ s(v) = E_{p(h|v)}[g], \qquad \partial_\theta s(v) = E_{p(h|v)}[\partial_\theta g]
   + \mathrm{Cov}_{p(h|v)}(g, \partial_\theta \log \tilde p) . $$

From L draws of q these are the estimates VaES and VaGES,

$$ \hat s = \frac1L \sum_i g(h_i), \qquad
   \widehat{\partial_\theta s} = \frac1L \sum_i \partial_\theta g(h_i)
   + \frac{1}{L-1} \sum_i (g(h_i) - \bar g)\, \partial_\theta \log \tilde p(v, h_i)^T , $$

and serve every objective whose gradient has the form $E[z^T \partial_\theta s]$,

| objective | z | derivative of s taken at |
| --- | --- | --- |
| denoising | $\hat s(\tilde v) + \epsilon / \sigma$ | the same $\tilde v$ |
| multiscale | $(\hat s(\tilde v) / \sigma_i + \epsilon / \sigma^2) / \sigma_i$ | the same $\tilde v$ |
| stein | $k(v, v')\, \hat s(v) + \nabla_v k(v, v')$ | $v'$, the other half of the batch |

with $k = e^{-\lVert v - v' \rVert^2 / 2 \rho^2}$. z and either term of the gradient have draws of their
own. The upper loss has the objective's (estimated) value and this gradient; the
covariance stands for what a solver's response term would be, so `Alternating` is the only solver.
The lower level fits q to the posterior as BiSM's does (`score_learner`).
"""

from typing import Literal, NamedTuple, cast, final

import torch
from torch import Tensor, nn

from bilevel.methods.config import one_of
from bilevel.methods.score_learner import Divergence, Expectation, LowerBatch, ScoreLearner
from bilevel.methods.score_objectives import (
    Noised,
    Regression,
    residual,
    residual_slope,
    score_objective,
    square_norm,
)
from bilevel.methods.variational import BernoulliPosterior, Draws, VariationalPosterior
from bilevel.methods.variational.base import equal_weights
from bilevel.problem import Loss

GROUPS = 3  # independent draws for z, for the derivative of g, for the covariance


class Pairs(NamedTuple):
    """Two visibles per row that the kernel compares, each of shape (n, ...)."""

    visible: Tensor
    other: Tensor


class Batch(NamedTuple):
    """Visibles and the noise of one upper step.

    Attributes:
        data: the clean visibles, from which every lower step draws its own noise.
        points: where the score is taken and what it is compared with.
        latent: noise of the posterior's draws, of all three groups in turn.
    """

    data: Tensor
    points: Noised | Pairs
    latent: Tensor


class Samples(NamedTuple):
    """S draws from q(h|v) for each of n visibles.

    Attributes:
        score: g, flattened, shape (n, S, d).
        log_density: log p~(v, h), shape (n, S).
        weight: shape (n, S), rows sum to one.
        unbiased: factor that makes the weighted covariance unbiased: L / (L - 1), or 1 if all states
            are enumerated.
    """

    score: Tensor
    log_density: Tensor
    weight: Tensor
    unbiased: float

    def groups(self) -> list["Samples"]:
        """The three groups that lie one after the other in the rows."""
        scores, densities, weights = (x.chunk(GROUPS) for x in self[:3])
        return [
            Samples(*group, self.unbiased) for group in zip(scores, densities, weights, strict=True)
        ]

    def mean_score(self) -> Tensor:
        """VaES, shape (n, d)."""
        return (self.weight[..., None] * self.score).sum(1)

    def covariance(self, z: Tensor) -> Tensor:
        r"""Numbers whose gradient in theta is $z^T \mathrm{Cov}(g, \nabla \log \tilde p)$, (n,)."""
        along = (self.score.detach() * z[:, None]).sum(2)
        centered = along - (self.weight * along).sum(1, keepdim=True)
        return self.unbiased * (self.weight * centered * self.log_density).sum(1)


@final
class VaGES(ScoreLearner):
    """Score-based learning with variational estimates of the score and of its derivative.

    Args:
        model: the energy: a machine with Gaussian visibles, or any module (v, h) -> (n,).
        posterior: q(h|v); for a machine `BernoulliPosterior.for_model(model)` by default. One that
            needs no noise (its `noise` has no columns) enumerates its states, and all is exact.
        num_samples: number L of draws in each of the three groups.
        objective: "denoising", "multiscale" or "stein" (kernelized Stein discrepancy).
        divergence: lower loss: "kl", or "fisher" for real latents.
        sigma: noise level of the denoising objectives.
        sigma_range: first and last noise level of "multiscale".
        width: width of the kernel of "stein".
        covariance: keep the covariance. Without, the gradient is BiSM's partial derivative at the
            true posterior, for ablations.
        expectation: over q in the lower loss, "sampled" or "exact"; see `BiSM`.

    Raises:
        ValueError: for one sample with the covariance, an energy and a posterior that do not fit, or
            a bad setting.

    Example:
        >>> from bilevel.methods.models import GaussianRBM
        >>> learner = VaGES(GaussianRBM(2, 4), num_samples=2)
        >>> learner.fit(torch.rand(200, 2), num_steps=3).steps
        3

    References:
        Variational (Gradient) Estimate of the Score Function in Energy-based Latent Variable Models
        (Bao, Xu, Li, Hong, Zhu, Zhang, ICML 2021), https://arxiv.org/abs/2010.08258.
        Differs from the paper in: the upper level's draws of Bernoulli latents are binary, not relaxed;
        nothing is differentiated through them.
    """

    stops_lower_gradient = (
        "the upper loss is a surrogate, constant in the posterior, whose gradient holds the response "
        "already (the covariance); use `BiSM`"
    )

    def __init__(
        self,
        model: nn.Module,
        posterior: VariationalPosterior | None = None,
        *,
        num_samples: int = 2,
        objective: Literal["denoising", "multiscale", "stein"] = "denoising",
        divergence: Divergence = "kl",
        sigma: float = 0.05,
        sigma_range: tuple[float, float] = (0.05, 1.0),
        width: float = 0.1,
        covariance: bool = True,
        expectation: Expectation = "sampled",
    ) -> None:
        super().__init__()
        one_of("objective", objective, ("denoising", "multiscale", "stein"))
        if num_samples < 1 + covariance:
            raise ValueError(
                f"`num_samples` is {num_samples}, but the sample covariance divides by L - 1; use at "
                "least 2, or `covariance=False` (and at least 1)"
            )
        if not 0 < width < float("inf"):
            raise ValueError(f"`width` must be positive and finite, got {width!r}")
        self.num_samples, self.covariance, self.width = num_samples, covariance, width
        regression = (
            None if objective == "stein" else score_objective(objective, sigma, sigma_range)
        )
        self.regression = cast("Regression | None", regression)
        options = {
            "num_samples": num_samples,
            "objective": objective,
            "divergence": divergence,
            "sigma": sigma,
            "sigma_range": list(sigma_range),
            "width": width,
            "covariance": covariance,
            "expectation": expectation,
        }
        self.take(model, posterior, divergence, expectation, options)

    def draw(self, data: Tensor, generator: torch.Generator) -> Batch:
        points: Noised | Pairs
        if self.regression is not None:
            points = self.regression.draw(data, generator)
        else:
            half = len(data) // 2  # the last of an odd number is left out
            if half == 0:
                raise ValueError(
                    "objective='stein' compares pairs of visibles, got only one visible"
                )
            points = Pairs(data[:half], data[half : 2 * half])
        rows = GROUPS * self.num_samples * len(points.visible)
        return Batch(data, points, self.encoder.noise(rows, generator, data))

    def draw_lower(self, batch: Batch, generator: torch.Generator, step: int) -> LowerBatch:
        data = batch.data
        noise = self.lower_noise(data, generator)
        if self.regression is None:
            return LowerBatch(data, noise, None)
        points = self.regression.draw(data, generator)
        return LowerBatch(points.visible, noise, points.gain)

    def upper_loss(self, batch: Batch) -> Loss:
        """The objective's estimate; its gradient is VaGES, not the derivative of that number."""
        points = batch.points
        second = points.other if isinstance(points, Pairs) else points.visible
        samples = self.samples(torch.cat([points.visible, second, second]), batch.latent)
        for_score, for_slope, for_covariance = samples.groups()
        slope = for_slope.mean_score()
        value, z = self._compare(points, for_score.mean_score().detach(), slope.detach())
        surrogate = (z * slope).sum(1)
        if self.covariance:
            surrogate = surrogate + for_covariance.covariance(z)
        return (value + surrogate - surrogate.detach()).mean()

    def samples(self, v: Tensor, noise: Tensor) -> Samples:
        """Scores and log-densities at draws from q(h|v), differentiable in the energy's parameters.

        Args:
            v: visibles, shape (n, ...).
            noise: the posterior's, for n `num_samples` draws.
        """
        n, copies = len(v), self.num_samples
        v, h, _, weight = hard_draws(self.encoder, v.repeat_interleave(copies, 0), noise)
        with torch.enable_grad():
            v = v.detach().requires_grad_()
            log_density = -self.joint_energy(v, h)
            g = torch.autograd.grad(log_density.sum(), v, create_graph=True)[0]
        unbiased = copies / (copies - 1) if noise.shape[1] and copies > 1 else 1.0
        rows = (g.reshape(n, -1, g[0].numel()), log_density.view(n, -1), n * weight.view(n, -1))
        return Samples(*rows, unbiased)

    def _compare(self, points: Noised | Pairs, s: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        """The objective of every row and z; `s` and `other` are the scores at the row's visibles."""
        if isinstance(points, Pairs):
            return stein(points.visible, points.other, s, other, self.width)
        s = s.view_as(points.visible)
        value = 0.5 * square_norm(residual(s, points))
        return value, residual_slope(s, points).flatten(1)


def stein(
    v: Tensor, other: Tensor, s: Tensor, s_other: Tensor, width: float
) -> tuple[Tensor, Tensor]:
    r"""Half the Stein kernel of pairs and its derivative in the second score, up to symmetry.

    $$ U = k\, s^T s' + s^T \nabla_{v'} k + s'^T \nabla_v k + \mathrm{tr} \nabla_v \nabla_{v'} k,
       \qquad z = k s + \nabla_v k = \partial U / \partial s' . $$

    Pairs come in both orders equally often, so half of U has the gradient $z^T \partial s'$ on average.

    Args:
        v: first visibles, shape (n, ...).
        other: second visibles, likewise.
        s: scores at the first, shape (n, d).
        s_other: scores at the second, shape (n, d).
        width: of the kernel.

    Returns:
        U / 2, shape (n,), and z, shape (n, d).
    """
    apart, precision = (v - other).flatten(1), width**-2
    squares = precision * apart.square().sum(1)
    k = (-0.5 * squares).exp()
    pull = -precision * apart  # the gradient of log k in v, minus that in v'
    trace = precision * apart.shape[1] - precision * squares
    inside = (s * s_other).sum(1) + ((s_other - s) * pull).sum(1) + trace
    return 0.5 * k * inside, k[:, None] * (s + pull)


@torch.no_grad()
def hard_draws(posterior: VariationalPosterior, v: Tensor, noise: Tensor) -> Draws:
    """Draws without gradient; those of a `BernoulliPosterior` are exact, in {0, 1}."""
    if not isinstance(posterior, BernoulliPosterior):
        return posterior.draws(v, noise)
    layers = [v]
    widths = noise.split(posterior.latent_dims, dim=1)
    for network, part in zip(posterior.networks, widths, strict=True):
        layers.append((network(layers[-1]) + part > 0).to(v.dtype))
    h = torch.cat(layers[1:], dim=1)
    log_prob = posterior.log_prob(v, h)
    return Draws(v, h, log_prob, equal_weights(log_prob))

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
The lower level fits q to the posterior as BiSM's does (`PosteriorFit`).
"""

from typing import Any, ClassVar, Literal, NamedTuple, cast, final

import torch
from torch import Tensor, nn

from bilevel.arguments import explained
from bilevel.methods.eblvm import EBLVM
from bilevel.methods.models.coupled import Coupled, with_posterior
from bilevel.methods.models.deep_images import deep_images
from bilevel.methods.models.langevin import (
    PUBLISHED,
    AnnealedLangevin,
    LangevinSteps,
    Steps,
    refined,
)
from bilevel.methods.models.machine import MachineModel
from bilevel.methods.objectives.posterior import (
    Divergence,
    Expectation,
    LowerBatch,
    PosteriorFit,
    check_real_latents,
    check_real_visibles,
    energies_of,
)
from bilevel.methods.objectives.score import (
    Grid,
    Noised,
    Regression,
    residual,
    residual_slope,
    score_objective,
    square_norm,
)
from bilevel.methods.training.settings import SCORE_DEFAULTS
from bilevel.methods.variational import VariationalPosterior
from bilevel.problem import Loss
from bilevel.refusals import flag, modules_or_none, one_of, whole

_OPTIONS = (  # of the constructor, kept by name
    "num_samples",
    "covariance",
    "width",
    "variance_reduced",
    "latent_steps",
    "latent_rate",
    "latent_noise",
)
GROUPS = 3  # independent draws for z, for the derivative of g, for the covariance


@final
class Pairs(NamedTuple):
    """Two visibles per row that the kernel compares, each of shape (n, ...)."""

    visible: Tensor
    other: Tensor


@final
class Batch(NamedTuple):
    """Visibles and the noise of one upper step.

    Attributes:
        data: the clean visibles, from which every lower step draws its own noise.
        points: where the score is taken and what it is compared with.
        latent: noise of the posterior's draws, the groups one after the other, shape (n, 3 L, d).
        langevin: noise of the Langevin steps on them, shape (n, steps, 3 L, d).
    """

    data: Tensor
    points: Noised | Pairs
    latent: Tensor
    langevin: Tensor


@final
class Samples(NamedTuple):
    """S latents for each of n visibles, drawn from q(h|v) and perhaps refined.

    Attributes:
        visible: what the densities can be differentiated in, shape (n, ...).
        latent: shape (n, S, ...), constants.
        log_density: log p~(v, h), shape (n, S), differentiable in v and in theta.
        weight: shape (n, S), rows sum to one.
    """

    visible: Tensor
    latent: Tensor
    log_density: Tensor
    weight: Tensor

    def groups(self, count: int) -> list["Samples"]:
        """As many groups, which lie one after the other."""
        latents, densities, weights = (x.chunk(count, dim=1) for x in self[1:])
        return [
            Samples(self.visible, h, log_density, count * weight)
            for h, log_density, weight in zip(latents, densities, weights, strict=True)
        ]

    def covariance(self, along: Tensor) -> Tensor:
        r"""Numbers whose gradient in theta is $z^T \mathrm{Cov}(g, \nabla \log \tilde p)$, (n,).

        Args:
            along: $z^T g$ of every latent, constants, shape (n, S).
        """
        centered = along - (self.weight * along).sum(1, keepdim=True)
        return (self.weight * centered * self.log_density).sum(1)


@final
class VaGES(EBLVM):
    r"""Score-based learning with variational estimates of the score and of its derivative.

    Args:
        model: the energy: a machine with Gaussian visibles, or any module (v, h) -> (n,).
        posterior: q(h|v); for a machine `BernoulliPosterior.for_model(model)` by default. One that
            needs no noise (its `noise` has no columns) enumerates its states, and all is exact.
        num_samples: number L of draws in each of the three groups.
        objective: "denoising", "multiscale" or "stein" (kernelized Stein discrepancy).
        divergence: lower loss: "kl", or "fisher" for real latents.
        sigma: noise level of the denoising objectives.
        sigma_range: first and last noise level of "multiscale".
        grid: of the levels between: "geometric" or "linear".
        width: width of the kernel of "stein".
        covariance: keep the covariance. Without, the gradient is BiSM's partial derivative at the
            true posterior, for ablations.
        expectation: over q in the lower loss, "sampled" or "exact"; see `BiSM`.
        variance_reduced: take z with the score of p~ / q instead of that of p~, whose mean under q is
            the same.
        latent_steps: Langevin steps on every latent drawn from q, $h - \tfrac12 \alpha \nabla_h E +
            \sigma \epsilon$.
        latent_rate: their step size alpha.
        latent_noise: their noise sigma.
        langevin: steps of the annealed dynamics that draw visibles; see `BiSM`.

    Raises:
        ValueError: for one sample with the covariance, an energy and a posterior that do not fit, or
            a bad setting.

    Example:
        >>> from bilevel.methods.machines import GaussianRBM
        >>> learner = VaGES(GaussianRBM(2, 4), num_samples=2)
        >>> learner.fit(torch.rand(200, 2), num_steps=3).steps
        3

    References:
        Variational (Gradient) Estimate of the Score Function in Energy-based Latent Variable Models
        (Bao, Xu, Li, Hong, Zhu, Zhang, ICML 2021), https://arxiv.org/abs/2010.08258.
        Differs from the paper in: the upper level's draws of Bernoulli latents are binary, not relaxed;
        nothing is differentiated through them.
    """

    latent_model: MachineModel | Coupled
    training_defaults: ClassVar[dict[str, Any]] = SCORE_DEFAULTS
    langevin = LangevinSteps()
    stops_lower_gradient = (
        "the upper loss is a surrogate, constant in the posterior, whose gradient holds the response "
        "already (the covariance); use `BiSM`"
    )

    @explained
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
        grid: Grid = "geometric",
        width: float = 0.1,
        covariance: bool = True,
        expectation: Expectation = "sampled",
        variance_reduced: bool = False,
        latent_steps: int = 0,
        latent_rate: float = 1e-2,
        latent_noise: float = 1e-4,
        langevin: Steps = PUBLISHED,
    ) -> None:
        super().__init__()
        modules_or_none(posterior=posterior)
        one_of("objective", objective, ("denoising", "multiscale", "stein"))
        whole("num_samples", num_samples, 0)
        flag("covariance", covariance)
        if num_samples < 1 + covariance:
            raise ValueError(
                f"`num_samples` is {num_samples}, but the sample covariance divides by L - 1; use at "
                "least 2, or `covariance=False` (and at least 1)"
            )
        if not 0 < width < float("inf"):
            raise ValueError(f"`width` must be positive and finite, got {width!r}")
        _check_refinement(variance_reduced, latent_steps, latent_rate, latent_noise)
        self.num_samples, self.covariance, self.width = num_samples, covariance, width
        self.variance_reduced, self.latent_steps = variance_reduced, latent_steps
        self.latent_rate, self.latent_noise = latent_rate, latent_noise
        regression = (
            None if objective == "stein" else score_objective(objective, sigma, sigma_range, grid)
        )
        self.regression = cast("Regression | None", regression)
        check_real_visibles(model, "VaGES")
        self.posterior_fit = PosteriorFit(divergence, expectation)
        dynamics = AnnealedLangevin(
            langevin, 0.0 if self.regression is None else self.regression.blur
        )
        self.latent_model = with_posterior(model, posterior, dynamics)
        self.posterior_fit.check(model, self.encoder)
        if latent_steps:
            check_real_latents("latent_steps", model, self.encoder)
        self.upper = nn.ModuleDict({"model": model})
        self.lower = nn.ModuleDict({"posterior": self.encoder})
        if posterior is None:
            options = {name: getattr(self, name) for name in _OPTIONS}
            options |= {"objective": objective, "divergence": divergence, "sigma": sigma}
            options |= {"sigma_range": list(sigma_range), "grid": grid, "expectation": expectation}
            self.recipe = {"model": self.model.recipe, **options, "langevin": list(langevin)}

    for_images: ClassVar[Any] = classmethod(deep_images)

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
        n, copies = len(points.visible), GROUPS * self.num_samples
        latent = self.encoder.noise(n * copies, generator, data).unflatten(0, (n, copies))
        size = (len(latent), self.latent_steps, *latent.shape[1:])
        langevin = torch.randn(size, generator=generator, dtype=latent.dtype, device=latent.device)
        return Batch(data, points, latent, langevin)

    def draw_lower(self, batch: Batch, generator: torch.Generator, step: int) -> LowerBatch:
        data = batch.data
        noise = self.posterior_fit.noise(self.encoder, data, generator)
        if self.regression is None:
            return LowerBatch(data, noise, None)
        points = self.regression.draw(data, generator)
        return LowerBatch(points.visible, noise, points.gain)

    def lower_loss(self, batch: LowerBatch) -> Loss:
        """The divergence of q(h|v) from p(h|v), up to what q does not change."""
        return self.posterior_fit.loss(self.latent_model.network, self.encoder, batch)

    @torch.enable_grad()
    def upper_loss(self, batch: Batch) -> Loss:
        """The objective's estimate; its gradient is VaGES, not the derivative of that number."""
        points, latent, langevin = batch.points, batch.latent, batch.langevin
        if self.regression is None:
            own, pairs = self.num_samples, cast(Pairs, points)
            for_score = self.samples(pairs.visible, latent[:, :own], langevin[:, :, :own])
            rest = self.samples(pairs.other, latent[:, own:], langevin[:, :, own:])
            for_slope, for_covariance = rest.groups(2)
        else:
            groups = self.samples(points.visible, latent, langevin).groups(GROUPS)
            for_score, for_slope, for_covariance = groups
        slope, directions = slope_and_directions(for_slope, for_covariance)
        value, z = self._compare(points, self.estimated_score(for_score), slope.detach())
        surrogate = (z * slope).flatten(1).sum(1)
        if self.covariance:
            (along,) = torch.autograd.grad(surrogate.sum(), directions, retain_graph=True)
            enumerated = latent.shape[2] == 0
            unbiased = 1.0 if enumerated else self.num_samples / (self.num_samples - 1)
            surrogate = surrogate + unbiased * for_covariance.covariance(along)
        return (value + surrogate - surrogate.detach()).mean()

    def samples(self, v: Tensor, noise: Tensor, langevin: Tensor) -> Samples:
        """Draws from q(h|v), refined by Langevin steps, and log p~ there.

        Args:
            v: visibles, shape (n, ...).
            noise: the posterior's, shape (n, S, d).
            langevin: of the steps, shape (n, steps, S, d).
        """
        with torch.no_grad():
            drawn = self.encoder.exact(v, noise.transpose(0, 1))
        h, weight = (x.transpose(0, 1).contiguous() for x in (drawn.latent, drawn.weight))
        with torch.enable_grad():
            v = v.detach().requires_grad_()
            energies = energies_of(self.latent_model.network, v)
            h = refined(energies, h, langevin.transpose(0, 1), self.latent_rate, self.latent_noise)
            return Samples(v, h, -energies(h), weight)

    def estimated_score(self, samples: Samples) -> Tensor:
        """VaES, a constant, shape (n, ...); with less variance if that was asked for."""
        v, h, log_density, weight = samples
        with torch.enable_grad():
            if self.variance_reduced:
                rows = v.repeat_interleave(h.shape[1], 0)
                log_q = self.encoder.log_prob(rows, h.flatten(0, 1))
                log_density = log_density - log_q.view_as(log_density)
            return torch.autograd.grad((weight * log_density).sum(), v, retain_graph=True)[0]

    def _compare(self, points: Noised | Pairs, s: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        """The objective of every row and z; `s` and `other` are the scores at the row's visibles."""
        if self.regression is None:
            scores, pairs = (s.flatten(1), other.flatten(1)), cast(Pairs, points)
            value, z = stein(pairs.visible, pairs.other, *scores, self.width)
            return value, z.view_as(other)
        noised = cast(Noised, points)
        return 0.5 * square_norm(residual(s, noised)), residual_slope(s, noised)


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


def slope_and_directions(samples: Samples, others: Samples) -> tuple[Tensor, Tensor]:
    r"""The mean of g over some latents, and a handle on the g of others at the same visibles.

    What is differentiated in v is $\sum_i w_i \log \tilde p(v, h_i) + \sum_j c_j \log \tilde p(v, h_j)$
    at c = 0, in a single backward pass through the energy. The result g is linear in c: $z^T g$ has the
    derivative $z^T g(h_j)$ in $c_j$, whatever z turns out to be.

    Args:
        samples: whose g is averaged.
        others: whose g is wanted along a direction that is not known yet.

    Returns:
        The mean of g, differentiable in theta, shape (n, ...), and c, shape (n, S).
    """
    directions = torch.zeros_like(others.log_density).requires_grad_()
    total = (samples.weight * samples.log_density).sum() + (directions * others.log_density).sum()
    slope = torch.autograd.grad(total, samples.visible, create_graph=True)[0]
    return slope, directions


def _check_refinement(variance_reduced: bool, steps: int, rate: float, noise: float) -> None:
    if variance_reduced and steps:
        raise ValueError(
            "`variance_reduced=True` needs latents of q, but `latent_steps` moves them away from it; "
            "use one of the two"
        )
    if min(steps, rate, noise) < 0:
        raise ValueError(
            "`latent_steps`, `latent_rate` and `latent_noise` cannot be negative, got "
            f"{steps}, {rate} and {noise}"
        )

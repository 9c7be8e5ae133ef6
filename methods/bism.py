r"""BiSM: bi-level score matching of an energy-based latent-variable model.

With an unnormalised joint density $\tilde p(v, h; \theta) = e^{-E(v, h; \theta)}$ and a variational
posterior $q(h|v; \phi)$, the marginal's score is replaced by that of $\tilde p / q$,

$$ w(v, h) = \log \frac{\tilde p(v, h; \theta)}{q(h|v; \phi)}, \qquad
   \text{upper:}\quad J(\theta, \phi) = E_v E_{q(h|v; \phi)}\, \ell(\nabla_v w(v, h)), $$

$$ \text{lower:}\quad \phi^*(\theta) = \arg\min_\phi\; E_v\, D(q(h|v; \phi), p(h|v; \theta)), $$

$\ell$ a score-matching loss and D a divergence that needs no normaliser (`PosteriorFit`). The gradient
in v sees v in both logarithms, not the draw h, which is differentiable in $\phi$ alone.

Where q is the true posterior, w(v, h) = log p~(v) for *every* h: J is then the score-matching objective
of the marginal, and its total derivative along $\phi^*(\theta)$ the gradient of that objective. The
partial derivative, `Alternating`, is not: it lacks the covariance of $\nabla_v \log \tilde p$ and
$\nabla_\theta \log \tilde p$ under the posterior, and so never moves the hidden biases of a machine. The
paper unrolls N Adam steps from the current $\phi$ (`Unrolled(N)`); `Implicit` takes the exact best
response, with the lower expectation in closed form ("exact") without any noise. On a machine the
default is one of these two (`BiSM.default_solver`).
"""

from typing import Any, ClassVar, Literal, NamedTuple, final

import torch
from torch import Tensor, nn

from bilevel import Alternating, Cholesky, ConjugateGradient, Implicit, Solver, Unrolled
from bilevel.arguments import explained
from bilevel.methods.eblvm import EBLVM
from bilevel.methods.models.coupled import Coupled, with_posterior
from bilevel.methods.models.deep_images import deep_images
from bilevel.methods.models.langevin import PUBLISHED, AnnealedLangevin, LangevinSteps, Steps
from bilevel.methods.models.machine import MachineModel
from bilevel.methods.objectives.posterior import (
    Divergence,
    Expectation,
    LowerBatch,
    PosteriorFit,
    check_real_visibles,
)
from bilevel.methods.objectives.score import Grid, Noised, Probed, score_objective
from bilevel.methods.training.settings import SCORE_DEFAULTS
from bilevel.methods.variational import VariationalPosterior
from bilevel.problem import Loss
from bilevel.refusals import modules_or_none
from bilevel.tree import Tree

UNROLLED_STEPS = 5
"""N of the paper's runs on machines."""
DAMPING = 1e-4
"""Of the exact best response: two visibles of a batch may be nearly alike."""
_DENSE = 500  # lower variables up to which a factorization costs less than the products it saves


@final
class Batch(NamedTuple):
    """Visibles and the noise of one upper step.

    Attributes:
        data: the clean visibles, from which every lower step draws its own noise.
        points: where the score is taken, from the objective.
        latent: noise of the posterior's draws.
    """

    data: Tensor
    points: Probed | Noised
    latent: Tensor


@final
class BiSM(EBLVM):
    r"""Bi-level score matching.

    Args:
        model: the energy: a machine with Gaussian visibles, or any module (v, h) -> (n,).
        posterior: q(h|v); for a machine `BernoulliPosterior.for_model(model)` by default.
        objective: "denoising" at one noise level, "multiscale" at many, or "sliced".
        divergence: lower loss: "kl", or "fisher" for real latents (whose draws "multiscale" weighs by
            $1/\sigma_i$).
        sigma: noise level of the denoising objectives.
        sigma_range: first and last noise level of "multiscale".
        grid: noise levels of "multiscale" with equal ratios ("geometric") or differences ("linear").
        expectation: over q in the lower loss: "sampled" by relaxed draws, new ones each step, or
            "exact" in closed form, for one hidden layer.
        langevin: steps of annealed Langevin dynamics that samples and reconstructions of an energy
            that is no machine take: at the highest temperature, from there to 1, and from 1 to 0.

    Raises:
        ValueError: for an energy and a posterior that do not fit, or a bad setting.

    Example:
        >>> from bilevel.methods.machines import GaussianRBM
        >>> learner = BiSM(GaussianRBM(2, 4), objective="denoising", sigma=0.05)
        >>> history = learner.fit(torch.rand(200, 2), num_steps=3)
        >>> type(history.solver).__name__, history.solver.num_steps
        ('Unrolled', 5)
        >>> learner.energy(torch.rand(5, 2)).shape
        torch.Size([5])

    References:
        Bi-level Score Matching for Learning Energy-based Latent Variable Models (Bao, Li, Xu, Su,
        Zhu, Zhang, NeurIPS 2020), https://arxiv.org/abs/2010.07856.
        Differs from the paper in:
        - the unrolled steps, too, see new noise each;
        - expectation="exact" and the exact best response by `Implicit` are not in it.
    """

    latent_model: MachineModel | Coupled
    training_defaults: ClassVar[dict[str, Any]] = SCORE_DEFAULTS
    langevin = LangevinSteps()

    @explained
    def __init__(
        self,
        model: nn.Module,
        posterior: VariationalPosterior | None = None,
        *,
        objective: Literal["denoising", "multiscale", "sliced"] = "denoising",
        divergence: Divergence = "kl",
        sigma: float = 0.05,
        sigma_range: tuple[float, float] = (0.05, 1.0),
        grid: Grid = "geometric",
        expectation: Expectation = "sampled",
        langevin: Steps = PUBLISHED,
    ) -> None:
        super().__init__()
        modules_or_none(posterior=posterior)
        check_real_visibles(model, "BiSM")
        self.objective = score_objective(objective, sigma, sigma_range, grid)
        self.posterior_fit = PosteriorFit(divergence, expectation)
        dynamics = AnnealedLangevin(langevin, self.objective.blur)
        self.latent_model = with_posterior(model, posterior, dynamics)
        self.posterior_fit.check(model, self.encoder)
        self.upper = nn.ModuleDict({"model": model})
        self.lower = nn.ModuleDict({"posterior": self.encoder})
        if posterior is None:
            options: dict[str, Any] = {"objective": objective, "divergence": divergence}
            options |= {"sigma": sigma}
            options |= {"sigma_range": list(sigma_range), "grid": grid, "expectation": expectation}
            self.recipe = {"model": self.model.recipe, **options, "langevin": list(langevin)}

    for_images: ClassVar[Any] = classmethod(deep_images)

    def default_solver(self) -> Solver:
        """On a machine one that keeps the response, else the paper's N = 0, `Alternating()`.

        For expectation="exact" the exact best response: `Implicit` with `Cholesky`, or from 500 lower
        variables on with `ConjugateGradient`; for relaxed draws the paper's `Unrolled(5)`.
        """
        if self.latent_model.machine is None:
            return Alternating()
        if self.posterior_fit.expectation == "sampled":
            return Unrolled(UNROLLED_STEPS)
        size = sum(p.numel() for p in self.variables("lower").values())
        if size <= _DENSE:
            return Implicit(Cholesky(damping=DAMPING))
        return Implicit(ConjugateGradient(damping=DAMPING))

    def draw(self, data: Tensor, generator: torch.Generator) -> Batch:
        points = self.objective.draw(data, generator)
        return Batch(data, points, self.encoder.noise(len(data), generator, data))

    def draw_lower(self, batch: Batch, generator: torch.Generator, step: int) -> LowerBatch:
        points = self.objective.draw(batch.data, generator)
        noise = self.posterior_fit.noise(self.encoder, batch.data, generator)
        return LowerBatch(points.visible, noise, points.gain)

    def upper_loss(self, batch: Batch) -> Loss:
        """The objective of log p~(v, h) - log q(h|v) at one draw h for every visible."""
        h = self.encoder.draws(batch.points.visible, batch.latent).latent

        def log_ratio(v: Tensor) -> Tensor:
            return -self.joint_energy(v, h) - self.encoder.log_prob(v, h)

        return self.objective.loss(log_ratio, batch.points)

    def lower_loss(self, batch: LowerBatch) -> Loss:
        """The divergence of q(h|v) from p(h|v), up to what q does not change."""
        return self.posterior_fit.loss(self.latent_model.network, self.encoder, batch)

    def best_response(self, batch: Any) -> Tree | None:
        """The weights and biases of a machine with one hidden layer, if q has linear logits.

        The minimum of the "exact" lower loss; `None` for a sampled one, whose relaxed draws move it.
        """
        if self.posterior_fit.expectation != "exact":  # other posteriors have no `networks`
            return None
        logits = self.encoder.get_submodule("networks.0")
        if not isinstance(logits, nn.Linear) or logits.bias is None:
            return None
        machine, at = self.model, "posterior.networks.0."
        return {f"{at}weight": machine.first_weight.mT, f"{at}bias": machine.first_bias}

r"""`ScoreLearner`: the lower level that BiSM and VaGES share, a variational posterior $q(h|v)$.

With the unnormalised joint density $\tilde p(v, h) = e^{-E(v, h)}$ the lower loss is, at visibles that
the score-matching objective has noised,

$$ \text{kl:}\quad E_q[\log q(h|v) + E(v, h)], \qquad
   \text{fisher:}\quad \tfrac12 E_q \lVert \nabla_h \log q(h|v) + \nabla_h E(v, h) \rVert^2 . $$

The first is $KL(q \,\|\, p(h|v))$ up to a term that q does not change; the second needs latents that
are real numbers. Where h is binary, q factorises and E is linear in h, the first is closed,

$$ E_q[\log q + E] = \sum_j (p_j a_j - \log(1 + e^{a_j})) + E(v, p), \qquad p = \sigma(a(v)) . $$

An energy of real latents has no free energy in closed form. With $h_k \sim q(h|v)$ it is bounded by

$$ F(v) = -\log \int e^{-E(v, h)} dh \;\le\;
   E\Big[ -\log \frac1K \sum_k \frac{e^{-E(v, h_k)}}{q(h_k|v)} \Big] , $$

and sampled by annealed Langevin dynamics (`langevin`).
"""

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Literal, NamedTuple, Self, TypeAlias, cast, final

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from bilevel.methods.eblvm import chunked, chunked_distribution
from bilevel.methods.learner import ModelLearner, Start, check_pairs, refuse_chains
from bilevel.methods.machines import LatentVariableModel
from bilevel.methods.models.langevin import Steps, check_steps, visible_chains
from bilevel.methods.networks.deep import VISIBLE_RANGE, CoupledEnergy, image_networks
from bilevel.methods.objectives.score import (
    Grid,
    check_closed,
    check_real_latents,
    check_real_visibles,
    square_norm,
)
from bilevel.methods.training.settings import one_of
from bilevel.methods.variational import BernoulliPosterior, GaussianPosterior, VariationalPosterior
from bilevel.methods.variational.base import normal_log_prob, normal_noise
from bilevel.problem import Loss

Divergence: TypeAlias = Literal["kl", "fisher"]
Expectation: TypeAlias = Literal["sampled", "exact"]

ENERGY_SAMPLES = 100
"""Draws of the importance-weighted bound that `energy` is where there is no free energy."""

_BLURRED = ("denoising", "multiscale")  # objectives that fit the density of the data plus noise
_ROWS = 50  # visibles whose bound is evaluated at a time, each with `ENERGY_SAMPLES` latents


class LowerBatch(NamedTuple):
    """What one lower step sees.

    Attributes:
        visible: visibles, noised if the objective noises them, shape (n, ...).
        latent: noise of the posterior's draws, empty where nothing is drawn.
        gain: weight of every visible in the Fisher divergence, shape (n, 1, ...), or `None` for 1.
    """

    visible: Tensor
    latent: Tensor
    gain: Tensor | None


class ScoreLearner(ModelLearner):
    """A method that learns q(h|v) at the lower level and takes scores of the model at the upper one.

    The energy is a Boltzmann machine, or any module (v, h) -> (n,). The latter has no free energy and
    no Gibbs sampler: with a `GaussianPosterior` a bound and Langevin dynamics stand for them, otherwise
    what needs them refuses by name.

    Attributes:
        langevin: steps of annealed Langevin dynamics that `sample` and `reconstruct` take; may be set.
    """

    training_defaults: ClassVar[dict[str, Any]] = {
        **ModelLearner.training_defaults,
        "lower_steps": 5,
    }
    divergence: Divergence
    expectation: Expectation
    langevin: Steps
    denoise: float

    @abstractmethod
    def draw_lower(self, batch: Any, generator: torch.Generator, step: int) -> LowerBatch:
        """The turn's visibles with new noise."""

    @final
    @classmethod
    def for_images(
        cls,
        shape: tuple[int, int, int],
        *,
        latent_dim: int = 50,
        width: int = 64,
        blocks: int = 2,
        objective: Literal["denoising", "multiscale"] = "multiscale",
        divergence: Divergence = "fisher",
        sigma: float = 0.2,
        sigma_range: tuple[float, float] = (0.2, 6.0),
        grid: Grid = "geometric",
        seed: int = 0,
        **options: Any,
    ) -> Self:
        """The published deep energy and Gaussian posterior, scaled to square images in [-1, 1].

        Noise levels are those of images in [-1, 1], twice those of the papers, whose images lie in
        [0, 1]. The defaults are the papers' for MNIST; for CIFAR-10 and CelebA they have `width=128`,
        `blocks=3`, `sigma_range=(0.1, 2.4)` and `grid="linear"`.

        Args:
            shape: (channels, side, side), at least 8 pixels.
            latent_dim: dimension of the latent: 20, 50 or 100 in the papers.
            width: first channels of the energy; the posterior has as many, at most 64.
            blocks: residual blocks per stage of the energy.
            objective: "multiscale" in the papers.
            divergence: lower loss: "fisher" in the papers.
            sigma: noise level whose density the model is meant to fit.
            sigma_range: first and last noise level of "multiscale".
            grid: noise levels between: with equal ratios or differences.
            seed: seed of the initial weights; torch's global generator is left as it was.
            **options: further arguments of the method.

        Returns:
            The untrained model.

        Raises:
            TypeError: if a number is not an integer.
            ValueError: if the images are not square or smaller than 8 pixels, or for a bad setting.
        """
        energy, posterior = image_networks(shape, latent_dim, width, blocks, seed)
        options |= {"objective": objective, "divergence": divergence, "sigma": sigma}
        options |= {"sigma_range": sigma_range, "grid": grid}
        learner = cls(energy, posterior, **options)
        learner.visible_shape, learner.visible_range = tuple(shape), VISIBLE_RANGE
        sizes = {"latent_dim": latent_dim, "width": width, "blocks": blocks, "seed": seed}
        learner.recipe = {"shape": shape, **sizes, **options}
        return learner

    @final
    def take(
        self, model: nn.Module, posterior: VariationalPosterior | None, options: dict[str, Any]
    ) -> None:
        """Take the energy and its posterior; `BernoulliPosterior.for_model` if there is none.

        Args:
            model: the energy.
            posterior: q(h|v).
            options: the constructor's other arguments.

        Raises:
            ValueError: for a pair that does not fit, naming both, or a bad setting.
        """
        divergence, expectation = options["divergence"], options["expectation"]
        one_of("divergence", divergence, ("kl", "fisher"))
        one_of("expectation", expectation, ("sampled", "exact"))
        check_real_visibles(model, type(self).__name__)
        machine = isinstance(model, LatentVariableModel)
        plain = machine and posterior is None
        if posterior is None:
            if not machine:
                raise ValueError(
                    f"there is no default posterior for a `{type(model).__name__}`; give one, such as "
                    "`GaussianPosterior(network, latent_dim)`"
                )
            posterior = BernoulliPosterior.for_model(cast(LatentVariableModel, model))
        if divergence == "fisher":
            check_real_latents("divergence='fisher'", model, posterior)
        if expectation == "exact":
            check_closed(model, posterior, divergence)
        self.divergence, self.expectation = divergence, expectation
        self.langevin = check_steps(options["langevin"])
        self.denoise = options["sigma"] if options["objective"] in _BLURRED else 0.0
        if machine:
            self.hold(
                cast(LatentVariableModel, model),
                {"posterior": posterior},
                options if plain else None,
            )
            return
        self.upper = nn.ModuleDict({"model": model})
        self.lower = nn.ModuleDict({"posterior": posterior})
        if isinstance(posterior, GaussianPosterior):
            self.latent_dim = posterior.latent_dim

    # ------------------------------------------------------------------ the lower level

    @final
    def joint_energy(self, v: Tensor, h: Tensor) -> Tensor:
        """E(v, h), differentiable, shape (n,)."""
        energies: Tensor = self._network(v, h)
        return energies

    @final
    def energies_of(self, v: Tensor) -> Callable[[Tensor], Tensor]:
        """The energies of several latents of each visible, (n, S, d) -> (n, S), differentiable.

        What a `CoupledEnergy` needs of v is computed here, once.
        """
        model = self._network
        if isinstance(model, CoupledEnergy):
            features = model.features(v)[:, None]
            return lambda h: model.coupled(features, h)

        def energies(h: Tensor) -> Tensor:
            rows = v.repeat_interleave(h.shape[1], 0)
            return self.joint_energy(rows, h.flatten(0, 1)).view(h.shape[:2])

        return energies

    @final
    def lower_noise(self, v: Tensor, generator: torch.Generator) -> Tensor:
        """The posterior's noise of one lower step; nothing where the expectation is exact."""
        return v[:0] if self.expectation == "exact" else self.encoder.noise(len(v), generator, v)

    @final
    def lower_loss(self, batch: LowerBatch) -> Loss:
        """The divergence of q(h|v) from p(h|v), up to what q does not change."""
        if self.divergence == "fisher":
            return self._fisher(batch)
        v = batch.visible
        if self.expectation == "exact":
            mean = cast(BernoulliPosterior, self.encoder).logits(v).sigmoid()
            return (self.joint_energy(v, mean) + self.encoder.log_prob(v, mean)).mean()
        draws = self.encoder.draws(v, batch.latent)
        return draws.mean(self.joint_energy(draws.visible, draws.latent) + draws.log_prob)

    def _fisher(self, batch: LowerBatch) -> Tensor:
        """Half the squared slope of log q + E in h, which of a Gaussian draw's log q is known."""
        v, posterior = batch.visible, self.encoder
        with torch.enable_grad():
            if isinstance(posterior, GaussianPosterior):
                mean, log_variance = posterior.moments(v)
                deviation = (log_variance / 2).exp()
                h, slope = mean + deviation * batch.latent, -batch.latent / deviation
                weight = v.new_full((len(v),), 1 / len(v))
                cost = self.joint_energy(v, h)
            else:
                v, h, _, weight = posterior.draws(v, batch.latent)
                h, slope = h if h.requires_grad else h.requires_grad_(), torch.zeros_like(h)
                cost = posterior.log_prob(v, h) + self.joint_energy(v, h)
            slope = slope + torch.autograd.grad(cost.sum(), h, create_graph=True)[0]
        rows = 0.5 * square_norm(slope)
        return (weight * (rows if batch.gain is None else rows * batch.gain.flatten())).sum()

    # ------------------------------------------------------------------ the trained model

    def energy(self, v: Tensor) -> Tensor:
        """The free energy of a machine; of real latents an importance-weighted bound on it.

        The bound has `ENERGY_SAMPLES` draws of a Gaussian q. Their noise is the same for every row and
        in every call: a function of v.

        Raises:
            ValueError: if the free energy of a machine would take too many terms.
            NotImplementedError: for other latents.
        """
        if self._is_machine:
            return ModelLearner.energy(self, v)
        posterior, v = self._gaussian(), self.check(v)
        generator = torch.Generator(v.device).manual_seed(0)
        noise = normal_noise(ENERGY_SAMPLES, posterior.latent_dim, generator, v)

        def bound(rows: Tensor) -> Tensor:
            mean, log_variance = (part[:, None] for part in posterior.moments(rows))
            log_prob = normal_log_prob(noise).sum(1) - 0.5 * log_variance.sum(2)
            energies = self.energies_of(rows)(mean + (log_variance / 2).exp() * noise)
            return math.log(ENERGY_SAMPLES) - (-energies - log_prob).logsumexp(1)

        with self.evaluating():
            return chunked(bound, v, _ROWS)

    def sample(
        self,
        n: int,
        generator: torch.Generator | None = None,
        *,
        start: Start | None = None,
        sweeps: int | None = None,
    ) -> Tensor:
        """Visibles of a machine by Gibbs sampling; of another energy by annealed Langevin dynamics.

        The latter starts visible and latent at random and moves both; the visibles are then cut to
        their range.

        Raises:
            ValueError: if n is not positive, or for `start` or `sweeps` of another module.
            NotImplementedError: if the latents are not real, or the shape of a visible is not known.
        """
        if self._is_machine:
            return ModelLearner.sample(self, n, generator, start=start, sweeps=sweeps)
        refuse_chains(start, sweeps)
        if n < 1:
            raise ValueError(f"`n` must be positive, got {n}")
        latent = next(self.parameters()).new_empty(n, self._gaussian().latent_dim)
        with self.evaluating():
            shape = self.visible_shape
            return visible_chains(self, self.joint_energy, latent, shape, generator, given=False)

    def reconstruct(self, v: Tensor) -> Tensor:
        """Of a machine the visibles' mean given the latents'; else draws given the mean of q(h|v).

        The draws are by annealed Langevin dynamics from noise, the same in every call.

        Raises:
            NotImplementedError: if the latents are not real.
        """
        if self._is_machine:
            return ModelLearner.reconstruct(self, v)
        posterior, v = self._gaussian(), self.check(v)
        generator = torch.Generator(v.device).manual_seed(0)
        with self.evaluating():
            mean = torch.cat([posterior.moments(part)[0] for part in v.split(_ROWS)])
            shape = tuple(v.shape[1:])
            return visible_chains(self, self.joint_energy, mean, shape, generator, given=True)

    def _gaussian(self) -> GaussianPosterior:
        if not isinstance(self.encoder, GaussianPosterior):
            raise self._no_machine()
        return self.encoder

    def _no_machine(self) -> NotImplementedError:
        name = type(self.upper.get_submodule("model")).__name__
        return NotImplementedError(
            f"this needs a free energy and Gibbs sampling, or real latents with a `GaussianPosterior`, "
            f"but `{name}` is no Boltzmann machine of `bilevel.methods.machines`; use "
            "`joint_energy(v, h)` and `posterior(v)`"
        )

    def posterior(self, v: Tensor) -> Distribution:
        """The posterior p(h|v) of a machine (its mean field with two hidden layers), else q(h|v)."""
        if self._is_machine:
            return ModelLearner.posterior(self, v)
        with self.evaluating():
            return chunked_distribution(self.encoder.distribution, self.check(v))

    def probe(self, v: Tensor) -> None:
        if self._is_machine:
            ModelLearner.probe(self, v)
        generator = torch.Generator(v.device).manual_seed(0)
        with self.evaluating():
            draws = self.encoder.draws(v, self.encoder.noise(len(v), generator, v))
            energies = self.joint_energy(draws.visible, draws.latent)
        check_pairs(energies, draws.log_prob)

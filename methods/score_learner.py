r"""`ScoreLearner`: the lower level that BiSM and VaGES share, a variational posterior $q(h|v)$.

With the unnormalised joint density $\tilde p(v, h) = e^{-E(v, h)}$ the lower loss is, at visibles that
the score-matching objective has noised,

$$ \text{kl:}\quad E_q[\log q(h|v) + E(v, h)], \qquad
   \text{fisher:}\quad \tfrac12 E_q \lVert \nabla_h \log q(h|v) + \nabla_h E(v, h) \rVert^2 . $$

The first is $KL(q \,\|\, p(h|v))$ up to a term that q does not change; the second needs latents that
are real numbers. Where h is binary, q factorises and E is linear in h, the first is closed,

$$ E_q[\log q + E] = \sum_j (p_j a_j - \log(1 + e^{a_j})) + E(v, p), \qquad p = \sigma(a(v)) . $$
"""

from abc import abstractmethod
from typing import Any, ClassVar, Literal, NamedTuple, TypeAlias, cast, final

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from bilevel.methods.config import one_of
from bilevel.methods.learner import ModelLearner
from bilevel.methods.models import LatentVariableModel
from bilevel.methods.score_objectives import check_real_visibles, square_norm
from bilevel.methods.variational import BernoulliPosterior, VariationalPosterior
from bilevel.problem import Loss

Divergence: TypeAlias = Literal["kl", "fisher"]
Expectation: TypeAlias = Literal["sampled", "exact"]


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

    The energy is a Boltzmann machine, or any module (v, h) -> (n,); of the latter there is no free
    energy and no Gibbs sampler, so what needs them refuses by name.
    """

    training_defaults: ClassVar[dict[str, Any]] = {
        **ModelLearner.training_defaults,
        "lower_steps": 5,
    }
    divergence: Divergence
    expectation: Expectation

    @abstractmethod
    def draw_lower(self, batch: Any, generator: torch.Generator, step: int) -> LowerBatch:
        """The turn's visibles with new noise."""

    @final
    def take(
        self,
        model: nn.Module,
        posterior: VariationalPosterior | None,
        divergence: Divergence,
        expectation: Expectation,
        options: dict[str, Any],
    ) -> None:
        """Take the energy and its posterior; `BernoulliPosterior.for_model` if there is none.

        Raises:
            ValueError: for a pair that does not fit, naming both.
        """
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
            _check_real_latents(model, posterior)
        if expectation == "exact":
            _check_closed(model, posterior, divergence)
        self.divergence, self.expectation = divergence, expectation
        if machine:
            self.hold(
                cast(LatentVariableModel, model),
                {"posterior": posterior},
                options if plain else None,
            )
        else:
            self.upper = nn.ModuleDict({"model": model})
            self.lower = nn.ModuleDict({"posterior": posterior})

    # ------------------------------------------------------------------ the lower level

    @final
    def joint_energy(self, v: Tensor, h: Tensor) -> Tensor:
        """E(v, h), differentiable, shape (n,)."""
        energies: Tensor = cast(nn.Module, self.upper._modules["model"])(v, h)
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
        with torch.enable_grad():
            v, h, _, weight = self.encoder.draws(batch.visible, batch.latent)
            h = h if h.requires_grad else h.requires_grad_()
            log_ratio = self.encoder.log_prob(v, h) + self.joint_energy(v, h)
            slope = torch.autograd.grad(log_ratio.sum(), h, create_graph=True)[0]
        rows = 0.5 * square_norm(slope)
        return (weight * (rows if batch.gain is None else rows * batch.gain.flatten())).sum()

    # ------------------------------------------------------------------ the trained model

    @property
    def model(self) -> LatentVariableModel:
        """The Boltzmann machine.

        Raises:
            NotImplementedError: if the energy is another module.
        """
        model = self.upper._modules["model"]
        if not isinstance(model, LatentVariableModel):
            raise NotImplementedError(
                f"this needs a free energy and Gibbs sampling, but `{type(model).__name__}` is no "
                "Boltzmann machine of `bilevel.methods.models`; use `joint_energy(v, h)` and "
                "`posterior(v)`"
            )
        return model

    @property
    def _is_machine(self) -> bool:
        return isinstance(self.upper.get_submodule("model"), LatentVariableModel)

    def posterior(self, v: Tensor) -> Distribution:
        """The posterior p(h|v) of a machine (its mean field with two hidden layers), else q(h|v)."""
        if self._is_machine:
            return ModelLearner.posterior(self, v)
        with self.evaluating():
            return self.encoder.distribution(self.check(v))

    def probe(self, v: Tensor) -> None:
        if self._is_machine:
            ModelLearner.probe(self, v)
        generator = torch.Generator(v.device).manual_seed(0)
        with self.evaluating():
            draws = self.encoder.draws(v, self.encoder.noise(len(v), generator, v))
            energies = self.joint_energy(draws.visible, draws.latent)
        if energies.shape != draws.log_prob.shape:
            raise ValueError(
                f"the energy must give one number per pair, shape (n,); got {tuple(energies.shape)} "
                f"for {len(draws.log_prob)} pairs"
            )


def _check_real_latents(model: nn.Module, posterior: VariationalPosterior) -> None:
    binary = isinstance(model, LatentVariableModel) or isinstance(posterior, BernoulliPosterior)
    if binary:
        raise ValueError(
            "divergence='fisher' differentiates in h, but the latents of "
            f"`{type(model).__name__}` with `{type(posterior).__name__}` are binary; use "
            "divergence='kl'"
        )


def _check_closed(
    model: nn.Module, posterior: VariationalPosterior, divergence: Divergence
) -> None:
    one = isinstance(model, LatentVariableModel) and len(model.latent_dims) == 1
    if not (one and isinstance(posterior, BernoulliPosterior) and divergence == "kl"):
        raise ValueError(
            "expectation='exact' needs an energy linear in h and an independent Bernoulli posterior, "
            f"which `{type(model).__name__}` with `{type(posterior).__name__}` and "
            f"divergence={divergence!r} are not; use a machine with one hidden layer and "
            "divergence='kl', or expectation='sampled'"
        )

r"""AdvIL: adversarial variational inference and learning of a Markov random field.

The negative log-likelihood of $p(v, h) = e^{-E(v, h)} / Z$ is $E_{p_d}[F(v)] + \log Z$. An encoder
$Q(h|v)$ bounds the free energy from above, a sampler $q(v, h)$ bounds $\log Z$ from below,

$$ F(v) \le E_Q[E(v, h) + \log Q(h|v)], \qquad \log Z \ge E_q[-E(v, h) - \log q(v, h)], $$

and with both bounds in place the objective is

$$ L_2(\theta, \phi, \psi) = E_{p_d Q}[E + \log Q] - E_q[E + \log q], \qquad
   \min_\theta \min_\phi \max_\psi L_2 . $$

As a bilevel problem: the upper level ($\theta$, the machine) minimises $L_2$; the lower level
($\phi$, the encoder, and $\psi$, the sampler with its auxiliary $r$) minimises

$$ G = E_{p_d Q}[E + \log Q] + E_q[E + \log q] . $$

$L_2 - NLL = E_{p_d} KL(Q \| p(h|v)) - KL(q \| p)$: neither an upper nor a lower bound. At a solution
of the lower level $\partial_{(\phi,\psi)} L_2 = 0$, so dropping the best-response term, as the paper
does, costs nothing there; before it is reached, `Unrolled` and `Implicit` see what it costs.
"""

from typing import Any, ClassVar, Literal, NamedTuple, cast, final

import torch
from torch import Tensor

from bilevel.methods.learner import ModelLearner, check_machine
from bilevel.methods.models import LatentVariableModel
from bilevel.methods.variational import (
    BernoulliPosterior,
    HierarchicalJoint,
    VariationalJoint,
    VariationalPosterior,
)
from bilevel.problem import Loss


class Batch(NamedTuple):
    """Visibles and the noise of one step; without visibles, a step of the sampler alone."""

    visible: Tensor | None
    posterior_noise: Tensor | None
    joint_noise: Tensor


@final
class AdvIL(ModelLearner):
    r"""Adversarial variational inference and learning of a Boltzmann machine.

    One upper step moves the machine; of the `lower_steps` that follow, all move the sampler and the
    first moves the encoder, too (the paper's 1 : 100 : 1).

    Args:
        model: the machine: `RBM`, `GaussianRBM`, `DBM`, `GaussianDBM`.
        posterior: the encoder Q; the published linear-logit one by default.
        joint: the sampler q with its auxiliary r; the published one by default.
        prior: "gaussian" or "bernoulli": q(z) of the default sampler.
        temperature: of the relaxed Bernoulli variables of the default encoder and sampler.

    Example:
        >>> from bilevel.methods import RBM
        >>> advil = AdvIL(RBM(4, 3))
        >>> batch = advil.draw(torch.ones(5, 4), torch.Generator().manual_seed(0))
        >>> sorted(advil.upper_loss(batch)[1])
        ['energy_data', 'energy_samples', 'log_partition_bound']

    References:
        "To Relieve Your Headache of Training an MRF, Take AdVIL" (Li, Du, Xu, Welling, Zhu, Zhang,
        ICLR 2020), https://arxiv.org/abs/1901.08400, Algorithm 1.
        Differs from the official code in:
        - the encoder's step sees the minibatch of the upper step with new noise, not a new minibatch;
        - it is taken together with the first of the sampler's steps, not after the last;
        - probabilities are not clipped: logits are used throughout;
        - the sampler's noise in the upper step does not serve a second time in the lower one.
    """

    training_defaults: ClassVar[dict[str, Any]] = {
        **ModelLearner.training_defaults,
        "num_steps": 100_000,
        "batch_size": 500,
        "upper_lr": 3e-4,
        "lower_lr": 3e-4,
        "betas": (0.5, 0.999),
        "lower_steps": 100,
        "order": "upper_first",
        "log_every": 100,
        "checkpoint_every": 1000,
    }

    def __init__(
        self,
        model: LatentVariableModel,
        posterior: VariationalPosterior | None = None,
        joint: VariationalJoint | None = None,
        *,
        prior: Literal["gaussian", "bernoulli"] = "gaussian",
        temperature: float = 0.1,
    ) -> None:
        super().__init__()
        check_machine(model, "AdvIL")
        own = posterior is not None or joint is not None
        if posterior is None:
            posterior = BernoulliPosterior.for_model(model, temperature=temperature)
        if joint is None:
            joint = HierarchicalJoint.for_model(model, prior=prior, temperature=temperature)
        options = None if own else {"prior": prior, "temperature": temperature}
        self.hold(model, {"posterior": posterior, "joint": joint}, options)

    @property
    def sampler(self) -> VariationalJoint:
        """The sampler q(v, h)."""
        return cast(VariationalJoint, self.lower._modules["joint"])

    # ------------------------------------------------------------------ the learning problem

    def draw(self, data: Tensor, generator: torch.Generator) -> Batch:
        posterior_noise = self.encoder.noise(len(data), generator, data)
        return Batch(data, posterior_noise, self.sampler.noise(len(data), generator, data))

    def draw_lower(self, batch: Batch, generator: torch.Generator, step: int) -> Batch:
        """New noise; visibles, and with them the encoder's term, in the first step only."""
        visible = batch.visible
        assert visible is not None
        joint_noise = self.sampler.noise(len(visible), generator, visible)
        if step > 0:
            return Batch(None, None, joint_noise)
        return Batch(visible, self.encoder.noise(len(visible), generator, visible), joint_noise)

    def upper_loss(self, batch: Batch) -> Loss:
        """$L_2$; its partial derivative in theta is $E_{p_d Q}[dE] - E_q[dE]$."""
        energy_data, log_posterior = self._with_data(batch)
        energy_samples, log_joint = self._generated(batch)
        loss = energy_data + log_posterior - energy_samples - log_joint
        logs = {"energy_data": energy_data, "energy_samples": energy_samples}
        return loss, {**logs, "log_partition_bound": -energy_samples - log_joint}

    def lower_loss(self, batch: Batch) -> Loss:
        """G, or the sampler's share of it for a batch without visibles."""
        energy_samples, log_joint = self._generated(batch)
        loss = energy_samples + log_joint
        if batch.visible is None:
            return loss
        energy_data, log_posterior = self._with_data(batch)
        return loss + energy_data + log_posterior

    def _with_data(self, batch: Batch) -> tuple[Tensor, Tensor]:
        r"""$E_{p_d Q}[E]$ and $E_{p_d Q}[\log Q]$."""
        assert batch.visible is not None
        assert batch.posterior_noise is not None
        draws = self.encoder.draws(batch.visible, batch.posterior_noise)
        return draws.mean(self.model(draws.visible, draws.latent)), draws.mean(draws.log_prob)

    def _generated(self, batch: Batch) -> tuple[Tensor, Tensor]:
        r"""$E_q[E]$ and $E_q[\log q]$, the latter with the auxiliary's bound on the entropy."""
        draws = self.sampler.draws(batch.joint_noise)
        return draws.mean(self.model(draws.visible, draws.latent)), draws.mean(draws.log_prob)

    # ------------------------------------------------------------------ the trained model

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """N visibles of the sampler q, by ancestral sampling."""
        with self.evaluating():
            return self.sampler.sample(n, generator)

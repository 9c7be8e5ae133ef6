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

For images, $Q(h|v)$ is a diagonal Gaussian and $q(v, h) = N(h; 0, I)\, N(v; G(h), \sigma^2 I)$. The
entropy of this q is that of its noise, whatever G is: with $\sigma$ fixed, $E_q[\log q]$ is a constant,
no auxiliary is needed, and all that G descends is $E_q[E]$.
"""

from dataclasses import replace
from typing import Any, ClassVar, Literal, NamedTuple, Self, final

import torch
from torch import Tensor, nn

from bilevel.arguments import explained
from bilevel.methods.data.sides import image_shape
from bilevel.methods.data.visibles import Visibles
from bilevel.methods.eblvm import EBLVM
from bilevel.methods.machines import as_machine
from bilevel.methods.models.evaluating import Statistics
from bilevel.methods.models.machine import MachineModel
from bilevel.methods.models.undecoupled import Undecoupled
from bilevel.methods.networks.build import build
from bilevel.methods.networks.convolutional import Generator, JointEnergy, Posterior, channels_of
from bilevel.methods.training.settings import MACHINE_DEFAULTS
from bilevel.methods.variational import (
    BernoulliPosterior,
    Draws,
    GaussianJoint,
    GaussianPosterior,
    HierarchicalJoint,
    VariationalJoint,
    VariationalPosterior,
)
from bilevel.problem import Loss
from bilevel.refusals import modules_or_none, one_of


@final
class Batch(NamedTuple):
    """Visibles and the noise of one step; without visibles, a step of the sampler alone."""

    visible: Tensor | None
    posterior_noise: Tensor | None
    joint_noise: Tensor


@final
class AdvIL(EBLVM):
    r"""Adversarial variational inference and learning of a Boltzmann machine or another energy.

    One upper step moves the energy; of the `lower_steps` that follow, all move the sampler and the
    first moves the encoder, too. The default settings are for a small machine and a minute or two. The
    paper's are 1 : 100 : 1 steps, 100,000 times, batches of 500 and rates of 3e-4: `fit(...,
    num_steps=100_000, batch_size=500, upper_lr=3e-4, lower_lr=3e-4, lower_steps=100)`.

    Args:
        model: a machine (`RBM`, `GaussianRBM`, `DBM`, `GaussianDBM`), or any module (v, h) -> (n,).
        posterior: the encoder Q; for a machine the published linear-logit one by default.
        joint: the sampler q with its auxiliary r; for a machine the published one by default.
        prior: "gaussian" or "bernoulli": q(z) of the default sampler.
        temperature: of the relaxed Bernoulli variables of the default encoder and sampler.

    Raises:
        ValueError: for an energy that is no machine without an encoder and a sampler.

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
        - the sampler's noise in the upper step does not serve a second time in the lower one;
        - `for_images` is not in it: the BiDVL paper (https://arxiv.org/abs/2203.14702, Sec. 4) calls
          this model, its own without the decoupling and with KL as the divergence, approximately AdvIL,
          and unstable on CIFAR-10.
    """

    training_defaults: ClassVar[dict[str, Any]] = {
        **MACHINE_DEFAULTS,
        "num_steps": 3000,
        "batch_size": 100,
        "upper_lr": 5e-3,
        "lower_lr": 5e-3,
        "betas": (0.5, 0.999),
        "lower_steps": 5,
        "order": "upper_first",
        "log_every": 100,
        "checkpoint_every": 1000,
    }
    latent_model: MachineModel | Undecoupled

    @explained
    def __init__(
        self,
        model: nn.Module,
        posterior: VariationalPosterior | None = None,
        joint: VariationalJoint | None = None,
        *,
        prior: Literal["gaussian", "bernoulli"] = "gaussian",
        temperature: float = 0.1,
    ) -> None:
        super().__init__()
        modules_or_none(posterior=posterior, joint=joint)
        machine, plain = as_machine(model), posterior is None and joint is None
        if machine is not None:
            if posterior is None:
                posterior = BernoulliPosterior.for_model(machine, temperature=temperature)
            if joint is None:
                joint = HierarchicalJoint.for_model(machine, prior=prior, temperature=temperature)
            self.latent_model = MachineModel.of(machine, posterior, joint)
            options = {"prior": prior, "temperature": temperature}
            self.recipe = {"model": machine.recipe, **options} if plain else None
        elif posterior is not None and joint is not None:
            self.latent_model = Undecoupled(
                Visibles(), network=model, encoder=posterior, sampler=joint, at_once=500
            )
        else:
            raise ValueError(
                f"`AdvIL` has no default encoder and sampler for a `{type(model).__name__}`; give "
                "both, such as `GaussianPosterior(network, latent_dim)` and `GaussianJoint(...)`, "
                "or a Boltzmann machine (`RBM`, `GaussianRBM`, `DBM`, `GaussianDBM`)"
            )
        self.upper = nn.ModuleDict({"model": model})
        self.lower = nn.ModuleDict({"posterior": posterior, "joint": joint})

    @classmethod
    def for_images(
        cls,
        shape: tuple[int, int, int],
        *,
        latent_dim: int = 100,
        width: float = 64,
        sigma: float = 0.01,
        proper: bool = False,
        seed: int = 0,
        statistics: Statistics = "running",
    ) -> Self:
        r"""AdvIL of an undecoupled energy E(v, h), with BiDVL's networks: the paper's unstable rival.

        As published nothing keeps it in place: the energy grows at most linearly in h, and
        $KL(Q \,\Vert\, p(h|v))$ rewards a wide Q, so that its variance runs away and `energy_data`
        goes to 0. `proper` cures that, and no more.

        Args:
            shape: (channels, side, side) of images in [-1, 1].
            latent_dim: dimension of the latent; 100 in the BiDVL paper.
            width: first channels of the energy, as in `BiDVL.for_images`.
            sigma: standard deviation of the sampler's pixels; 0.01 is about one grey level of 256.
            proper: add $\frac12 \lVert h \rVert^2$ to the energy, with which p(h|v) is proper; ours.
            seed: seed of the initial weights; torch's global generator is left as it was.
            statistics: batch-norm statistics of samples and reconstructions.

        Raises:
            ValueError: if the shape cannot be halved down to 4-8 pixels, or `sigma` is not positive.
        """
        shape = image_shape(shape)
        one_of("statistics", statistics, ("running", "batch"))
        narrow = channels_of(width, latent_dim, 3 / 4)

        def networks() -> nn.ModuleList:
            energy = JointEnergy(shape, latent_dim, channels_of(width))
            encoder = Posterior(shape, latent_dim, narrow)
            return nn.ModuleList([energy, encoder, Generator(shape, latent_dim, narrow)])

        energy, encoder, generator = build(networks, seed)
        model = cls(
            _Proper(energy) if proper else energy,
            GaussianPosterior(encoder, latent_dim),
            GaussianJoint(generator, latent_dim, shape, sigma),
        )
        model.latent_model = replace(
            model.latent_model, visibles=Visibles(shape, (-1.0, 1.0)), latent_dim=latent_dim
        )
        model.statistics = statistics
        sizes = {"shape": shape, "latent_dim": latent_dim, "width": width, "sigma": sigma}
        model.recipe = {**sizes, "proper": proper, "seed": seed, "statistics": statistics}
        return model

    @property
    def sampler(self) -> VariationalJoint:
        """The sampler q(v, h)."""
        assert self.latent_model.sampler is not None
        return self.latent_model.sampler

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
        return draws.mean(self._energies(draws)), draws.mean(draws.log_prob)

    def _generated(self, batch: Batch) -> tuple[Tensor, Tensor]:
        r"""$E_q[E]$ and $E_q[\log q]$, the latter with the auxiliary's bound on the entropy."""
        draws = self.sampler.draws(batch.joint_noise)
        return draws.mean(self._energies(draws)), draws.mean(draws.log_prob)

    def _energies(self, draws: Draws) -> Tensor:
        return self.joint_energy(draws.visible, draws.latent)


@final
class _Proper(nn.Module):
    r"""An energy plus $\frac12 \lVert h \rVert^2$."""

    def __init__(self, energy: nn.Module) -> None:
        super().__init__()
        self.energy = energy

    def forward(self, v: Tensor, h: Tensor) -> Tensor:
        energies: Tensor = self.energy(v, h) + 0.5 * h.square().sum(1)
        return energies

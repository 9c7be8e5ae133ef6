r"""BiDVL in its general form: an undecoupled EBLVM with a variational posterior and a variational joint.

For a joint energy $E(v, h)$, $p_\psi(v, h) \propto e^{-E(v,h)}$, and variational $q_1(h|v)$,
$p_2(v, h)$ with parameters $\omega$,

$$ \text{upper (5):}\quad J_{UL} = KL(q\,q_1 \,\|\, p_\psi) - KL(p_2 \,\|\, p_\psi), \qquad
   \text{lower (4):}\quad J_{LL} = D(q\,q_1, q\,p_\psi(h|v)) + D(p_2, p_\psi) . $$

log Z cancels between the two divergences of the upper level, so as losses

$$ F = E_{q\,q_1}[E + \log q_1] - E_{p_2}[E + \log p_2], \qquad
   G_{KL} = E_{q\,q_1}[\log q_1 + E] + E_{p_2}[\log p_2 + E], $$

both up to terms that depend on neither level or on the upper one alone (the entropy of q, log Z). The
partial derivative of F in psi is (3a), $E_{q q_1}[\partial E] - E_{p_2}[\partial E]$; the response
term of (7) is what `Alternating` drops and `Implicit` and `Unrolled` keep.

The symmetric KL adds the reverse directions, which need samples of the model itself:

$$ G_{sym} = G_{KL} - E_{q\,p_\psi(h|v)}[\log q_1(h|v)] - E_{p_\psi}[\log p_2(v, h)] . $$

The paper does not say how they are estimated; ours are weighted samples $(v_i, h_i)$ with
$w_i \propto e^{-E(v_i, h_i)} / \rho_i$, drawn into the batch together with $\rho_i$,

$$ E_{p_\psi}[\log p_2] \approx \sum_i w_i \log p_2(v_i, h_i), $$

a differentiable function of both levels. "importance": draws of $p_2$, $\rho = p_2$ (self-normalised
importance weights). "gibbs": short Gibbs chains of the model started from draws of $p_2$, taken for
exact samples, $\rho = e^{-E}$ at the time of drawing: the weights are then equal, and their derivative
in psi is the score-function estimate.
"""

from typing import (
    Any,
    ClassVar,
    Literal,
    NamedTuple,
    Protocol,
    Self,
    cast,
    final,
    runtime_checkable,
)

import torch
from torch import Tensor, nn

from bilevel.arguments import explained
from bilevel.methods.data.visibles import Visibles
from bilevel.methods.eblvm import EBLVM
from bilevel.methods.machines import MAX_UNITS, BoltzmannMachine, as_machine
from bilevel.methods.models.undecoupled import Undecoupled
from bilevel.methods.variational import (
    BernoulliPosterior,
    Draws,
    HierarchicalJoint,
    VariationalJoint,
    VariationalPosterior,
    enumerated,
)
from bilevel.problem import Loss
from bilevel.refusals import modules_or_none, one_of, positive

BOUND_DRAWS = 16
"""Draws of the bound that `energy` is where there is no free energy."""


@final
class Proposals(NamedTuple):
    """What the reverse divergences of a machine are estimated from.

    Attributes:
        visible: shape (n, visible_dim).
        latent: shape (n, latents).
        log_density: log rho, the density they stand for, up to a constant, shape (n,).
        code_noise: noise of the bound on log p2.
        given_data: latents drawn from p(h|v) for the visibles of the batch, if there are two layers.
    """

    visible: Tensor
    latent: Tensor
    log_density: Tensor
    code_noise: Tensor
    given_data: Tensor | None


@final
class Batch(NamedTuple):
    """Visibles and the noise of one step."""

    visible: Tensor
    posterior_noise: Tensor
    joint_noise: Tensor
    proposals: Proposals | None = None


@runtime_checkable
class Enumerable(Protocol):
    """An energy whose distribution can be written down."""

    def log_joint(self) -> Tensor:
        """Log p(v, h) of all states, shape (V, H)."""
        ...


@runtime_checkable
class Tractable(Protocol):
    """An energy with a free energy."""

    def free_energy(self, v: Tensor) -> Tensor:
        """F(v), shape (n,)."""
        ...


@final
class GeneralBiDVL(EBLVM):
    r"""The undecoupled BiDVL problem (Eqs. 4-7).

    Args:
        energy: module (v, h) -> (n,), the joint energy. With `free_energy(v)` the marginal energy is
            exact; with `log_joint()` the symmetric divergence is.
        posterior: q1(h|v); for a Boltzmann machine AdvIL's encoder by default.
        joint: p2(v, h); for a Boltzmann machine AdvIL's sampler by default.
        divergence: "kl" for the directions KL(q1||p) and KL(p2||p), which need no sample of the
            model; "symmetric" adds the reverse ones.
        reverse: how those are estimated for a Boltzmann machine: "gibbs" or "importance". An energy
            with `log_joint()` needs no estimate.
        sweeps: Gibbs sweeps of "gibbs".
        prior: of the default sampler's own latent.

    Raises:
        ValueError: for an unknown divergence or estimator, an energy that is no machine without
            posterior and joint, or "symmetric" with an energy that is neither a machine nor enumerable,
            or a machine whose p2 has other latents than bits.

    Example:
        >>> from bilevel.methods.variational import TabularEnergy, TabularJoint, TabularPosterior
        >>> zeros = torch.zeros(4, 3)
        >>> model = GeneralBiDVL(TabularEnergy(zeros), TabularPosterior(zeros), TabularJoint(zeros))
        >>> model.upper_loss(model.draw(torch.tensor([0, 1]), torch.Generator()))[0].item()
        1.386...

    References:
        Bi-level Doubly Variational Learning for Energy-based Latent Variable Models (Kan et al., CVPR
        2022), https://arxiv.org/abs/2203.14702, Sec. 4.
        Differs from the paper in:
        - the reverse directions of the symmetric KL need samples of p_psi, and the paper does not say
          how its ablation got them: the estimators above are ours;
        - with "kl" the levels form a saddle point and the response term vanishes at any exact lower
          solution (disjoint parameters); with "symmetric" it does not.
    """

    latent_model: Undecoupled
    training_defaults: ClassVar[dict[str, Any]] = {
        "upper_lr": 5e-3,
        "lower_lr": 5e-3,
        "betas": (0.5, 0.999),
        "lower_weight_decay": 0.0,
        "decay": 1.0,
        "lower_steps": 5,
        "order": "lower_first",  # Algorithm 1
    }

    @explained
    def __init__(
        self,
        energy: nn.Module,
        posterior: VariationalPosterior | None = None,
        joint: VariationalJoint | None = None,
        *,
        divergence: Literal["kl", "symmetric"] = "kl",
        reverse: Literal["gibbs", "importance"] = "gibbs",
        sweeps: int = 5,
        prior: Literal["gaussian", "bernoulli"] = "gaussian",
    ) -> None:
        super().__init__()
        modules_or_none(posterior=posterior, joint=joint)
        one_of("divergence", divergence, ("kl", "symmetric"))
        one_of("reverse", reverse, ("gibbs", "importance"))
        positive("sweeps", sweeps)
        machine, plain = as_machine(energy), posterior is None and joint is None
        if machine is not None:
            posterior = BernoulliPosterior.for_model(machine) if posterior is None else posterior
            joint = HierarchicalJoint.for_model(machine, prior=prior) if joint is None else joint
        if posterior is None or joint is None:
            raise ValueError(
                f"`GeneralBiDVL` has no default posterior and joint for a `{type(energy).__name__}`; "
                "give both, or a Boltzmann machine (`RBM`, `GaussianRBM`, `DBM`, `GaussianDBM`)"
            )
        self.divergence, self.reverse, self.sweeps = divergence, reverse, sweeps
        log_joint = _log_joint(energy)
        self._sampled = divergence == "symmetric" and log_joint is None
        if self._sampled and (machine is None or not joint.binary):
            raise ValueError(
                "divergence='symmetric' needs expectations under the model itself: an energy with "
                "`log_joint()`, or a Boltzmann machine with a `HierarchicalJoint`; got "
                f"`{type(energy).__name__}` with `{type(joint).__name__}`; use divergence='kl'"
            )
        table = Visibles(table=None if log_joint is None else len(log_joint))
        self.upper = nn.ModuleDict({"energy": energy})
        self.lower = nn.ModuleDict({"posterior": posterior, "joint": joint})
        self.latent_model = Undecoupled(
            table if machine is None else machine.visibles,
            machine=machine,
            network=energy,
            encoder=posterior,
            sampler=joint,
            free_energy=_free_energy(energy),
            draws=BOUND_DRAWS,
        )
        if self._sampled and self._is_deep:
            self.stops_lower_gradient = (
                "the posterior's reverse divergence is estimated at samples of p(h|v) whose "
                "dependence on the energy is not seen; use divergence='kl'"
            )
        if machine is not None and plain:
            options = {
                "divergence": divergence,
                "reverse": reverse,
                "sweeps": sweeps,
                "prior": prior,
            }
            self.recipe = {"model": machine.recipe, **options}

    @classmethod
    def for_model(cls, model: BoltzmannMachine, **options: Any) -> Self:
        """BiDVL of a Boltzmann machine with AdvIL's variational families.

        Args:
            model: the machine.
            **options: as for the constructor.
        """
        return cls(model, **options)

    @property
    def _is_deep(self) -> bool:
        """Whether the energy is a machine with two hidden layers."""
        machine = self.latent_model.machine
        return machine is not None and len(machine.latent_dims) > 1

    # ------------------------------------------------------------------ the learning problem

    def draw(self, data: Any, generator: torch.Generator) -> Batch:
        return self._noised(data, generator, self._propose(data, generator))

    def draw_lower(self, batch: Batch, generator: torch.Generator, step: int) -> Batch:
        """New noise in every lower step; the samples for the reverse divergences serve them all.

        They are samples of the machine, which stands still meanwhile.
        """
        return self._noised(batch.visible, generator, batch.proposals)

    def _noised(self, v: Tensor, generator: torch.Generator, proposals: Proposals | None) -> Batch:
        n, joint = len(v), self.latent_model.sampler
        if proposals is not None:
            proposals = proposals._replace(code_noise=joint.code_noise(n, generator, v))
        posterior_noise = self.encoder.noise(n, generator, v)
        return Batch(v, posterior_noise, joint.noise(n, generator, v), proposals)

    @torch.no_grad()
    def _propose(self, v: Tensor, generator: torch.Generator) -> Proposals | None:
        if not self._sampled:
            return None
        visible, latent, log_density, _ = self.latent_model.sampler.exact_draws(len(v), generator)
        if self.reverse == "gibbs":
            first = latent[:, : self.model.latent_dims[0]]
            visible, latent = self.model.gibbs(first, generator, steps=self.sweeps)
            log_density = -self.model(visible, latent)
        deep = self._is_deep
        given_data = self.model.latent_gibbs(v, generator, self.sweeps) if deep else None
        return Proposals(visible, latent, log_density, visible.new_empty(0), given_data)

    def shard(self, batch: Batch, rank: int, ranks: int) -> Batch:
        """The rank's rows, and all proposals, over which the weights sum to one."""
        rows, proposals = batch._replace(proposals=None), batch.proposals
        shared: Batch = super().shard(rows, rank, ranks)
        if proposals is None:
            return shared
        given = proposals.given_data
        own = None if given is None else given.chunk(ranks)[rank]
        return shared._replace(proposals=proposals._replace(given_data=own))

    def upper_loss(self, batch: Batch) -> Loss:
        """Eq. 6."""
        with_data = self.encoder.draws(batch.visible, batch.posterior_noise)
        generated = self.latent_model.sampler.draws(batch.joint_noise)
        energy_data = self._mean_energy(with_data)
        energy_samples = self._mean_energy(generated)
        loss = energy_data + with_data.mean(with_data.log_prob)
        loss = loss - energy_samples - generated.mean(generated.log_prob)
        return loss, {"energy_data": energy_data, "energy_samples": energy_samples}

    def lower_loss(self, batch: Batch) -> Loss:
        """Eq. 4 with D = KL or the symmetric KL."""
        with_data = self.encoder.draws(batch.visible, batch.posterior_noise)
        generated = self.latent_model.sampler.draws(batch.joint_noise)
        posterior_gap = with_data.mean(with_data.log_prob) + self._mean_energy(with_data)
        joint_gap = generated.mean(generated.log_prob) + self._mean_energy(generated)
        loss = posterior_gap + joint_gap
        if self.divergence == "symmetric":
            loss = loss + self._reverse_divergences(batch)
        return loss, {"posterior_gap": posterior_gap, "joint_gap": joint_gap}

    def _reverse_divergences(self, batch: Batch) -> Tensor:
        """KL(q p(h|v) || q q1) + KL(p || p2), up to terms of the upper level alone."""
        if batch.proposals is None:
            return self._exact_reverse(batch.visible)
        visible, latent, log_density, code_noise, given_data = batch.proposals
        weight = (-self.joint_energy(visible, latent) - log_density).softmax(0)
        joint = -(weight * self.latent_model.sampler.bound(visible, latent, code_noise)).sum()
        if given_data is None:  # log q1 is linear in h, so its expectation is log q1 at the mean
            given_data = self.model.posterior_logits(batch.visible).sigmoid()
        return joint - self.encoder.log_prob(batch.visible, given_data).mean()

    def _exact_reverse(self, v: Tensor) -> Tensor:
        """KL(q p(h|v) || q q1) + KL(p || p2) of an energy that can be enumerated."""
        log_joint = cast(Enumerable, self.latent_model.network).log_joint()
        model = enumerated(log_joint)
        kl_joint = model.mean(
            model.log_prob - self.latent_model.sampler.log_prob(model.visible, model.latent)
        )
        log_conditional = log_joint.log_softmax(dim=1)[v]
        rows = v.repeat_interleave(log_joint.shape[1])
        states = torch.arange(log_joint.shape[1], device=v.device).repeat(len(v))
        gap = log_conditional.flatten() - self.encoder.log_prob(rows, states)
        return kl_joint + (log_conditional.exp().flatten() * gap).sum() / len(v)

    def _mean_energy(self, draws: Draws) -> Tensor:
        return draws.mean(self.joint_energy(draws.visible, draws.latent))


def _log_joint(energy: nn.Module) -> Tensor | None:
    """Log p(v, h) of all states, of an energy that can be enumerated."""
    if not isinstance(energy, Enumerable):
        return None
    try:
        with torch.no_grad():
            return energy.log_joint()
    except ValueError:  # it could, if it were a table
        return None


def _free_energy(energy: nn.Module) -> Any:
    """F of an energy that has one, where it is tractable."""
    machine = as_machine(energy)
    deep = machine is not None and len(machine.latent_dims) > 1
    if machine is not None and deep and machine.latent_dims[0] > MAX_UNITS:
        return None
    return energy.free_energy if isinstance(energy, Tractable) else None

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
from torch.distributions import Bernoulli, Distribution, Independent

from bilevel.linear.base import positive
from bilevel.methods.data.visibles import row_numbers
from bilevel.methods.eblvm import EBLVM, chunked, chunked_distribution
from bilevel.methods.learner import check_pairs
from bilevel.methods.machines import MAX_UNITS, LatentVariableModel, from_recipe
from bilevel.methods.machines.base import check_dim
from bilevel.methods.training.settings import one_of
from bilevel.methods.variational import (
    BernoulliPosterior,
    Draws,
    HierarchicalJoint,
    VariationalJoint,
    VariationalPosterior,
    enumerated,
)
from bilevel.problem import Loss

_BOUND_DRAWS = 16
_ROWS = 500  # visibles whose bound is evaluated at a time


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


class Batch(NamedTuple):
    """Visibles and the noise of one step."""

    visible: Tensor
    posterior_noise: Tensor
    joint_noise: Tensor
    proposals: Proposals | None = None


@runtime_checkable
class Enumerable(Protocol):
    """An energy whose distribution can be written down: `log_joint() -> (V, H)`."""

    def log_joint(self) -> Tensor:
        """Log p(v, h) of all states."""
        ...


@final
class GeneralBiDVL(EBLVM):
    r"""The undecoupled BiDVL problem (Eqs. 4-7).

    Args:
        energy: module (v, h) -> (n,), the joint energy. With `free_energy(v)` the marginal energy is
            exact; with `log_joint()` the symmetric divergence is.
        posterior: q1(h|v).
        joint: p2(v, h).
        divergence: "kl" for the directions KL(q1||p) and KL(p2||p), which need no sample of the
            model; "symmetric" adds the reverse ones.
        reverse: how those are estimated for a Boltzmann machine: "gibbs" or "importance". An energy
            with `log_joint()` needs no estimate.
        sweeps: Gibbs sweeps of "gibbs".

    Raises:
        ValueError: for an unknown divergence or estimator, or "symmetric" with an energy that is neither
            a machine nor enumerable, or a machine whose p2 is not a `HierarchicalJoint`.

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

    training_defaults: ClassVar[dict[str, Any]] = {
        "upper_lr": 5e-3,
        "lower_lr": 5e-3,
        "betas": (0.5, 0.999),
        "lower_weight_decay": 0.0,
        "decay": 1.0,
        "lower_steps": 5,
        "order": "lower_first",  # Algorithm 1
    }

    def __init__(
        self,
        energy: nn.Module,
        posterior: VariationalPosterior,
        joint: VariationalJoint,
        *,
        divergence: Literal["kl", "symmetric"] = "kl",
        reverse: Literal["gibbs", "importance"] = "gibbs",
        sweeps: int = 5,
    ) -> None:
        super().__init__()
        one_of("divergence", divergence, ("kl", "symmetric"))
        one_of("reverse", reverse, ("gibbs", "importance"))
        positive("sweeps", sweeps)
        machine = energy if isinstance(energy, LatentVariableModel) else None
        self.upper = nn.ModuleDict({"energy": energy})
        self.lower = nn.ModuleDict({"posterior": posterior, "joint": joint})
        self.divergence = divergence
        self.reverse = reverse
        self.sweeps = sweeps
        self._sampled = divergence == "symmetric" and not isinstance(energy, Enumerable)
        if self._sampled and (machine is None or not isinstance(joint, HierarchicalJoint)):
            raise ValueError(
                "divergence='symmetric' needs expectations under the model itself: an energy with "
                "`log_joint()`, or a Boltzmann machine with a `HierarchicalJoint`; got "
                f"`{type(energy).__name__}` with `{type(joint).__name__}`; use divergence='kl'"
            )
        if machine is not None:
            self.visible_shape = (machine.visible_dim,)
            self.visible_range, self.binary = machine.visible_range, machine.binary
            if self._sampled and self._is_deep:
                self.stops_lower_gradient = (
                    "the posterior's reverse divergence is estimated at samples of p(h|v) whose "
                    "dependence on the energy is not seen; use divergence='kl'"
                )

    @classmethod
    def for_model(
        cls,
        model: LatentVariableModel,
        *,
        divergence: Literal["kl", "symmetric"] = "kl",
        reverse: Literal["gibbs", "importance"] = "gibbs",
        sweeps: int = 5,
        prior: Literal["gaussian", "bernoulli"] = "gaussian",
    ) -> Self:
        """BiDVL of a Boltzmann machine with AdvIL's variational families.

        Args:
            model: the machine.
            divergence: as for the constructor.
            reverse: likewise.
            sweeps: likewise.
            prior: of the sampler's own latent.
        """
        made = cls(
            model,
            BernoulliPosterior.for_model(model),
            HierarchicalJoint.for_model(model, prior=prior),
            divergence=divergence,
            reverse=reverse,
            sweeps=sweeps,
        )
        options = {"divergence": divergence, "reverse": reverse, "sweeps": sweeps, "prior": prior}
        made.recipe = {"model": model.recipe, **options}
        return made

    @property
    def _posterior(self) -> VariationalPosterior:
        return cast(VariationalPosterior, self.lower.get_submodule("posterior"))

    @property
    def _joint(self) -> VariationalJoint:
        return cast(VariationalJoint, self.lower.get_submodule("joint"))

    @property
    def _is_deep(self) -> bool:
        """Whether the energy is a machine with two hidden layers."""
        energy = self.upper.get_submodule("energy")
        return isinstance(energy, LatentVariableModel) and len(energy.latent_dims) > 1

    @property
    def model(self) -> LatentVariableModel:
        """The Boltzmann machine, if the energy is one."""
        energy = self.upper.get_submodule("energy")
        if not isinstance(energy, LatentVariableModel):
            raise NotImplementedError(f"`{type(energy).__name__}` is no Boltzmann machine")
        return energy

    def joint_energy(self, v: Tensor, h: Tensor) -> Tensor:
        """E(v, h), differentiable, shape (n,)."""
        energies: Tensor = self.upper.get_submodule("energy")(v, h)
        return energies

    # ------------------------------------------------------------------ the learning problem

    def draw(self, data: Any, generator: torch.Generator) -> Batch:
        return self._noised(data, generator, self._propose(data, generator))

    def draw_lower(self, batch: Batch, generator: torch.Generator, step: int) -> Batch:
        """New noise in every lower step; the samples for the reverse divergences serve them all.

        They are samples of the machine, which stands still meanwhile.
        """
        return self._noised(batch.visible, generator, batch.proposals)

    def _noised(self, v: Tensor, generator: torch.Generator, proposals: Proposals | None) -> Batch:
        n = len(v)
        if proposals is not None:
            proposals = proposals._replace(code_noise=self._joint.code_noise(n, generator, v))
        posterior_noise = self._posterior.noise(n, generator, v)
        return Batch(v, posterior_noise, self._joint.noise(n, generator, v), proposals)

    @torch.no_grad()
    def _propose(self, v: Tensor, generator: torch.Generator) -> Proposals | None:
        if not self._sampled:
            return None
        joint = cast(HierarchicalJoint, self._joint)
        visible, latent, code = joint.hard(len(v), generator)
        if self.reverse == "importance":
            log_density = joint.log_weight(visible, latent, code)
        else:
            first = latent[:, : self.model.latent_dims[0]]
            visible, latent = self.model.gibbs(first, generator, steps=self.sweeps)
            log_density = -self.model(visible, latent)
        deep = self._is_deep
        given_data = self.model.latent_gibbs(v, generator, self.sweeps) if deep else None
        return Proposals(visible, latent, log_density, visible.new_empty(0), given_data)

    def upper_loss(self, batch: Batch) -> Loss:
        """Eq. 6."""
        with_data = self._posterior.draws(batch.visible, batch.posterior_noise)
        generated = self._joint.draws(batch.joint_noise)
        energy_data = self._mean_energy(with_data)
        energy_samples = self._mean_energy(generated)
        loss = energy_data + with_data.mean(with_data.log_prob)
        loss = loss - energy_samples - generated.mean(generated.log_prob)
        return loss, {"energy_data": energy_data, "energy_samples": energy_samples}

    def lower_loss(self, batch: Batch) -> Loss:
        """Eq. 4 with D = KL or the symmetric KL."""
        with_data = self._posterior.draws(batch.visible, batch.posterior_noise)
        generated = self._joint.draws(batch.joint_noise)
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
        joint = -(weight * self._joint.bound(visible, latent, code_noise)).sum()
        if given_data is None:  # log q1 is linear in h, so its expectation is log q1 at the mean
            given_data = self.model.posterior_logits(batch.visible).sigmoid()
        return joint - self._posterior.log_prob(batch.visible, given_data).mean()

    def _exact_reverse(self, v: Tensor) -> Tensor:
        """KL(q p(h|v) || q q1) + KL(p || p2) of an energy that can be enumerated."""
        log_joint = cast(Enumerable, self.upper.get_submodule("energy")).log_joint()
        model = enumerated(log_joint)
        kl_joint = model.mean(model.log_prob - self._joint.log_prob(model.visible, model.latent))
        log_conditional = log_joint.log_softmax(dim=1)[v]
        rows = v.repeat_interleave(log_joint.shape[1])
        states = torch.arange(log_joint.shape[1], device=v.device).repeat(len(v))
        gap = log_conditional.flatten() - self._posterior.log_prob(rows, states)
        return kl_joint + (log_conditional.exp().flatten() * gap).sum() / len(v)

    def _mean_energy(self, draws: Draws) -> Tensor:
        return draws.mean(self.joint_energy(draws.visible, draws.latent))

    # ------------------------------------------------------------------ the trained model

    def energy(self, v: Tensor) -> Tensor:
        """The free energy where the energy has one, else its variational bound E_q1[E + log q1].

        Bound: at the mean of 16 draws from q1, never below the free energy on average.
        """
        energy, v = self.upper.get_submodule("energy"), self._visibles(v)
        intractable = self._is_deep and self.model.latent_dims[0] > MAX_UNITS
        if hasattr(energy, "free_energy") and not intractable:
            with self.evaluating():
                return chunked(cast(Any, energy).free_energy, v)
        generator = torch.Generator(v.device).manual_seed(0)
        draws = [self._posterior.noise(len(v), generator, v) for _ in range(_BOUND_DRAWS)]

        def bound(rows: Tensor, noise: Tensor) -> Tensor:
            terms = [self._posterior.draws(rows, z) for z in noise.unbind(1)]
            costs = [self.joint_energy(d.visible, d.latent) + d.log_prob for d in terms]
            return torch.stack(costs).mean(0)

        with self.evaluating():
            pieces = zip(v.split(_ROWS), torch.stack(draws, 1).split(_ROWS), strict=True)
            return torch.cat([bound(*piece) for piece in pieces])

    def _visibles(self, v: Any) -> Tensor:
        """Visibles, checked; of an energy that is a table they are numbers of its rows."""
        energy = self.upper.get_submodule("energy")
        if not isinstance(energy, Enumerable):
            return self.check(v)
        return row_numbers(v, len(energy.log_joint()), type(energy).__name__).to(self.device)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """N visibles of the variational joint p2."""
        check_dim("n", n)
        with self.evaluating():
            return self._joint.sample(n, generator)

    def posterior(self, v: Tensor) -> Distribution:
        """q1(h|v); of a machine with two hidden layers the mean field of p(h|v)."""
        with self.evaluating():
            v = self._visibles(v)
            if self._is_deep:
                return Independent(Bernoulli(probs=chunked(self.model.mean_field, v)), 1)
            return chunked_distribution(self._posterior.distribution, v)

    def reconstruct(self, v: Tensor) -> Tensor:
        """The visibles' mean under the joint at the posterior mean.

        Raises:
            NotImplementedError: if the joint has no generator.
        """
        mean = self.posterior(v).mean
        with self.evaluating():
            if isinstance(self._joint, HierarchicalJoint):
                return chunked(self._joint.visible_mean, mean)
            generator = getattr(self._joint, "generator", None)
            if generator is None:
                raise NotImplementedError(
                    f"`{type(self._joint).__name__}` has no generator to reconstruct with; use a "
                    "`GaussianJoint`, or draw from `posterior(v)`"
                )
            return chunked(generator, mean)

    def probe(self, v: Tensor) -> None:
        batch = self.draw(v, torch.Generator(v.device).manual_seed(0))
        with self.evaluating():
            draws = self._posterior.draws(v, batch.posterior_noise)
            energies = self.joint_energy(draws.visible, draws.latent)
        check_pairs(energies, draws.log_prob)

    @classmethod
    def from_recipe(cls, recipe: dict[str, Any]) -> Self:
        options = {name: value for name, value in recipe.items() if name != "model"}
        return cls.for_model(from_recipe(recipe["model"]), **options)

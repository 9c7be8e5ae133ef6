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
"""

from typing import Any, Literal, NamedTuple, Protocol, Self, cast, final, runtime_checkable

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from bilevel.methods.config import Training, one_of
from bilevel.methods.eblvm import EBLVM
from bilevel.methods.variational import (
    Draws,
    VariationalJoint,
    VariationalPosterior,
    enumerated,
)
from bilevel.optimizers import Optimizers
from bilevel.problem import Loss


class Batch(NamedTuple):
    """Visibles and the noise of one step."""

    visible: Tensor
    posterior_noise: Tensor
    joint_noise: Tensor


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

    Raises:
        ValueError: for an unknown divergence, or "symmetric" with an energy that cannot be enumerated.

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
          how its ablation got them; here they are exact, for enumerable models only;
        - with "kl" the levels form a saddle point and the response term vanishes at any exact lower
          solution (disjoint parameters); with "symmetric" it does not.
    """

    def __init__(
        self,
        energy: nn.Module,
        posterior: VariationalPosterior,
        joint: VariationalJoint,
        *,
        divergence: Literal["kl", "symmetric"] = "kl",
    ) -> None:
        super().__init__()
        one_of("divergence", divergence, ("kl", "symmetric"))
        if divergence == "symmetric" and not isinstance(energy, Enumerable):
            raise ValueError(
                "divergence='symmetric' needs expectations under the model itself, so an energy with "
                f"`log_joint()`, which `{type(energy).__name__}` does not have; use divergence='kl'"
            )
        self.upper = nn.ModuleDict({"energy": energy})
        self.lower = nn.ModuleDict({"posterior": posterior, "joint": joint})
        self.divergence = divergence

    @property
    def _posterior(self) -> VariationalPosterior:
        return cast(VariationalPosterior, self.lower.get_submodule("posterior"))

    @property
    def _joint(self) -> VariationalJoint:
        return cast(VariationalJoint, self.lower.get_submodule("joint"))

    def joint_energy(self, v: Tensor, h: Tensor) -> Tensor:
        """E(v, h), differentiable, shape (n,)."""
        energies: Tensor = self.upper.get_submodule("energy")(v, h)
        return energies

    # ------------------------------------------------------------------ the learning problem

    def draw(self, data: Any, generator: torch.Generator) -> Batch:
        n = len(data)
        return Batch(
            data,
            self._posterior.noise(n, generator, data),
            self._joint.noise(n, generator, data),
        )

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
            loss = loss + self._reverse_divergences(batch.visible)
        return loss, {"posterior_gap": posterior_gap, "joint_gap": joint_gap}

    def _reverse_divergences(self, v: Tensor) -> Tensor:
        """KL(q p(h|v) || q q1) + KL(p || p2), exact."""
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

    def optimizers(self, training: Training) -> tuple[Optimizers, Optimizers]:
        upper = torch.optim.Adam(
            self.upper.parameters(), lr=training.upper_lr, betas=training.betas
        )
        lower = torch.optim.Adam(
            self.lower.parameters(),
            lr=training.lower_lr,
            betas=training.betas,
            weight_decay=training.lower_weight_decay,
        )
        return upper, lower

    # ------------------------------------------------------------------ the trained model

    def energy(self, v: Tensor) -> Tensor:
        """The free energy where the energy has one, else its variational bound E_q1[E + log q1].

        Bound: at the mean of 16 draws from q1, never below the free energy on average.
        """
        energy = self.upper.get_submodule("energy")
        with self.evaluating():
            if hasattr(energy, "free_energy"):
                exact: Tensor = cast(Any, energy).free_energy(v)
                return exact
            generator = torch.Generator(v.device).manual_seed(0)
            total = torch.zeros(len(v), device=v.device)
            for _ in range(16):
                draws = self._posterior.draws(v, self._posterior.noise(len(v), generator, v))
                total = total + self.joint_energy(draws.visible, draws.latent) + draws.log_prob
            return total / 16

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """N visibles of the variational joint p2."""
        with self.evaluating():
            return self._joint.sample(n, generator)

    def posterior(self, v: Tensor) -> Distribution:
        """q1(h|v)."""
        with self.evaluating():
            return self._posterior.distribution(v)

    def reconstruct(self, v: Tensor) -> Tensor:
        """The generator's output at the posterior mean.

        Raises:
            NotImplementedError: if the joint has no generator.
        """
        generator = getattr(self._joint, "generator", None)
        if generator is None:
            raise NotImplementedError(
                f"`{type(self._joint).__name__}` has no generator to reconstruct with; use a "
                "`GaussianJoint`, or draw from `posterior(v)`"
            )
        with self.evaluating():
            visibles: Tensor = generator(self._posterior.distribution(v).mean)
            return visibles

    def probe(self, v: Tensor) -> None:
        batch = self.draw(v, torch.Generator(v.device).manual_seed(0))
        with self.evaluating():
            draws = self._posterior.draws(v, batch.posterior_noise)
            energies = self.joint_energy(draws.visible, draws.latent)
            if energies.shape != draws.log_prob.shape:
                raise ValueError(
                    f"the joint energy must give one number per pair, shape (n,); got "
                    f"{tuple(energies.shape)} for {len(draws.log_prob)} pairs"
                )

    @classmethod
    def from_recipe(cls, recipe: dict[str, Any]) -> Self:
        raise ValueError("a `GeneralBiDVL` is made of your own modules; pass them to `load`")

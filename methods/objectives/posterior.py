r"""The lower level of the score-based learners: fit a posterior $q(h|v)$ to that of an energy.

With the unnormalised joint density $\tilde p(v, h) = e^{-E(v, h)}$ the loss is

$$ \text{kl:}\quad E_q[\log q(h|v) + E(v, h)], \qquad
   \text{fisher:}\quad \tfrac12 E_q \lVert \nabla_h \log q(h|v) + \nabla_h E(v, h) \rVert^2 . $$

The first is $KL(q \,\|\, p(h|v))$ up to a term that q does not change; the second needs latents that
are real numbers. Where h is binary, q factorises and E is linear in h, the first is closed,

$$ E_q[\log q + E] = \sum_j (p_j a_j - \log(1 + e^{a_j})) + E(v, p), \qquad p = \sigma(a(v)) . $$
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, TypeAlias, final, runtime_checkable

import torch
from torch import Tensor, nn

from bilevel.methods.machines import as_machine
from bilevel.methods.objectives.score import square_norm
from bilevel.methods.variational import VariationalPosterior
from bilevel.refusals import one_of

Divergence: TypeAlias = Literal["kl", "fisher"]
Expectation: TypeAlias = Literal["sampled", "exact"]


@final
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


@final
@dataclass(frozen=True)
class PosteriorFit:
    """The divergence of q(h|v) from p(h|v), up to what q does not change.

    Args:
        divergence: "kl", or "fisher" for real latents.
        expectation: over q: "sampled" by relaxed draws, or "exact" in closed form.

    Raises:
        ValueError: for an unknown name.
    """

    divergence: Divergence = "kl"
    expectation: Expectation = "sampled"

    def __post_init__(self) -> None:
        one_of("divergence", self.divergence, ("kl", "fisher"))
        one_of("expectation", self.expectation, ("sampled", "exact"))

    def check(self, energy: nn.Module, posterior: VariationalPosterior) -> None:
        """Refuse an energy and a posterior that this does not fit.

        Raises:
            ValueError: naming both and the setting.
        """
        machine = as_machine(energy)
        if self.divergence == "fisher":
            check_real_latents("divergence='fisher'", energy, posterior)
        linear = machine is not None and len(machine.latent_dims) == 1
        if self.expectation == "exact" and not (linear and posterior.binary):
            raise ValueError(
                "expectation='exact' needs an energy linear in h and a posterior of independent bits, "
                f"which `{type(energy).__name__}` with `{type(posterior).__name__}` and "
                f"divergence={self.divergence!r} are not; use a machine with one hidden layer and "
                "divergence='kl', or expectation='sampled'"
            )

    def noise(
        self, posterior: VariationalPosterior, v: Tensor, generator: torch.Generator
    ) -> Tensor:
        """The posterior's noise of one step; nothing where the expectation is exact."""
        return v[:0] if self.expectation == "exact" else posterior.noise(len(v), generator, v)

    def loss(self, energy: nn.Module, posterior: VariationalPosterior, batch: LowerBatch) -> Tensor:
        """The divergence, averaged over the batch.

        Args:
            energy: module (v, h) -> (n,).
            posterior: q(h|v).
            batch: visibles and noise.
        """
        if self.divergence == "fisher":
            return _fisher(energy, posterior, batch)
        v = batch.visible
        if self.expectation == "exact":
            mean = posterior.mean(v)
            closed: Tensor = (energy(v, mean) + posterior.log_prob(v, mean)).mean()
            return closed
        draws = posterior.draws(v, batch.latent)
        return draws.mean(energy(draws.visible, draws.latent) + draws.log_prob)


def _fisher(energy: nn.Module, posterior: VariationalPosterior, batch: LowerBatch) -> Tensor:
    """Half the squared slope of log q + E in h; some families know that of log q at their draws."""
    v = batch.visible
    with torch.enable_grad():
        known = posterior.known_score(v, batch.latent)
        if known is not None:
            h, slope = known
            weight = v.new_full((len(v),), 1 / len(v))
            cost = energy(v, h)
        else:
            v, h, _, weight = posterior.draws(v, batch.latent)
            h, slope = h if h.requires_grad else h.requires_grad_(), torch.zeros_like(h)
            cost = posterior.log_prob(v, h) + energy(v, h)
        slope = slope + torch.autograd.grad(cost.sum(), h, create_graph=True)[0]
    rows = 0.5 * square_norm(slope)
    return (weight * (rows if batch.gain is None else rows * batch.gain.flatten())).sum()


@runtime_checkable
class Coupling(Protocol):
    """An energy that sees a visible through features, which many of its latents share."""

    def features(self, v: Tensor) -> Tensor:
        """What the energy knows of visibles, shape (n, d)."""
        ...

    def coupled(self, features: Tensor, h: Tensor) -> Tensor:
        """Energies of features and latents, (..., d) and (..., d) -> (...), broadcast."""
        ...


def energies_of(energy: nn.Module, v: Tensor) -> Callable[[Tensor], Tensor]:
    """The energies of several latents of each visible, (n, S, d) -> (n, S), differentiable.

    What a `Coupling` needs of v is computed here, once.
    """
    if isinstance(energy, Coupling):
        coupling, features = energy, energy.features(v)[:, None]
        return lambda h: coupling.coupled(features, h)

    def energies(h: Tensor) -> Tensor:
        rows = v.repeat_interleave(h.shape[1], 0)
        found: Tensor = energy(rows, h.flatten(0, 1))
        return found.view(h.shape[:2])

    return energies


def check_real_visibles(energy: nn.Module, learner: str) -> None:
    """Refuse a machine whose visibles are binary: it has no density that could have a score.

    Raises:
        ValueError: naming the machine and what to use instead.
    """
    machine = as_machine(energy)
    if machine is not None and machine.visible_range is not None:
        raise ValueError(
            f"`{learner}` needs the score of a density over real visibles, but those of a "
            f"`{type(machine).__name__}` are binary; use `GaussianRBM` or `GaussianDBM`, or another "
            "learner, such as `AdvIL` or `ContrastiveDivergence`"
        )


def check_real_latents(setting: str, energy: nn.Module, posterior: VariationalPosterior) -> None:
    """Refuse a setting that differentiates in h where h is binary.

    Raises:
        ValueError: naming the setting, the energy and the posterior.
    """
    if as_machine(energy) is not None or posterior.binary:
        remedy = "use divergence='kl'" if "divergence" in setting else f"leave `{setting}` 0"
        raise ValueError(
            f"{setting} differentiates in h, but the latents of `{type(energy).__name__}` with "
            f"`{type(posterior).__name__}` are binary; {remedy}"
        )

r"""What the gradient of a model's energy in the visibles is for: score, samplers, other libraries.

The score is $\nabla_v \log p(v) = -\nabla_v F(v)$: the partition function is a constant and drops out. A
model that has only a bound on F has the gradient of that bound.
"""

from typing import Any, cast, final

import torch
from torch import Tensor, nn

from bilevel.methods.data.visibles import Visibles
from bilevel.methods.models.evaluating import evaluating
from bilevel.methods.models.model import Chains, LatentModel
from bilevel.methods.samplers import Sampler
from bilevel.methods.samplers.slopes import energies_and_slopes
from bilevel.methods.variational.base import normal_like
from bilevel.refusals import one_of


@final
class EnergyFunction(nn.Module):
    """A learner's free energy as a module v -> (n,), differentiable in v and in the parameters.

    It is the model in evaluation, with the running statistics of batch norm, and it follows the
    learner: what is trained later changes it. Visibles are not checked, as samplers may pass by where
    no data are.

    Args:
        learner: whose energy it is; its parameters are the module's.
    """

    def __init__(self, learner: nn.Module) -> None:
        super().__init__()
        self.learner = learner

    def forward(self, v: Tensor) -> Tensor:
        """F(v) up to a constant, or the bound on it, shape (n,)."""
        graph = torch.is_grad_enabled()
        with evaluating(self.learner, "running"), torch.set_grad_enabled(graph):
            return self._latent_model.energy(v)

    @property
    def _latent_model(self) -> LatentModel:
        model: LatentModel = cast(Any, self.learner).latent_model
        return model


def attached(v: Any, rows: Tensor) -> Tensor:
    """Checked visibles as part of the graph that they came in, if they are a tensor of one.

    Args:
        v: what was given.
        rows: what the check made of it.
    """
    return v.to(rows) if isinstance(v, Tensor) and v.requires_grad else rows


def score_of(learner: nn.Module, v: Tensor) -> Tensor:
    """Minus the gradient of the energy at checked visibles, as a constant, shape of v.

    Raises:
        NotImplementedError: if visibles are no real numbers.
    """
    energy = EnergyFunction(learner)
    _refuse_discrete(energy, "a score")
    return -energies_and_slopes(energy, v)[1]


def chains_of(
    learner: nn.Module,
    sampler: Sampler,
    n: int,
    generator: torch.Generator | None,
    chains: Chains,
) -> Tensor:
    """The ends of n chains of a learner's energy, shape (n, *shape).

    Args:
        learner: whose energy it is.
        sampler: what moves them.
        n: how many.
        generator: draws where they begin and the noise, on the model's device.
        chains: where they begin: visibles, "noise", or how the model itself is sampled.

    Raises:
        TypeError: if `sampler` is none.
        ValueError: for an unknown start, or Gibbs sweeps where none are taken.
        NotImplementedError: if visibles are no real numbers, or their shape is not known.
        FloatingPointError: if a chain left all bounds.
    """
    if isinstance(sampler, type) or not callable(getattr(sampler, "run", None)):
        raise TypeError(
            "`sampler` must be a sampler of `bilevel.methods.samplers`, such as "
            f"`Langevin(num_steps=100, step_size=0.01)`, got {sampler!r}"
        )
    energy = EnergyFunction(learner)
    _refuse_discrete(energy, f"`{type(sampler).__name__}`")
    model: LatentModel = energy._latent_model
    v = _begin(learner, model, n, generator, chains)
    return sampler.run(energy, v, generator, limits=model.visibles.range).visible


def _begin(
    learner: nn.Module,
    model: LatentModel,
    n: int,
    generator: torch.Generator | None,
    chains: Chains,
) -> Tensor:
    start = chains.start
    if start is None:
        start = "noise" if model.draws_by_chains else "model"
    if isinstance(start, Tensor) or start == "noise":
        if chains.sweeps is not None:
            raise ValueError(
                "`sweeps` are of the Gibbs chains of a machine, and these chains begin at other "
                "visibles; leave it out"
            )
        if isinstance(start, Tensor):
            return start[torch.arange(n, device=start.device) % len(start)]
        return noise(n, model.visibles, generator, next(learner.parameters()))
    one_of("start", start, ("noise", "model", "exact", "chains", "coins"))
    own = chains._replace(start=None if start == "model" else start)
    with evaluating(learner, cast(Any, learner).statistics):
        return model.sample(n, generator, own)


def noise(n: int, visibles: Visibles, generator: torch.Generator | None, like: Tensor) -> Tensor:
    """Visibles from N(0, 1), or even over their range where they have one, shape (n, *shape).

    Raises:
        NotImplementedError: if the shape is not known.
    """
    if visibles.shape is None:
        raise NotImplementedError(
            "the shape of a visible is not known; set `visible_shape` before sampling, or give visibles "
            "as `start`"
        )
    rows = like.new_empty(n, *visibles.shape)
    if visibles.range is None:
        return normal_like(rows, generator)
    low, high = visibles.range
    even = torch.rand(rows.shape, generator=generator, dtype=rows.dtype, device=rows.device)
    return low + (high - low) * even


def _refuse_discrete(energy: EnergyFunction, what: str) -> None:
    learner, visibles = energy.learner, energy._latent_model.visibles
    if not visibles.real:
        kind = "numbers of rows of a table" if visibles.table is not None else "bits"
        raise NotImplementedError(
            f"{what} needs a density over real visibles, but those of this `{type(learner).__name__}` "
            f"are {kind}; use `energy(v)`, and `sample(n)` without a sampler"
        )

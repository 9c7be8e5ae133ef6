"""Samples of a learner: its own way, or chains of a sampler on its energy."""

from typing import Any, cast

import torch
from torch import Tensor, nn

from bilevel.methods.data.visibles import Visibles
from bilevel.methods.machines.base import check_dim
from bilevel.methods.models.evaluating import evaluating
from bilevel.methods.models.gradients import EnergyFunction, refuse_discrete
from bilevel.methods.models.model import Chains, LatentModel
from bilevel.methods.samplers import Sampler
from bilevel.methods.variational.base import normal_like
from bilevel.refusals import a_generator, one_of


def samples_of(
    learner: nn.Module,
    n: int,
    generator: torch.Generator | None,
    chains: Chains,
    sampler: Sampler | None,
) -> Tensor:
    """N visibles of a learner, shape (n, *shape).

    Args:
        learner: whose they are.
        n: how many.
        generator: draws all that is random, on the model's device.
        chains: where chains begin, and how many Gibbs sweeps they take.
        sampler: what moves them on the energy; the learner's own way by default.

    Raises:
        TypeError: if `n` is not an integer, or `sampler` none.
        ValueError: if `n` is not positive, for an unknown start, or for sweeps where none are taken.
        NotImplementedError: if the model cannot be sampled so.
        FloatingPointError: if a chain left all bounds.
    """
    check_dim("n", n)
    a_generator("generator", generator)
    if chains.persistent is not None and len(chains.persistent) == 0:
        chains = chains._replace(persistent=None)
    if sampler is not None:
        return _chains_of(learner, sampler, n, generator, chains)
    return _own(learner, n, generator, chains)


def _own(learner: nn.Module, n: int, generator: torch.Generator | None, chains: Chains) -> Tensor:
    made = cast(Any, learner)
    model: LatentModel = made.latent_model
    with evaluating(learner, made.statistics):
        return model.sample(n, generator, chains)


def _chains_of(
    learner: nn.Module,
    sampler: Sampler,
    n: int,
    generator: torch.Generator | None,
    chains: Chains,
) -> Tensor:
    """The ends of n chains of the learner's energy, in evaluation with running statistics."""
    if isinstance(sampler, type) or not callable(getattr(sampler, "run", None)):
        raise TypeError(
            "`sampler` must be a sampler of `bilevel.methods.samplers`, such as "
            f"`Langevin(num_steps=100, step_size=0.01)`, got {sampler!r}"
        )
    energy = EnergyFunction(learner)
    refuse_discrete(energy, f"`{type(sampler).__name__}`")
    model = energy.latent_model
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
        return _noise(n, model.visibles, generator, next(learner.parameters()))
    one_of("start", start, ("noise", "model", "exact", "chains", "coins"))
    own = chains._replace(start=None if start == "model" else start)
    return _own(learner, n, generator, own)


def _noise(n: int, visibles: Visibles, generator: torch.Generator | None, like: Tensor) -> Tensor:
    """Visibles from N(0, 1), or even over their range where they have one, shape (n, *shape)."""
    if visibles.shape is None:
        raise NotImplementedError(
            "the shape of a visible is not known before training; fit the model, set "
            "`visible_shape`, or give visibles as `start`"
        )
    rows = like.new_empty(n, *visibles.shape)
    if visibles.range is None:
        return normal_like(rows, generator)
    low, high = visibles.range
    even = torch.rand(rows.shape, generator=generator, dtype=rows.dtype, device=rows.device)
    return low + (high - low) * even

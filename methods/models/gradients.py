r"""The gradient of a model's energy in the visibles: its score, and its energy as a module.

The score is $\nabla_v \log p(v) = -\nabla_v F(v)$: the partition function is a constant and drops out. A
model that has only a bound on F has the gradient of that bound.
"""

from typing import Any, cast, final

import torch
from torch import Tensor, nn

from bilevel.methods.models.evaluating import evaluating
from bilevel.methods.models.model import LatentModel
from bilevel.methods.samplers.slopes import energies_and_slopes


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
            return self.latent_model.energy(v)

    @property
    def latent_model(self) -> LatentModel:
        """What answers for the learner."""
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
    refuse_discrete(energy, "a score")
    return -energies_and_slopes(energy, v)[1]


def refuse_discrete(energy: EnergyFunction, what: str) -> None:
    """Refuse what needs the gradient in visibles that have none.

    Args:
        energy: of the model.
        what: needs it.

    Raises:
        NotImplementedError: naming it and the learner.
    """
    learner, visibles = energy.learner, energy.latent_model.visibles
    if not visibles.real:
        kind = "numbers of rows of a table" if visibles.table is not None else "bits"
        raise NotImplementedError(
            f"{what} needs a density over real visibles, but those of this `{type(learner).__name__}` "
            f"are {kind}; use `energy(v)`, and `sample(n)` without a sampler"
        )

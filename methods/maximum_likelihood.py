r"""Maximum likelihood with the exact partition function: the ceiling of every other learner.

$$ L(\theta) = -E_q[\log p_\theta(v)] = E_q[F(v)] + \log Z, \qquad
   \nabla_\theta L = E_{q\,p_\theta(h|v)}[\nabla_\theta E] - E_{p_\theta(v,h)}[\nabla_\theta E] . $$

log Z is enumerated at every step, $2^{\text{units}}$ states of the side with fewer units, so the
gradient has no noise but the batch's. It has a single level.
"""

from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

from bilevel.arguments import explained
from bilevel.methods.eblvm import EBLVM
from bilevel.methods.machines import MAX_UNITS, BoltzmannMachine
from bilevel.methods.models.machine import MachineModel, require_machine
from bilevel.methods.training.settings import MACHINE_DEFAULTS
from bilevel.problem import Loss


@final
class MaximumLikelihood(EBLVM):
    r"""Exact maximum likelihood, $E_q[F(v)] + \log Z$.

    A step enumerates $2^n$ states for n units on the smaller side. With 2 visibles and 4 latents that
    costs less than contrastive divergence, with 64 and 15 as much as dozens of its steps.

    Args:
        model: a machine whose log Z and free energy can be enumerated.

    Raises:
        ValueError: if they cannot.

    Example:
        >>> from bilevel.methods.machines import RBM
        >>> learner = MaximumLikelihood(RBM(6, 3))
        >>> history = learner.fit(torch.ones(200, 6), num_steps=500, upper_lr=0.1)
        >>> bool(learner.model.log_likelihood(torch.ones(1, 6)) > -0.1)
        True

    References:
        "A Learning Algorithm for Boltzmann Machines" (Ackley, Hinton and Sejnowski, 1985),
        https://doi.org/10.1207/s15516709cog0901_7: the gradient as a difference of moments.
        Differs from the paper in: the moments are exact, not sampled.
    """

    latent_model: MachineModel
    training_defaults: ClassVar[dict[str, Any]] = MACHINE_DEFAULTS

    @explained
    def __init__(self, model: BoltzmannMachine) -> None:
        super().__init__()
        instead = (
            "`ContrastiveDivergence(model, persistent=True)`, which takes the mean field instead"
        )
        machine = require_machine(model, "MaximumLikelihood", instead)
        if not machine.enumerable:
            raise ValueError(
                f"log Z of this `{type(machine).__name__}` ({machine.visible_dim} visibles, latents "
                f"{machine.latent_dims}) is a sum over more than {MAX_UNITS} units; use "
                "`ContrastiveDivergence(model, persistent=True)`, which samples the model instead"
            )
        self.latent_model = MachineModel.of(machine)
        self.upper, self.lower = nn.ModuleDict({"model": machine}), nn.ModuleDict()
        self.recipe = {"model": machine.recipe}

    def draw(self, data: Tensor, generator: torch.Generator) -> Tensor:
        """The visibles: nothing is random."""
        return data

    def upper_loss(self, batch: Tensor) -> Loss:
        """The negative mean log-likelihood."""
        log_partition = self.model.log_partition()
        loss = self.model.free_energy(batch).mean() + log_partition
        return loss, {"log_partition": log_partition}

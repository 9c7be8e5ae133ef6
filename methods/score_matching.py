r"""Score matching of a machine whose free energy F(v) is tractable: one level, no partition function.

$$ \min_\theta\; E_v\, \ell(-\nabla_v F(v; \theta)), \qquad \nabla_v \log p = -\nabla_v F, $$

with $\ell$ one of the losses of `score_objectives`. It is what `BiSM` and `VaGES`, which do without F,
are measured against.
"""

from typing import Any, ClassVar, final

import torch
from torch import Tensor

from bilevel.methods.learner import ModelLearner, check_machine
from bilevel.methods.models import LatentVariableModel
from bilevel.methods.score_objectives import (
    Noised,
    ObjectiveName,
    Probed,
    check_real_visibles,
    score_objective,
)
from bilevel.problem import Loss


@final
class ScoreMatching(ModelLearner):
    """Score matching on the free energy.

    Args:
        model: a machine with Gaussian visibles.
        objective: "denoising" at one noise level, "multiscale" at many, "sliced" with random
            directions, or "exact" with the exact trace (a backward pass per visible unit).
        sigma: noise level of the denoising objectives.
        sigma_range: first and last noise level of "multiscale".

    Raises:
        ValueError: for a machine with binary visibles, or a bad setting.

    Example:
        >>> from bilevel.methods.models import GaussianRBM
        >>> learner = ScoreMatching(GaussianRBM(2, 4), objective="sliced")
        >>> history = learner.fit(torch.rand(200, 2), num_steps=10)
        >>> learner.model.log_likelihood(torch.rand(5, 2)).shape
        torch.Size([5])

    References:
        As in `score_objectives`; the protocol is that of Bi-level Score Matching for Learning
        Energy-based Latent Variable Models (Bao et al., NeurIPS 2020),
        https://arxiv.org/abs/2010.07856.
    """

    training_defaults: ClassVar[dict[str, Any]] = {
        **ModelLearner.training_defaults,
        "lower_steps": 0,
    }

    def __init__(
        self,
        model: LatentVariableModel,
        *,
        objective: ObjectiveName = "denoising",
        sigma: float = 0.05,
        sigma_range: tuple[float, float] = (0.05, 1.0),
    ) -> None:
        super().__init__()
        check_machine(model, "ScoreMatching", "`BiSM` or `VaGES`")
        check_real_visibles(model, "ScoreMatching")
        self.objective = score_objective(objective, sigma, sigma_range)
        options = {"objective": objective, "sigma": sigma, "sigma_range": list(sigma_range)}
        self.hold(model, options=options)

    def draw(self, data: Tensor, generator: torch.Generator) -> Probed | Noised:
        return self.objective.draw(data, generator)

    def upper_loss(self, batch: Probed | Noised) -> Loss:
        """The objective of the log-density -F."""
        model = self.model
        return self.objective.loss(lambda v: -model.free_energy(v), batch)

r"""Score matching of a machine whose free energy F(v) is tractable: one level, no partition function.

$$ \min_\theta\; E_v\, \ell(-\nabla_v F(v; \theta)), \qquad \nabla_v \log p = -\nabla_v F, $$

with $\ell$ one of the losses of `objectives.score`. It is what `BiSM` and `VaGES`, which do without F,
are measured against: with a machine's exact F, or with a network for F, which then has no latent.
"""

from typing import Any, ClassVar, Literal, Self, final

import torch
from torch import Tensor, nn

from bilevel.arguments import explained
from bilevel.methods.data.sides import image_shape
from bilevel.methods.data.visibles import Visibles
from bilevel.methods.eblvm import EBLVM
from bilevel.methods.machines import as_machine
from bilevel.methods.models.langevin import PUBLISHED, AnnealedLangevin, LangevinSteps, Steps
from bilevel.methods.models.machine import MachineModel, require_machine
from bilevel.methods.models.marginal import Marginal
from bilevel.methods.networks.build import build
from bilevel.methods.networks.deep import VISIBLE_RANGE, DeepEnergy
from bilevel.methods.objectives.posterior import check_real_visibles
from bilevel.methods.objectives.score import (
    Grid,
    Noised,
    ObjectiveName,
    Probed,
    score_objective,
)
from bilevel.methods.training.settings import MACHINE_DEFAULTS
from bilevel.problem import Loss


@final
class ScoreMatching(EBLVM):
    """Score matching on the free energy.

    Args:
        model: a machine with Gaussian visibles, or a module v -> (n,) that is the free energy.
        objective: "denoising" at one noise level, "multiscale" at many, "sliced" with random
            directions, or "exact" with the exact trace (a backward pass per visible unit).
        sigma: noise level of the denoising objectives.
        sigma_range: first and last noise level of "multiscale".
        grid: of the levels between: "geometric" or "linear".
        langevin: steps of annealed Langevin dynamics by which a module is sampled; see `BiSM`.

    Raises:
        TypeError: if the model is no module.
        ValueError: for a machine with binary visibles, or a bad setting.

    Example:
        >>> from bilevel.methods.machines import GaussianRBM
        >>> learner = ScoreMatching(GaussianRBM(2, 4), objective="sliced")
        >>> history = learner.fit(torch.rand(200, 2), num_steps=10)
        >>> learner.model.log_likelihood(torch.rand(5, 2)).shape
        torch.Size([5])

    References:
        As in `objectives.score`; the protocol is that of Bi-level Score Matching for Learning
        Energy-based Latent Variable Models (Bao et al., NeurIPS 2020),
        https://arxiv.org/abs/2010.07856.
    """

    latent_model: MachineModel | Marginal
    training_defaults: ClassVar[dict[str, Any]] = {**MACHINE_DEFAULTS, "lower_steps": 0}
    langevin = LangevinSteps()

    @explained
    def __init__(
        self,
        model: nn.Module,
        *,
        objective: ObjectiveName = "denoising",
        sigma: float = 0.05,
        sigma_range: tuple[float, float] = (0.05, 1.0),
        grid: Grid = "geometric",
        langevin: Steps = PUBLISHED,
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"`model` must be a module, got `{type(model).__name__}`")
        check_real_visibles(model, "ScoreMatching")
        self.objective = score_objective(objective, sigma, sigma_range, grid)
        self.upper, self.lower = nn.ModuleDict({"model": model}), nn.ModuleDict()
        dynamics = AnnealedLangevin(langevin, self.objective.blur)
        if as_machine(model) is None:
            self.latent_model = Marginal(Visibles(), network=model, langevin=dynamics)
            return
        machine = require_machine(model, "ScoreMatching", "`BiSM` or `VaGES`")
        self.latent_model = MachineModel.of(machine)
        options = {"objective": objective, "sigma": sigma, "sigma_range": list(sigma_range)}
        self.recipe = {"model": machine.recipe, **options, "grid": grid}

    @classmethod
    def for_images(
        cls,
        shape: tuple[int, int, int],
        *,
        width: int = 64,
        blocks: int = 2,
        objective: Literal["denoising", "multiscale"] = "multiscale",
        sigma: float = 0.2,
        sigma_range: tuple[float, float] = (0.2, 6.0),
        grid: Grid = "geometric",
        seed: int = 0,
        **options: Any,
    ) -> Self:
        """The baseline of the deep models of BiSM and VaGES: their energy without a latent.

        Args:
            shape: (channels, side, side) of images in [-1, 1], at least 8 pixels.
            width: first channels of the energy: 64 for MNIST, 128 for CIFAR-10 in the papers.
            blocks: residual blocks per stage: 2 for MNIST, 3 for CIFAR-10 in the papers.
            objective: "multiscale" in the papers.
            sigma: noise level whose density the model is meant to fit, as `sigma_range` twice that of
                the papers, whose images lie in [0, 1].
            sigma_range: first and last noise level of "multiscale".
            grid: noise levels between: with equal ratios or differences.
            seed: seed of the initial weights; torch's global generator is left as it was.
            **options: further arguments of `ScoreMatching`.

        Returns:
            The untrained model.

        Raises:
            TypeError: if a number is not an integer.
            ValueError: if the images are not square or smaller than 8 pixels, or for a bad setting.
        """
        shape = image_shape(shape)
        energy = build(lambda: DeepEnergy(shape, width, blocks), seed)
        options |= {"objective": objective, "sigma": sigma, "sigma_range": sigma_range}
        learner = cls(energy, grid=grid, **options)
        learner.latent_model = learner.latent_model.taking(shape=tuple(shape), range=VISIBLE_RANGE)
        sizes = {"width": width, "blocks": blocks, "seed": seed}
        learner.recipe = {"shape": shape, **sizes, "grid": grid, **options}
        return learner

    # ------------------------------------------------------------------ the learning problem

    def draw(self, data: Tensor, generator: torch.Generator) -> Probed | Noised:
        return self.objective.draw(data, generator)

    def upper_loss(self, batch: Probed | Noised) -> Loss:
        """The objective of the log-density -F."""
        free_energy = self.latent_model.free_energy
        return self.objective.loss(lambda v: -free_energy(v), batch)

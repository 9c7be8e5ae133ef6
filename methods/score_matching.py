r"""Score matching of a machine whose free energy F(v) is tractable: one level, no partition function.

$$ \min_\theta\; E_v\, \ell(-\nabla_v F(v; \theta)), \qquad \nabla_v \log p = -\nabla_v F, $$

with $\ell$ one of the losses of `score_objectives`. It is what `BiSM` and `VaGES`, which do without F,
are measured against: with a machine's exact F, or with a network for F, which then has no latent.
"""

from collections.abc import Callable
from typing import Any, ClassVar, Literal, Self, final

import torch
from torch import Tensor, nn

from bilevel.methods.eblvm import attempt, chunked
from bilevel.methods.learner import ModelLearner, Start, check_machine, refuse_chains
from bilevel.methods.machines import LatentVariableModel
from bilevel.methods.models.langevin import PUBLISHED, Steps, check_steps, visible_chains
from bilevel.methods.networks.deep import VISIBLE_RANGE, DeepEnergy, seeded
from bilevel.methods.objectives.score import (
    Grid,
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
        model: nn.Module,
        *,
        objective: ObjectiveName = "denoising",
        sigma: float = 0.05,
        sigma_range: tuple[float, float] = (0.05, 1.0),
        grid: Grid = "geometric",
        langevin: Steps = PUBLISHED,
    ) -> None:
        super().__init__()
        check_real_visibles(model, "ScoreMatching")
        self.objective = score_objective(objective, sigma, sigma_range, grid)
        self.langevin = check_steps(langevin)
        self.denoise = sigma if objective in ("denoising", "multiscale") else 0.0
        if isinstance(model, LatentVariableModel):
            check_machine(model, "ScoreMatching", "`BiSM` or `VaGES`")
            options = {"objective": objective, "sigma": sigma, "sigma_range": list(sigma_range)}
            self.hold(model, options={**options, "grid": grid})
        elif isinstance(model, nn.Module):
            self.upper, self.lower = nn.ModuleDict({"model": model}), nn.ModuleDict()
        else:
            raise TypeError(f"`model` must be a module, got `{type(model).__name__}`")

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
        energy = seeded(seed, lambda: DeepEnergy(shape, width, blocks))
        options |= {"objective": objective, "sigma": sigma, "sigma_range": sigma_range}
        learner = cls(energy, grid=grid, **options)
        learner.visible_shape, learner.visible_range = tuple(shape), VISIBLE_RANGE
        sizes = {"width": width, "blocks": blocks, "seed": seed}
        learner.recipe = {"shape": shape, **sizes, "grid": grid, **options}
        return learner

    # ------------------------------------------------------------------ the learning problem

    @property
    def free_energy(self) -> Callable[[Tensor], Tensor]:
        """F, (n, ...) -> (n,), differentiable."""
        return self.model.free_energy if self._is_machine else self._network

    def draw(self, data: Tensor, generator: torch.Generator) -> Probed | Noised:
        return self.objective.draw(data, generator)

    def upper_loss(self, batch: Probed | Noised) -> Loss:
        """The objective of the log-density -F."""
        free_energy = self.free_energy
        return self.objective.loss(lambda v: -free_energy(v), batch)

    # ------------------------------------------------------------------ the trained model

    def _no_machine(self) -> NotImplementedError:
        return NotImplementedError(
            f"this needs a latent, which `ScoreMatching` of a `{type(self._network).__name__}` does not "
            "have; use `BiSM` or `VaGES`"
        )

    def energy(self, v: Tensor) -> Tensor:
        """F(v)."""
        with self.evaluating():
            return chunked(self.free_energy, self.check(v))

    def sample(
        self,
        n: int,
        generator: torch.Generator | None = None,
        *,
        start: Start | None = None,
        sweeps: int | None = None,
    ) -> Tensor:
        """Visibles of a machine by Gibbs sampling; of another module by annealed Langevin dynamics.

        Raises:
            ValueError: if n is not positive, or for `start` or `sweeps` of another module.
            NotImplementedError: if the shape of a visible is not known.
        """
        if self._is_machine:
            return ModelLearner.sample(self, n, generator, start=start, sweeps=sweeps)
        refuse_chains(start, sweeps)
        if n < 1:
            raise ValueError(f"`n` must be positive, got {n}")
        nothing = next(self.parameters()).new_empty(n, 0)
        with self.evaluating():
            shape, free = self.visible_shape, self.free_energy
            return visible_chains(self, lambda v, h: free(v), nothing, shape, generator, given=True)

    def probe(self, v: Tensor) -> None:
        if self._is_machine:
            ModelLearner.probe(self, v)
            return
        with self.evaluating():
            energies = attempt("model", self.upper.get_submodule("model"), v)
        if not isinstance(energies, Tensor) or energies.shape != (len(v),):
            raise ValueError("the model must give one number per visible, shape (n,)")

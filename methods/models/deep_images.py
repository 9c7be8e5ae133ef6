"""`for_images` of the score-based learners: the published deep energy and its Gaussian posterior."""

from typing import Any, Literal, Protocol, TypeVar

from torch import nn

from bilevel.methods.models.model import LatentModel
from bilevel.methods.networks.deep import VISIBLE_RANGE, image_networks
from bilevel.methods.objectives.posterior import Divergence
from bilevel.methods.objectives.score import Grid
from bilevel.methods.variational import GaussianPosterior, VariationalPosterior


class ScoreLearner(Protocol):
    """A learner of an energy with a posterior."""

    latent_model: Any
    recipe: dict[str, Any] | None

    def __init__(
        self, model: nn.Module, posterior: VariationalPosterior | None = None, **options: Any
    ) -> None: ...


Learner = TypeVar("Learner", bound=ScoreLearner)


def deep_images(
    cls: type[Learner],
    /,
    shape: tuple[int, int, int],
    *,
    latent_dim: int = 50,
    width: int = 64,
    blocks: int = 2,
    objective: Literal["denoising", "multiscale"] = "multiscale",
    divergence: Divergence = "fisher",
    sigma: float = 0.2,
    sigma_range: tuple[float, float] = (0.2, 6.0),
    grid: Grid = "geometric",
    seed: int = 0,
    **options: Any,
) -> Learner:
    """The published deep energy and Gaussian posterior, scaled to square images in [-1, 1].

    Noise levels are those of images in [-1, 1], twice those of the papers, whose images lie in
    [0, 1]. The defaults are the papers' for MNIST; for CIFAR-10 and CelebA they have `width=128`,
    `blocks=3`, `sigma_range=(0.1, 2.4)` and `grid="linear"`.

    Args:
        cls: the learner.
        shape: (channels, side, side), at least 8 pixels.
        latent_dim: dimension of the latent: 20, 50 or 100 in the papers.
        width: first channels of the energy; the posterior has as many, at most 64.
        blocks: residual blocks per stage of the energy.
        objective: "multiscale" in the papers.
        divergence: lower loss: "fisher" in the papers.
        sigma: noise level whose density the model is meant to fit.
        sigma_range: first and last noise level of "multiscale".
        grid: noise levels between: with equal ratios or differences.
        seed: seed of the initial weights; torch's global generator is left as it was.
        **options: further arguments of the method.

    Returns:
        The untrained model.

    Raises:
        TypeError: if a number is not an integer.
        ValueError: if the images are not square or smaller than 8 pixels, or for a bad setting.
    """
    energy, moments = image_networks(shape, latent_dim, width, blocks, seed)
    options |= {"objective": objective, "divergence": divergence, "sigma": sigma}
    options |= {"sigma_range": sigma_range, "grid": grid}
    learner = cls(energy, GaussianPosterior(moments, latent_dim), **options)
    model: LatentModel = learner.latent_model
    learner.latent_model = model.taking(shape=tuple(shape), range=VISIBLE_RANGE)
    sizes = {"latent_dim": latent_dim, "width": width, "blocks": blocks, "seed": seed}
    learner.recipe = {"shape": shape, **sizes, **options}
    return learner

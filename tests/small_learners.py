"""Small models of every method, and visibles for them."""

from collections.abc import Callable

import torch
from torch import Tensor

from bilevel.methods import (
    DBM,
    EBLVM,
    RBM,
    VAE,
    AdvIL,
    BiDVL,
    BiSM,
    ContrastiveDivergence,
    GaussianDBM,
    GaussianRBM,
    GeneralBiDVL,
    MaximumLikelihood,
    NoiseContrastive,
    ScoreMatching,
    VaGES,
)

SHAPE, WIDTH, QUICK = (1, 8, 8), 6, (1, 1, 1)
NAN, INF = float("nan"), float("inf")


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def bits(n: int = 8, width: int = WIDTH) -> Tensor:
    return torch.bernoulli(torch.full((n, width), 0.4), generator=rng())


def normals(n: int = 8, width: int = WIDTH) -> Tensor:
    return torch.randn(n, width, generator=rng())


def pictures(n: int = 8) -> Tensor:
    return torch.rand(n, *SHAPE, generator=rng()) * 2 - 1


MODELS: dict[str, tuple[Callable[[], EBLVM], Callable[[], Tensor]]] = {
    "cd": (lambda: ContrastiveDivergence(RBM(WIDTH, 3)), bits),
    "cd of a dbm": (lambda: ContrastiveDivergence(DBM(WIDTH, (3, 2))), bits),
    "cd of a grey rbm": (lambda: ContrastiveDivergence(RBM(WIDTH, 3, grey=True)), bits),
    "cd of real visibles": (lambda: ContrastiveDivergence(GaussianRBM(WIDTH, 3)), normals),
    "maximum likelihood": (lambda: MaximumLikelihood(GaussianDBM(WIDTH, (3, 2))), normals),
    "nce": (lambda: NoiseContrastive(RBM(WIDTH, 3)), bits),
    "advil": (lambda: AdvIL(RBM(WIDTH, 3)), bits),
    "advil of a dbm": (lambda: AdvIL(DBM(WIDTH, (3, 2))), bits),
    "general bidvl": (lambda: GeneralBiDVL.for_model(RBM(WIDTH, 3)), bits),
    "general bidvl of a dbm": (lambda: GeneralBiDVL.for_model(DBM(WIDTH, (3, 2))), bits),
    "general bidvl of reals": (lambda: GeneralBiDVL.for_model(GaussianRBM(WIDTH, 3)), normals),
    "bism": (lambda: BiSM(GaussianRBM(WIDTH, 3)), normals),
    "vages": (lambda: VaGES(GaussianRBM(WIDTH, 3)), normals),
    "score matching": (lambda: ScoreMatching(GaussianRBM(WIDTH, 3)), normals),
    "vae": (lambda: VAE.for_table(WIDTH, 2, hidden=[4]), bits),
    "vae of reals": (lambda: VAE.for_table(WIDTH, 2, hidden=[4], visible="gaussian"), normals),
    "bidvl": (lambda: BiDVL.for_images(SHAPE, latent_dim=2, width=4), pictures),
    "vae of images": (lambda: VAE.for_images(SHAPE, latent_dim=2, width=4), pictures),
    "advil of images": (lambda: AdvIL.for_images(SHAPE, latent_dim=2, width=4), pictures),
    "bism of images": (
        lambda: BiSM.for_images(SHAPE, latent_dim=2, width=2, langevin=QUICK),
        pictures,
    ),
    "score matching of images": (
        lambda: ScoreMatching.for_images(SHAPE, width=2, langevin=QUICK),
        pictures,
    ),
}

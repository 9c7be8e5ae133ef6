"""The deep energy-based latent-variable models of BiSM and VaGES."""

from dataclasses import replace
from typing import Any

from bilevel.methods.bism import BiSM
from bilevel.methods.presets.base import GREY32, OFTEN, RGB32, RGB64, Preset
from bilevel.methods.vages import VaGES

_BISM = "Bao et al., Bi-level score matching (NeurIPS 2020), official code"
_VAGES = (
    "Bao et al., Variational (gradient) estimates of the score function (ICML 2021), official code"
)
_DEEP_NOTE = (
    "latent of 50: the code has 20, 50 and 100. Noise levels are twice the published, images "
)
_DEEP_NOTE += "lying in [-1, 1] instead of [0, 1]"
_SCORE: dict[str, Any] = {
    "num_steps": 300_000,
    "batch_size": 100,
    "upper_lr": 5e-5,
    "lower_lr": 5e-5,
    "betas": (0.9, 0.95),
    "lower_weight_decay": 0.0,
    "schedule": "cosine",
    "final_lr": 0.0,
    "lower_steps": 5,
    "order": "lower_first",
    **OFTEN,
}
SCORE_MNIST: dict[str, Any] = {
    **_SCORE,
    "num_steps": 100_000,
    "upper_lr": 1e-4,
    "lower_lr": 1e-4,
    "final_lr": 0.01,  # 1e-4 to 1e-6
}
SMALL_DEEP = {"latent_dim": 50, "width": 64, "blocks": 2, "sigma": 0.2, "sigma_range": (0.2, 6.0)}
SMALL_DEEP |= {"grid": "geometric", "objective": "multiscale", "divergence": "fisher"}
_LARGE_DEEP = {
    **SMALL_DEEP,
    "width": 128,
    "blocks": 3,
    "sigma_range": (0.1, 2.4),
    "grid": "linear",
}

BISM_MNIST = Preset(
    name="bism-mnist",
    about="BiSM (BiMDSM) on MNIST padded to 32 pixels, deep energy",
    method=BiSM,
    data="mnist",
    shape=GREY32,
    loading={"side": 32},
    source=_BISM,
    model=SMALL_DEEP,
    training=SCORE_MNIST,
    note=_DEEP_NOTE,
)
_BISM_CIFAR10 = replace(
    BISM_MNIST,
    name="bism-cifar10",
    about="BiSM (BiMDSM) on CIFAR-10, deep energy",
    data="cifar10",
    shape=RGB32,
    loading={},
    model=_LARGE_DEEP,
    training=_SCORE,
)
_FACES_NOTE = (
    f"{_DEEP_NOTE}. Images are not mirrored at random, and the split is not the official one"
)
_BISM_CELEBA = replace(
    _BISM_CIFAR10,
    name="bism-celeba",
    about="BiSM (BiMDSM) on CelebA at 32 pixels, deep energy",
    data="celeba32",
    loading={"crop": 140, "side": 32},
    note=_FACES_NOTE,
)

_VAGES_MODEL = {"num_samples": 2, "latent_steps": 5, "latent_rate": 1e-2, "latent_noise": 1e-4}
_VAGES_MNIST = replace(
    BISM_MNIST,
    name="vages-mnist",
    about="VaGES-MDSM on MNIST padded to 32 pixels, deep energy",
    method=VaGES,
    source=_VAGES,
    model={**SMALL_DEEP, **_VAGES_MODEL},
)
_VAGES_CIFAR10 = replace(
    _BISM_CIFAR10,
    name="vages-cifar10",
    about="VaGES-MDSM on CIFAR-10, deep energy",
    method=VaGES,
    source=_VAGES,
    model={**_LARGE_DEEP, **_VAGES_MODEL},
    training={**_SCORE, "ema": 0.999},
)
_VAGES_CELEBA64 = replace(
    _VAGES_CIFAR10,
    name="vages-celeba64",
    about="VaGES-MDSM on CelebA at 64 pixels, deep energy",
    data="celeba64",
    shape=RGB64,
    loading={"crop": 140, "side": 64},
    model={**_VAGES_CIFAR10.model, "latent_steps": 50, "latent_rate": 5e-4},
    note=_FACES_NOTE,
)

SCORE_EXPERIMENTS = [
    BISM_MNIST,
    _BISM_CIFAR10,
    _BISM_CELEBA,
    _VAGES_MNIST,
    _VAGES_CIFAR10,
    _VAGES_CELEBA64,
]
"""All of them."""

"""Small ones, for a laptop."""

from dataclasses import replace
from typing import Any

from bilevel.methods.advil import AdvIL
from bilevel.methods.bidvl import BiDVL
from bilevel.methods.presets.base import GREY32, Preset
from bilevel.methods.presets.scores import BISM_MNIST, SCORE_MNIST, SMALL_DEEP
from bilevel.methods.vae import VAE

_OURS = "ours; nothing of it is published"
DIGITS = Preset(
    name="digits",
    meant_for="cpu",
    about="BiDVL on scikit-learn's digits: about a minute on two processor cores that are free",
    method=BiDVL,
    data="digits",
    shape=(1, 8, 8),
    source=_OURS,
    model={
        "latent_dim": 16,
        "width": 16,  # the published 64 is for images with 16 times as many pixels
        "ratio": 0.1,  # the published 0.05 leaves reconstructions of so few pixels blurred
        "latent_weight": 0.15,
    },
    training={
        "num_steps": 2000,
        "upper_lr": 4e-3,
        "lower_lr": 2e-3,
        "lower_weight_decay": 0.0,
        "schedule": "cosine",
        "log_every": 20,
        "checkpoint_every": 250,
        "max_seconds": 90.0,
    },
)
"""BiDVL on scikit-learn's digits: about a minute on two processor cores that are free."""

_QUARTER: dict[str, Any] = {
    "batch_size": 64,
    "schedule": "cosine",
    "log_every": 50,
    "checkpoint_every": 500,
    "max_seconds": 1100.0,
}
_MNIST = Preset(
    name="mnist",
    meant_for="cpu",
    about="BiDVL on MNIST padded to 32 pixels: below 20 minutes on two processor cores",
    method=BiDVL,
    data="mnist",
    shape=GREY32,
    loading={"side": 32},
    source=_OURS,
    model={"latent_dim": 32, "width": 16, "ratio": 0.05},
    training={
        **_QUARTER,
        "num_steps": 2400,
        "upper_lr": 4e-4,
        "lower_lr": 1e-3,
        "lower_weight_decay": 0.0,
    },
)
_EQUAL = "the same networks, latents and time as the preset `mnist`"
_VAE_MNIST = replace(
    _MNIST,
    name="vae-mnist",
    about="VAE on MNIST padded to 32 pixels, as long as `mnist`",
    method=VAE,
    model={"latent_dim": 32, "width": 16},
    training={**_QUARTER, "num_steps": 7000, "upper_lr": 1e-3},
    note=_EQUAL,
)
_ADVIL_MNIST = replace(
    _MNIST,
    name="advil-mnist",
    about="undecoupled BiDVL with KL, approximately AdvIL, on MNIST, as long as `mnist`",
    method=AdvIL,
    model={"latent_dim": 32, "width": 16},
    training={**_MNIST.training, "num_steps": 2400, "betas": (0.0, 0.9), "lower_steps": 1},
    note=f"{_EQUAL}; it may diverge, see `advil-cifar10`",
)
_BISM_MNIST_SMALL = replace(
    BISM_MNIST,
    name="bism-mnist-small",
    meant_for="cpu",
    about="BiSM (BiMDSM) on MNIST padded to 32 pixels, a narrow deep energy, as long as `mnist`",
    source="ours; the published settings of `bism-mnist`, narrower and shorter",
    model={**SMALL_DEEP, "latent_dim": 20, "width": 8, "langevin": (50, 300, 50)},
    training={
        **SCORE_MNIST,
        **_QUARTER,
        "num_steps": 3000,
        "batch_size": 50,
        "upper_lr": 6e-4,
        "lower_lr": 1e-3,
    },
    note="the same time as the preset `mnist`, not counting Langevin dynamics at the end",
)

SMALL_EXPERIMENTS = [DIGITS, _MNIST, _VAE_MNIST, _ADVIL_MNIST, _BISM_MNIST_SMALL]
"""All of them."""

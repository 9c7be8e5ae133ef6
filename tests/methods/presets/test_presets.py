"""Presets against the published settings, which are typed here a second time, from the papers' code."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from bilevel.cli.options import model_settings
from bilevel.methods import AdvIL, BiDVL, BiSM, Training, VaGES
from bilevel.methods.data.images import NAMES
from bilevel.methods.networks.convolutional import parameter_count
from bilevel.methods.presets import DIGITS, PRESETS, Preset, small

DOCS = Path(__file__).resolve().parents[3] / "docs"


class Row(NamedTuple):
    """One column of the table of BiDVL's hyper-parameters."""

    batch: int
    steps: int
    upper_lr: float
    lower_lr: float
    decay: float
    weight_decay: float
    latent_dim: int
    ratio: float
    latent_weight: float
    upper: str = "difference"
    variant: str = "offset"


CIFAR = Row(100, 300_000, 1e-4, 3e-4, 0.998, 1e-4, 100, 0.05, 0.01)
RESNET = Row(100, 200_000, 2e-4, 2e-4, 0.999, 0.0, 128, 0.05, 1e-4, "hinge")
BIDVL = {
    "cifar10": CIFAR,
    "svhn": CIFAR._replace(steps=600 * 732),
    "celeba32": CIFAR,
    "celeba64": CIFAR._replace(batch=50, steps=600_000, ratio=0.1),
    "cifar10-resnet": RESNET,
    "celeba128-resnet": RESNET._replace(batch=36, steps=300_000, decay=0.998),
    "cifar10-r0.01": CIFAR._replace(ratio=0.01),
    "cifar10-r0.1": CIFAR._replace(ratio=0.1),
    "cifar10-r0.5": CIFAR._replace(ratio=0.5),
    "cifar10-r1": CIFAR._replace(ratio=1.0),
    "cifar10-complete": CIFAR._replace(variant="complete"),
    "cifar10-without": CIFAR._replace(variant="without"),
}

SIZES = {  # energy, posterior, generator
    "cifar10": (7_385_665, 2_780_024, 4_452_963),
    "celeba64": (29_670_977, 8_728_952, 16_866_147),
    "cifar10-resnet": (1_053_825, 1_086_720, 4_276_739),
    "celeba128-resnet": (29_017_857, 29_278_976, 32_150_787),
}

FACES = {"celeba32": (160, 32), "celeba64": (160, 64), "celeba128-resnet": (160, 128)}
FACES |= {"bism-celeba": (140, 32), "vages-celeba64": (140, 64)}


def on_meta(preset: Preset) -> Any:
    """The model at full size, without memory."""
    with torch.device("meta"):
        return preset.build()


@pytest.mark.parametrize("name", BIDVL)
def test_bidvls_presets_are_the_published_settings(name: str) -> None:
    preset, row = PRESETS[name], BIDVL[name]
    model, training = on_meta(preset), preset.settings()
    assert type(model) is BiDVL
    found = Row(
        training.batch_size,
        training.num_steps,
        training.upper_lr,
        training.lower_lr,
        training.decay,
        training.lower_weight_decay,
        model.latent_dim,
        model.ratio,
        model.latent_weight,
        model.upper_kind,
        model.variant,
    )
    assert found == row
    assert training.betas == (0, 0.9)
    assert (training.schedule, training.lower_steps, training.order) == (
        "exponential",
        1,
        "upper_first",
    )
    assert model.ratio_bias == "none"
    assert (training.clip_upper, training.clip_lower, training.ema) == (None, None, None)


@pytest.mark.parametrize("name", SIZES)
def test_the_networks_have_their_published_sizes(name: str) -> None:
    model = on_meta(PRESETS[name])
    networks = (model.upper["energy"], model.lower["posterior"], model.lower["generator"])
    found = [parameter_count(network) for network in networks]
    assert tuple(found) == SIZES[name]


class Score(NamedTuple):
    """One row of the table of BiSM's and VaGES's hyper-parameters, in units of [0, 1] images."""

    steps: int
    lr: float
    final_lr: float
    sigma: float
    sigma_range: tuple[float, float]
    grid: str
    width: int
    blocks: int


MNIST = Score(100_000, 1e-4, 1e-6, 0.1, (0.1, 3.0), "geometric", 64, 2)
COLOUR = Score(300_000, 5e-5, 0.0, 0.1, (0.05, 1.2), "linear", 128, 3)
SCORES = {"bism-mnist": MNIST, "bism-cifar10": COLOUR, "bism-celeba": COLOUR}
SCORES |= {"vages-mnist": MNIST, "vages-cifar10": COLOUR, "vages-celeba64": COLOUR}
LATENT_LANGEVIN = {"vages-mnist": (5, 1e-2), "vages-cifar10": (5, 1e-2)}
LATENT_LANGEVIN["vages-celeba64"] = (50, 5e-4)


@pytest.mark.parametrize("name", SCORES)
def test_score_presets_are_the_published_settings(name: str) -> None:
    preset, row = PRESETS[name], SCORES[name]
    model, training = preset.model, preset.settings()
    halved = tuple(level / 2 for level in model["sigma_range"])  # images lie in [-1, 1] here
    found = Score(
        training.num_steps,
        training.upper_lr,
        pytest.approx(training.upper_lr * training.final_lr),  # type: ignore[arg-type]
        model["sigma"] / 2,
        halved,  # type: ignore[arg-type]
        model["grid"],
        model["width"],
        model["blocks"],
    )
    assert found == row
    assert training.lower_lr == training.upper_lr
    assert training.betas == (0.9, 0.95)
    assert (training.schedule, training.batch_size, training.lower_steps) == ("cosine", 100, 5)
    assert training.lower_weight_decay == 0
    assert model["latent_dim"] in (20, 50, 100)
    assert (model["objective"], model["divergence"]) == ("multiscale", "fisher")
    assert preset.method is (VaGES if name.startswith("vages") else BiSM)
    if preset.method is VaGES:
        assert model["num_samples"] == 2
        assert (model["latent_steps"], model["latent_rate"]) == LATENT_LANGEVIN[name]
        assert model["latent_noise"] == 1e-4
        assert training.ema == (None if name == "vages-mnist" else 0.999)


@pytest.mark.parametrize("name", FACES)
def test_faces_are_cut_as_published(name: str) -> None:
    crop, side = FACES[name]
    assert PRESETS[name].loading == {"crop": crop, "side": side}
    assert PRESETS[name].shape == (3, side, side)


def test_rivals_have_bidvls_settings_where_there_are_none() -> None:
    vae, advil = PRESETS["vae-cifar10"].settings(), PRESETS["advil-cifar10"].settings()
    for training in (vae, advil):
        assert (training.batch_size, training.num_steps) == (100, 300_000)
        assert (training.betas, training.decay) == ((0, 0.9), 0.998)
    assert vae.upper_lr == 3e-4
    assert (advil.upper_lr, advil.lower_lr, advil.lower_weight_decay) == (1e-4, 3e-4, 1e-4)
    assert (advil.lower_steps, advil.order) == (1, "upper_first")
    model = on_meta(PRESETS["advil-cifar10"])
    assert parameter_count(model.upper) == 8_701_633
    assert parameter_count(model.lower) == 2_780_024 + 4_452_963
    assert parameter_count(on_meta(PRESETS["vae-cifar10"])) == 2_780_024 + 4_452_963


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_every_preset_can_be_used(preset: Preset) -> None:
    assert preset.data in NAMES
    assert preset.training.keys() <= Training.model_fields.keys()
    assert preset.model.keys() <= {setting.name for setting in model_settings(preset.method)}
    assert preset.settings(seed=3).seed == 3
    assert preset.source
    model = on_meta(preset)
    assert type(model) is preset.method
    assert model.visible_shape == preset.shape
    with torch.device("meta"):
        again = type(model).from_recipe(model.recipe)
    assert again.recipe == model.recipe
    assert parameter_count(again) == parameter_count(model)


def test_every_published_experiment_has_a_preset() -> None:
    known = {*BIDVL, *SCORES, "vae-cifar10", "advil-cifar10"}
    assert known | {preset.name for preset in small.SMALL_EXPERIMENTS} == set(PRESETS)


@pytest.mark.parametrize("name", [p.name for p in small.SMALL_EXPERIMENTS])
def test_small_presets_train(name: str) -> None:
    preset = PRESETS[name]
    v = torch.rand(8, *preset.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    model = preset.build(width=4)
    settings = {**preset.training, "num_steps": 1, "batch_size": 4}
    assert model.fit(v, **settings).steps == 1


def test_the_small_rivals_have_bidvls_time_and_networks() -> None:
    bidvl, vae, advil = (PRESETS[name] for name in ("mnist", "vae-mnist", "advil-mnist"))
    times = {PRESETS[name].settings().max_seconds for name in ("mnist", "vae-mnist", "advil-mnist")}
    times.add(PRESETS["bism-mnist-small"].settings().max_seconds)
    assert len(times) == 1
    assert max(times) <= 20 * 60  # type: ignore[type-var]
    ours, theirs = on_meta(bidvl), on_meta(vae)
    assert parameter_count(theirs) == parameter_count(ours.lower)
    rival = on_meta(advil)
    assert isinstance(rival, AdvIL)
    assert parameter_count(rival.lower) == parameter_count(ours.lower)


def test_the_digits_are_what_they_were() -> None:
    assert (DIGITS.name, DIGITS.data, DIGITS.method) == ("digits", "digits", BiDVL)
    assert DIGITS.model == {"latent_dim": 16, "width": 16, "ratio": 0.1, "latent_weight": 0.15}
    training = DIGITS.settings()
    assert (training.num_steps, training.upper_lr, training.lower_lr) == (2000, 4e-3, 2e-3)
    assert (training.schedule, training.max_seconds) == ("cosine", 90)


def test_the_table_in_the_documentation_is_that_of_the_presets() -> None:
    rows = [
        f"| `{p.name}` | `{p.method.__name__}` | {p.about} | {p.source}"
        + (f". {p.note[0].upper()}{p.note[1:]}" if p.note else "")
        + " |"
        for p in PRESETS.values()
    ]
    shown = (DOCS / "presets.md").read_text(encoding="utf-8").splitlines()
    found = [line for line in shown if line.startswith("| `") and line.count("|") > 4]
    assert found == rows, "the rows should be\n" + "\n".join(rows)

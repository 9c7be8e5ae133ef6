"""Sampling, pictures as they are seen, and runs that go astray: what once went unremarked."""

import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from bilevel import Problem, train
from bilevel.methods import (
    RBM,
    AdvIL,
    BiSM,
    ContrastiveDivergence,
    GaussianRBM,
    MaximumLikelihood,
    ScoreMatching,
)
from bilevel.methods.data.images import load_images
from bilevel.methods.machines.enumeration import states
from tests.machines import machine as some_machine


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def bits(n: int, width: int) -> Tensor:
    return torch.bernoulli(torch.full((n, width), 0.4), generator=rng())


# ---------------------------------------------------------------------- samples of machines


def frozen(width: int = 6, hidden: int = 14) -> RBM:
    """A machine that never leaves the state it is in: all units on, or all off."""
    made = RBM(width, hidden)
    with torch.no_grad():
        made.weight.fill_(40.0)
        made.visible_bias.fill_(-20.0 * hidden)
        made.latent_bias.fill_(-20.0 * width)
    return made


def test_chains_begin_where_they_are_told() -> None:
    """`sample` began at fair coins and took 1,000 sweeps, whatever was asked."""
    learner = ContrastiveDivergence(frozen(), persistent=True)
    ones = torch.ones(4, 6)
    start = torch.cat([ones[:1], torch.zeros(1, 6)])
    drawn = learner.sample(4, rng(), start=start, sweeps=3)
    assert torch.equal(drawn, start.repeat(2, 1))
    with pytest.raises(ValueError, match="has no chains of its own"):
        learner.sample(2, rng(), start="chains")
    learner.chains = torch.ones(3, 14)
    before = learner.chains.clone()
    assert torch.equal(learner.sample(4, rng()), ones)  # the default, where there are any
    assert torch.equal(learner.sample(4, rng(), start="chains", sweeps=1), ones)
    assert torch.equal(learner.chains, before)
    coins = learner.sample(300, rng(), start="coins", sweeps=2).mean(1)
    assert 0.2 < float(coins.mean()) < 0.8
    assert torch.equal(learner.sample(9, rng(3), sweeps=2), learner.sample(9, rng(3), sweeps=2))


def test_the_number_of_sweeps_is_the_one_asked_for() -> None:
    learner = ContrastiveDivergence(RBM(5, 14))
    generator = rng(2)
    by_hand = learner.model.gibbs(learner.model.initial(7, generator), generator, 4)[0]
    assert torch.equal(learner.sample(7, rng(2), start="coins", sweeps=4), by_hand)


def test_small_machines_are_sampled_exactly() -> None:
    """Independent draws by enumeration: the frequencies of all states are the probabilities."""
    machine: Any = some_machine()
    learner = MaximumLikelihood(machine)
    v = states(4, 0, 16, torch.zeros((), dtype=torch.float64))
    truth = machine.log_likelihood(v).detach().exp()
    drawn = learner.sample(100_000, rng())
    found = (drawn @ (2.0 ** torch.arange(4, dtype=torch.float64))).long().bincount(minlength=16)
    # five standard errors of a frequency of 100,000 draws
    assert ((found / 100_000 - truth).abs() < 5 * (truth * (1 - truth) / 1e5).sqrt() + 1e-6).all()


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"start": "data"}, ValueError, "`start` cannot be 'data'"),
        ({"start": torch.full((2, 6), 7.0)}, ValueError, "exactly 0 or 1"),
        ({"start": "exact", "sweeps": 3}, ValueError, "leave one out"),
        ({"sweeps": 0}, ValueError, "`sweeps` must be positive"),
        ({"sweeps": 2.5}, TypeError, "`sweeps` must be an integer"),
        ({"n": 0}, ValueError, "`n` must be positive"),
    ],
)
def test_a_start_that_makes_no_sense_is_refused(
    arguments: dict[str, Any], error: type[Exception], words: str
) -> None:
    for learner in (ContrastiveDivergence(RBM(6, 3)), AdvIL(RBM(6, 3))):
        if isinstance(learner, AdvIL) and "n" not in arguments:
            arguments = {**arguments, "start": arguments.get("start", "coins")}
        with pytest.raises(error, match=words):
            learner.sample(**{"n": 2, "generator": rng(), **arguments})


def test_chains_are_for_machines() -> None:
    deep = ScoreMatching(nn.Sequential(nn.Linear(3, 1), nn.Flatten(0)), langevin=(1, 1, 1))
    with pytest.raises(ValueError, match="`sweeps` is for the Gibbs chains"):
        deep.sample(2, rng(), sweeps=3)
    assert BiSM(GaussianRBM(3, 2)).sample(4, rng(), start="coins", sweeps=2).shape == (4, 3)
    advil = AdvIL(frozen())
    assert torch.equal(advil.sample(2, rng(), start=torch.ones(1, 6), sweeps=2), torch.ones(2, 6))


# ---------------------------------------------------------------------- pictures as they are seen


def saved(folder: Path, name: str, picture: Any, **options: Any) -> None:
    folder.mkdir(exist_ok=True)
    for copy in range(5):
        picture.save(folder / f"{copy}{name}", **options)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_turned_as_a_viewer_turns_them(orientation: int, tmp_path: Path) -> None:
    """EXIF orientation was ignored: photographs were learned lying on their side."""
    pixels = np.zeros((16, 16), np.uint8)
    pixels[:4], pixels[:, :2] = 255, 128
    picture = Image.fromarray(pixels)
    exif = picture.getexif()
    exif[274] = orientation
    saved(tmp_path / "set", ".png", picture, exif=exif)
    images = load_images(tmp_path / "set")
    turns = {
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: pixels.T,
        6: np.rot90(pixels, -1),
        7: np.rot90(pixels, 2).T,
        8: np.rot90(pixels),
    }
    assert np.array_equal(images.train[0, 0].numpy(), turns[orientation])
    assert ("turned as their EXIF data say" in images.note) == (orientation > 1)


def test_transparent_pixels_are_white_and_told_of(tmp_path: Path) -> None:
    """What lies under transparent pixels, often black or noise, was taken for the picture."""
    pixels = np.full((8, 8, 4), 255, np.uint8)
    pixels[..., :3] = 40
    pixels[:4, :, 3] = 0
    pixels[4, :, 3] = 128
    whole = Image.fromarray(pixels)
    for kind, picture in {"rgba": whole, "la": whole.convert("LA"), "p": whole.quantize(8)}.items():
        saved(tmp_path / kind, ".png", picture)
        images = load_images(tmp_path / kind)
        first = images.train[0].float()
        assert (first[:, :4] == 255).all(), kind
        assert (first[:, 5:] - 40).abs().max() <= 1, kind
        if kind != "p":  # a palette knows no half
            assert (first[:, 4] - (40 * 128 + 255 * 127) / 255).abs().max() <= 1
        assert "5 with transparent pixels, laid on white" in images.note
    opaque = np.full((8, 8, 4), 255, np.uint8)
    saved(tmp_path / "opaque", ".png", Image.fromarray(opaque))
    assert "transparent" not in load_images(tmp_path / "opaque").note


def test_other_kinds_of_pictures_are_right_or_refused(tmp_path: Path) -> None:
    red = Image.new("RGB", (8, 8), (200, 30, 40))
    saved(tmp_path / "palette", ".png", red.quantize(4))
    assert load_images(tmp_path / "palette").train[0, :, 0, 0].tolist() == [200, 30, 40]
    saved(tmp_path / "cmyk", ".jpg", red.convert("CMYK"), quality=100)
    found = load_images(tmp_path / "cmyk").train[0, :, 3, 3].float()
    assert (found - torch.tensor([200.0, 30.0, 40.0])).abs().max() < 6  # of JPEG
    deep = Image.fromarray(np.full((8, 8), 40_000, np.uint16))
    saved(tmp_path / "deep", ".png", deep)
    with pytest.raises(ValueError, match="more than 8 bits per pixel"):
        load_images(tmp_path / "deep")
    frames = [Image.new("RGB", (8, 8), (value,) * 3) for value in (10, 250)]
    saved(
        tmp_path / "moving",
        ".webp",
        frames[0],
        save_all=True,
        append_images=frames[1:],
        lossless=True,
    )
    images = load_images(tmp_path / "moving")
    assert images.train[0, 0, 0, 0] == 10
    assert "5 of several frames, of which the first was taken" in images.note


# ---------------------------------------------------------------------- runs that go astray


def remarks(learner: Any, data: Tensor, **settings: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        learner.fit(data, **settings)
    return [str(each.message) for each in said]


def test_numbers_that_run_away_are_remarked() -> None:
    """A rate of 1e30 gave finite energies of 1e30, and nothing was said."""
    data = bits(50, 6)
    for steps, words in ((1, "the largest variable is 1e+30"), (5, "at step 2 the upper loss")):
        said = remarks(
            ContrastiveDivergence(RBM(6, 3)), data, num_steps=steps, upper_lr=1e30, batch_size=10
        )
        assert len(said) == 1, said
        assert words in said[0]
        assert "learning rates" in said[0]
    assert not remarks(ContrastiveDivergence(RBM(6, 3)), data, num_steps=50, batch_size=10)


def test_the_remark_names_the_level_and_is_made_once() -> None:
    """Both levels are watched, in the core too; a large loss that was large at first is none."""

    def run(scale: float, rate: float) -> list[str]:
        problem = Problem.from_functions(
            lambda x, y, _: scale * (x["x"] - y["y"]) ** 2,
            lambda x, y, _: (y["y"] - x["x"]) ** 2,
            {"x": torch.tensor(1.0, dtype=torch.float64)},
            {"y": torch.tensor(0.0, dtype=torch.float64)},
        )
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for _ in train(
                problem,
                num_steps=8,
                lower_steps=2,
                upper_optimizer=torch.optim.SGD(problem.upper.parameters(), 1e-30),
                lower_optimizer=torch.optim.SGD(problem.lower.parameters(), rate),
            ):
                pass
        return [str(each.message) for each in said if each.category is RuntimeWarning]

    assert not run(1e20, 0.1)
    said = run(1.0, 1e3)
    assert len(said) == 1
    assert "the lower loss is" in said[0] or "the upper loss is" in said[0]
    assert math.isfinite(float(said[0].split(" is ")[1].split(",")[0]))

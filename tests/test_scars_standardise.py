"""Real data as they come: trained in standard units, answered in their own, never silently unscaled."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bilevel.methods import (
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
from bilevel.methods.training.standardising import Units
from bilevel.methods.variational import GaussianPosterior

D = 3
MEAN = torch.tensor([50.0, -3.0, 0.25], dtype=torch.float64)
DEVIATION = torch.tensor([10.0, 0.5, 3.0], dtype=torch.float64)
UNITS = Units(MEAN, DEVIATION)
EXACT = {"rtol": 1e-10, "atol": 1e-10}


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows(n: int = 200, seed: int = 0) -> Tensor:
    return MEAN + DEVIATION * torch.randn(n, D, generator=rng(seed), dtype=torch.float64)


MODELS: dict[str, Callable[[], Any]] = {
    "cd": lambda: ContrastiveDivergence(GaussianRBM(D, 4)),
    "maximum likelihood of a dbm": lambda: MaximumLikelihood(GaussianDBM(D, (4, 2))),
    "cd at a fixed scale": lambda: ContrastiveDivergence(GaussianRBM(D, 4, learn_scale=False)),
    "nce": lambda: NoiseContrastive(GaussianRBM(D, 4)),
    "score matching": lambda: ScoreMatching(GaussianRBM(D, 4)),
    "bism": lambda: BiSM(GaussianRBM(D, 4)),
    "vages": lambda: VaGES(GaussianRBM(D, 4)),
    "advil": lambda: AdvIL(GaussianRBM(D, 4)),
    "general bidvl": lambda: GeneralBiDVL.for_model(GaussianRBM(D, 4)),
    "vae": lambda: VAE.for_table(D, 2, hidden=[5], visible="gaussian"),
}


def stirred(name: str) -> Any:
    """A model with weights, biases and scales that are all moved from where they start."""
    model, generator = MODELS[name]().double().eval(), rng(5)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return model


@pytest.mark.parametrize("name", MODELS)
def test_a_rewritten_model_is_that_of_the_datas_units(name: str) -> None:
    """p(v) = p(z) / prod d, samples and reconstructions are m + d z, posteriors are the same."""
    standard, own = stirred(name), stirred(name)
    UNITS.leave(own)
    v = rows(40)
    z = (v - MEAN) / DEVIATION
    jacobian = float(DEVIATION.log().sum())
    difference = own.energy(v) - standard.energy(z)
    expected = torch.full_like(difference, jacobian if name == "vae" else 0.0)
    torch.testing.assert_close(difference, expected, **EXACT)
    if name == "vae":
        both = [m.log_likelihood(x, 20, rng()) for m, x in ((own, v), (standard, z))]
    else:
        both = [m.model.log_likelihood(x) for m, x in ((own, v), (standard, z))]
    torch.testing.assert_close(both[0], both[1] - jacobian, **EXACT)
    drawn = [m.sample(9, rng()) for m in (own, standard)]
    torch.testing.assert_close(drawn[0], MEAN + DEVIATION * drawn[1], **EXACT)
    torch.testing.assert_close(own.posterior(v).mean, standard.posterior(z).mean, **EXACT)
    mended = [m.reconstruct(x) for m, x in ((own, v), (standard, z))]
    torch.testing.assert_close(mended[0], MEAN + DEVIATION * mended[1], **EXACT)
    if isinstance(own, NoiseContrastive):  # it estimates log Z, which has the Jacobian too
        gained = (own.log_normalizer - standard.log_normalizer).item()
        assert gained == pytest.approx(jacobian, abs=1e-12)
    if name in ("advil", "general bidvl", "bism", "vages"):  # the posterior that was learned
        encoders = [m.lower["posterior"].distribution(x).mean for m, x in ((own, v), (standard, z))]
        torch.testing.assert_close(*encoders, **EXACT)
    UNITS.enter(own)
    for mine, theirs in zip(own.parameters(), standard.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, **EXACT)


@pytest.mark.parametrize("name", MODELS)
def test_training_in_standard_units_is_training_on_standardised_rows(name: str) -> None:
    """Step for step the run on rows that were standardised by hand, then rewritten."""
    data = rows()
    deviation, mean = torch.std_mean(data, 0, correction=0)
    settings: dict[str, Any] = {"num_steps": 4, "batch_size": 50}
    by_hand, own = stirred(name), stirred(name)
    by_hand.fit((data - mean) / deviation, **settings)
    own.fit(data, standardise=True, **settings)
    Units(mean, deviation).leave(by_hand)
    for mine, theirs in zip(own.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, **EXACT)


def gaussian(data: Tensor, test: Tensor) -> float:
    """The mean log-likelihood of one Gaussian per column."""
    deviation, mean = torch.std_mean(data, 0, correction=0)
    squares = ((test - mean) / deviation).square()
    log_density = -0.5 * squares - deviation.log() - 0.5 * math.log(2 * math.pi)
    return float(log_density.sum(1).mean())


@pytest.mark.parametrize("make", [ContrastiveDivergence, MaximumLikelihood])
def test_unscaled_data_are_learned_as_well_as_scaled_ones(make: Any) -> None:
    """The likelihood was 195 nats below that of one Gaussian per column, without a word."""
    data, test = rows(500).float(), rows(500, seed=1).float()
    learner = make(GaussianRBM(D, 4))
    learner.fit(data, num_steps=400, upper_lr=2e-2, standardise=True)
    with torch.no_grad():
        found = float(learner.model.log_likelihood(test).mean())
    assert found == pytest.approx(gaussian(data, test), abs=0.15)
    drawn = learner.sample(4000, rng())
    # within 0.3 deviations of what CD-1 leaves to learn, far below the 5 deviations of unscaled data
    assert (((drawn.mean(0) - MEAN) / DEVIATION).abs() < 0.3).all()
    assert ((drawn.std(0) / DEVIATION - 1).abs() < 0.3).all()


def test_training_goes_on_from_where_it_was() -> None:
    """A second `fit` takes the model over to the units of its rows, instead of rewriting it twice."""
    learner = MaximumLikelihood(GaussianRBM(D, 4).double())
    learner.fit(rows(), num_steps=300, upper_lr=2e-2, standardise=True)
    before = learner.energy(rows(50, 3)).clone()
    learner.fit(rows(seed=2), num_steps=1, upper_lr=1e-12, standardise=True)
    # one step of 1e-12 in each parameter of the standard units
    torch.testing.assert_close(learner.energy(rows(50, 3)), before, rtol=1e-8, atol=1e-8)


def test_runs_evaluations_and_files_are_in_the_datas_units(tmp_path: Path) -> None:
    data, test = rows(), rows(100, seed=1)
    seen: list[float] = []

    def likelihood(model: Any) -> dict[str, float]:
        with torch.no_grad():
            seen.append(float(model.model.log_likelihood(test).mean()))
        return {"log_likelihood": seen[-1]}

    def made() -> Any:
        return MaximumLikelihood(GaussianRBM(D, 4).double())

    settings: dict[str, Any] = {
        "upper_lr": 0.01,
        "standardise": True,
        "evaluate": likelihood,
        "evaluate_every": 10,
        "checkpoint_every": 10,
    }
    whole = made()
    whole.fit(data, num_steps=20, run=tmp_path / "whole", **settings)
    with torch.no_grad():
        assert seen[-1] == pytest.approx(float(whole.model.log_likelihood(test).mean()), abs=1e-9)
    for folder in ("model", "best"):
        loaded = MaximumLikelihood.load(tmp_path / "whole" / folder)
        assert loaded.standardised
        torch.testing.assert_close(loaded.energy(test), whole.energy(test), **EXACT)
    stopped = made()
    with pytest.raises(KeyboardInterrupt):
        stopped.fit(data, num_steps=20, run=tmp_path / "part", callbacks=[stop_at(15)], **settings)
    resumed = made()
    resumed.fit(data, num_steps=20, run=tmp_path / "part", resume=True, **settings)
    assert torch.equal(resumed.energy(test), whole.energy(test))


def stop_at(number: int) -> Callable[[Any], None]:
    def stop(step: Any) -> None:
        if step.number == number:
            raise KeyboardInterrupt

    return stop


def test_whoever_looks_on_the_way_is_told(tmp_path: Path) -> None:
    """The model in training is that of standardised rows: it takes no others, and says so."""
    learner = ContrastiveDivergence(GaussianRBM(D, 4).double())

    def look(step: Any) -> None:
        copied = copy.deepcopy(learner)
        with pytest.raises(RuntimeError, match="being trained on standardised rows"):
            learner.energy(rows())
        copied.in_data_units()
        learner.save(tmp_path)
        saved = ContrastiveDivergence.load(tmp_path)
        assert torch.equal(saved.energy(rows()), copied.energy(rows()))

    learner.fit(rows(), num_steps=2, callbacks=[look], standardise=True)
    with pytest.raises(ZeroDivisionError):
        learner.fit(rows(), num_steps=2, callbacks=[lambda _: 1 / 0], standardise=True)
    assert learner.units is None  # back in the data's units, whatever ended it
    learner.energy(rows())


def test_what_was_seen_is_said_once() -> None:
    data = rows().float()
    with pytest.warns(UserWarning, match=r"means from -3.* to 50 and .*`standardise=True`") as said:
        ContrastiveDivergence(GaussianRBM(D, 4)).fit(data, num_steps=2)
    assert len(said) == 1
    still = torch.cat([(data - MEAN.float()) / DEVIATION.float(), torch.full((200, 1), 2.0)], 1)
    with pytest.warns(UserWarning, match="column 3 is constant"):
        ContrastiveDivergence(GaussianRBM(D + 1, 4)).fit(still, num_steps=2)
    with pytest.raises(ValueError, match="column 3 is constant"):
        ContrastiveDivergence(GaussianRBM(D + 1, 4)).fit(still, num_steps=2, standardise=True)
    ContrastiveDivergence(GaussianRBM(D, 4)).fit(still[:, :D], num_steps=2)  # no warning


@pytest.mark.parametrize(
    "make",
    [
        lambda: ContrastiveDivergence(RBM(D, 2)),
        lambda: BiDVL.for_images((1, 8, 8), latent_dim=2, width=2),
        lambda: VAE(Halves(), nn.Linear(2, D), 2),
        lambda: BiSM(GaussianRBM(D, 4), own_posterior()),
    ],
)
def test_models_that_cannot_be_rewritten_refuse(make: Callable[[], Any]) -> None:
    model = make()
    data = torch.zeros(20, *(model.visible_shape or (D,)))
    with pytest.raises(ValueError, match="leave it out and scale"):
        model.fit(data, num_steps=1, batch_size=10, standardise=True)


class Halves(nn.Module):
    """A network of somebody's own, of which nothing is known."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(D, 4)

    def forward(self, v: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_variance = self.layer(v).chunk(2, dim=1)
        return mean, log_variance


def own_posterior() -> GaussianPosterior:
    return GaussianPosterior(Halves(), 2)

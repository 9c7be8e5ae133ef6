"""Noise-contrastive estimation: its gradient at the truth, its noise, and what it finds."""

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from bilevel.methods.models import RBM, GaussianRBM
from bilevel.methods.noise_contrastive import Batch as NoiseBatch
from bilevel.methods.noise_contrastive import NoiseContrastive
from tests.methods.small_models import (
    EXACT,
    MACHINES,
    assert_distributed,
    bits,
    data_for,
    gradient,
    loss_of,
    machine,
)
from tests.problems import generator


@pytest.mark.parametrize("ratio", [1, 3])
@pytest.mark.parametrize("name", ["RBM", "DBM"])
def test_noise_contrastive_gradient_vanishes_at_the_truth(name: str, ratio: int) -> None:
    """At c = log Z, data and noise in expectation by enumeration; and nowhere near it."""
    model = MACHINES[name]()
    learner = NoiseContrastive(model, ratio)
    learner.draw(data_for(model), generator())
    v = bits(4)
    with torch.no_grad():
        log_z = model.log_partition()
        learner.log_normalizer.copy_(log_z)
        p = model.log_likelihood(v).exp()
        offset = learner._offset(v)
    noise = offset.exp() / ratio
    assert float(noise.sum()) == pytest.approx(1, abs=1e-12)

    def expected() -> dict[str, Tensor]:
        losses = [
            loss_of(learner, NoiseBatch(v[s][None], v[t][None], offset[s][None], offset[t][None]))
            for s in range(16)
            for t in range(16)
        ]
        return gradient(learner, (p[:, None] * noise).flatten() @ torch.stack(losses))

    for value in expected().values():
        torch.testing.assert_close(value, torch.zeros_like(value), rtol=0, atol=1e-12)
    with torch.no_grad():
        learner.log_normalizer.add_(0.1)
    assert all(float(value.abs().max()) > 1e-4 for value in expected().values())


def test_noise_is_what_its_log_probability_says() -> None:
    binary = NoiseContrastive(MACHINES["RBM"](), ratio=20_000)
    batch = binary.draw(data_for(binary.model, 5), generator())
    with torch.no_grad():
        p = binary._offset(bits(4)).exp() / 20_000
    assert_distributed(batch.noise, p)
    assert batch.noise_offset.shape == (100_000,)
    real = NoiseContrastive(MACHINES["GaussianRBM"](), ratio=2)
    batch = real.draw(data_for(real.model, 5), generator())
    normal_ = MultivariateNormal(torch.zeros(2).double(), torch.eye(2).double())
    for rows, offset in ((batch.visible, batch.visible_offset), (batch.noise, batch.noise_offset)):
        torch.testing.assert_close(offset, normal_.log_prob(rows) + math.log(2), **EXACT)
    assert batch.noise.shape == (10, 2)


def test_noise_rates_are_the_mean_of_all_rows_seen() -> None:
    learner = NoiseContrastive(MACHINES["RBM"]())
    rows, source = data_for(learner.model, 30), generator()
    for part in rows.split(7):
        learner.draw(part, source)
    wanted = (rows.sum(0) + 1) / (30 + 2)
    torch.testing.assert_close(learner.rates, wanted, **EXACT)
    assert int(learner.seen) == 32


def test_grey_data_become_bits_for_the_classifier() -> None:
    learner = NoiseContrastive(RBM(4, 3, grey=True).double())
    grey = torch.full((40_000, 4), 0.3).double()
    batch = learner.draw(grey, generator())
    assert batch.visible.unique().tolist() == [0, 1]
    assert float(batch.visible.mean()) == pytest.approx(0.3, abs=0.005)
    plain = NoiseContrastive(RBM(4, 3).double())
    data = data_for(plain.model)
    assert plain.draw(data, generator()).visible is data


def test_noise_contrastive_finds_model_and_normaliser() -> None:
    """Data of a Gaussian RBM: c near log Z of the machine it ends at."""
    truth = machine(GaussianRBM, 2, 2, seed=5)
    data = truth.gibbs(truth.initial(20_000, generator()), generator(), steps=30)[0]
    learner = NoiseContrastive(GaussianRBM(2, 2).double())
    learner.fit(data, num_steps=500, batch_size=500, upper_lr=2e-2)
    with torch.no_grad():
        gap = truth.log_likelihood(data).mean() - learner.model.log_likelihood(data).mean()
        drift = learner.log_normalizer - learner.model.log_partition()
    assert float(gap) < 0.02
    assert abs(float(drift)) < 0.1

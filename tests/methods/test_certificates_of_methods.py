"""`fit(certify_every=...)`: what is recorded, and a model that is the same without."""

import warnings

import pytest
import torch

from tests.small_learners import MODELS


@pytest.mark.parametrize("name", ["vages", "nce"])
def test_a_training_may_be_looked_at(name: str) -> None:
    make, data = MODELS[name]
    weights, lines = [], []
    for every in (2, None):
        torch.manual_seed(0)
        model = make()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # it may be suspect
            history = model.fit(
                data(), num_steps=3, batch_size=4, certify_every=every, log_every=3, progress=False
            )
        weights.append(model.state_dict())
        lines.append(history.records)
    assert all(torch.equal(weights[0][n], w) for n, w in weights[1].items())
    looked, plain = lines
    assert [line["step"] for line in looked] == [2, 3]
    assert 0 < looked[0]["certificate.cosine"] <= 1
    assert 0 < looked[0]["certificate.share"] < 1
    assert [line["step"] for line in plain] == [3]
    assert "certificate.cosine" not in plain[0]

"""A run that goes on with other settings."""

import pytest
import torch

from bilevel import CheckpointError
from bilevel.methods import EBLVM, RBM, AdvIL
from bilevel.methods.training.run import Run
from tests.runs import assert_equal


def tiny() -> EBLVM:
    torch.manual_seed(0)
    return AdvIL(RBM(6, 3))


ROWS = (torch.rand(20, 6, generator=torch.Generator().manual_seed(0)) < 0.5).float()
BEGUN = {"num_steps": 3, "batch_size": 5, "upper_lr": 0.02, "log_every": 1, "checkpoint_every": 1}


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"upper_lr": 0.5}, r"`upper_lr` was 0\.02, is 0\.5; leave them out to resume it"),
        ({"batch_size": 10, "seed": 3}, "`batch_size` was 5, is 10; `seed` was 0, is 3"),
        ({"lower_steps": 2}, "`lower_steps` was 5, is 2"),
        ({"ema": 0.9}, "`ema` was None, is 0.9"),
        ({"schedule": "cosine"}, "`schedule` was 'exponential', is 'cosine'"),
    ],
)
def test_settings_that_a_resumed_run_would_ignore_are_refused(changes, match, tmp_path):
    """Three rates gave equal energies: the checkpoint's rate was taken, without a word."""
    tiny().fit(ROWS, run=tmp_path, **BEGUN)
    before = Run(tmp_path).config()
    with pytest.raises(CheckpointError, match=match):
        tiny().fit(ROWS, run=tmp_path, resume=True, **{**BEGUN, "num_steps": 6, **changes})
    assert Run(tmp_path).config() == before


def test_a_run_is_made_longer_and_keeps_its_settings(tmp_path):
    """What is left out is the run's own, not the default; a longer run is the same to the bit."""
    whole, again = tiny(), tiny()
    whole.fit(ROWS, **{**BEGUN, "num_steps": 5})
    assert tiny().fit(ROWS, run=tmp_path, **BEGUN).total == 3
    history = again.fit(ROWS, run=tmp_path, resume=True, num_steps=5, keep_checkpoints=2)
    assert_equal(again, whole)
    assert (history.steps, history.total) == (2, 5)
    assert [record["step"] for record in history.records] == [1, 2, 3, 4, 5]
    done = tiny().fit(ROWS, run=tmp_path, resume=True, num_steps=5)
    assert (done.steps, done.total) == (0, 5)
    with pytest.raises(
        ValueError, match="after 5 steps, but `num_steps`, the steps in total, is 3"
    ):
        tiny().fit(ROWS, run=tmp_path, resume=True, num_steps=3)

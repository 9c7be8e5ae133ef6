"""The moving average of a run: what is trained, evaluated and resumed."""

from typing import Any

import torch
from torch import Tensor

from bilevel.checkpoint import read_checkpoint
from bilevel.methods import EBLVM, BiDVL
from tests.runs import assert_equal, by_weights, made, trained


def averages(settings: dict[str, Any], decay: float) -> tuple[EBLVM, dict[str, Tensor]]:
    """The model after training, and the average computed by hand."""
    model = made()
    mean = {name: p.detach().clone() for name, p in model.named_parameters()}

    def follow(step: Any) -> None:
        for name, p in step.state.problem.named_parameters():
            mean[name] = decay * mean[name] + (1 - decay) * p.detach()

    trained(model, **settings, ema=decay, callbacks=[follow])
    return model, mean


def test_the_trained_model_is_the_moving_average():
    model, mean = averages({"upper_lr": 1e-2, "lower_lr": 1e-2}, 0.8)
    assert not model.training
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), mean[name], rtol=1e-5, atol=1e-7)


def test_evaluations_see_the_moving_average(tmp_path):
    model = made()
    history = trained(model, tmp_path, evaluate=by_weights, evaluate_every=6, ema=0.8)
    assert history.evaluations[-1]["frechet"] == by_weights(model)["frechet"]


def test_a_resumed_average_equals_the_uninterrupted_one(tmp_path):
    whole, first, again, once_more = made(), made(), made(), made()
    trained(whole, ema=0.8)
    trained(first, tmp_path, ema=0.8, callbacks=[lambda step: step.number == 4])
    raw = read_checkpoint(tmp_path / "checkpoints" / "last.pt")["problem"]
    mean = first.state_dict()  # the checkpoint goes on from other weights
    assert any(not torch.equal(raw[name], mean[name]) for name in mean)
    trained(again, tmp_path, ema=0.8, resume=True)
    assert_equal(again, whole)
    trained(once_more, tmp_path, ema=0.8, resume=True)  # there is nothing left to train
    assert_equal(once_more, whole)
    assert_equal(BiDVL.load(tmp_path / "model"), whole)

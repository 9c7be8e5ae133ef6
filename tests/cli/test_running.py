"""A planned run on the command line: evaluated, advised, or only counted."""

import copy
import inspect
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from bilevel import Alternating
from bilevel.cli.dry_run import dry_run
from bilevel.cli.options import UsageError
from bilevel.cli.running import LOOK, Plan, carry_out
from bilevel.methods import EBLVM, BiDVL
from bilevel.methods.data.images import Images
from bilevel.methods.evaluation.evaluate import evaluate
from bilevel.methods.evaluation.features import FeatureNetwork
from bilevel.methods.training.run import Run
from tests.runs import SHAPE, SHORT, assert_equal, by_weights, data, greedy


def plan(folder: Path, **settings: Any) -> Plan:
    images = Images("noise", "noise.npz", data(100), data(70), None, None, "made up")
    model = BiDVL.for_images(images.shape, latent_dim=2, width=4)
    features = FeatureNetwork("pixels", nn.Flatten(), dim=64)
    every = {**SHORT, **settings}
    return Plan(model, images, Run(folder), every, Alternating(), features=features)


def test_the_command_line_evaluates_and_keeps_the_best(tmp_path, capsys, monkeypatch):
    planned = plan(tmp_path / "r", evaluate_every=3)

    def look(model: EBLVM, *arguments: Any, **options: Any) -> dict[str, float]:
        assert model is not planned.model
        given = inspect.signature(evaluate).bind(model, *arguments, **options).arguments
        assert (given["features"], given["samples"]) == (planned.features, LOOK)
        return by_weights(model)

    monkeypatch.setattr("bilevel.cli.running.evaluate", look)
    assert carry_out(planned, report=False) == 0
    run = Run(tmp_path / "r")
    assert [record["step"] for record in run.evaluations()] == [3, 6]
    assert BiDVL.load(run.best_path).sample(2).shape == (2, *SHAPE)
    assert "pixels, 64 features" in run.config()["notes"]["evaluations"]["features"]
    assert "[frechet " in capsys.readouterr().out


def test_the_command_line_gives_the_advice(line, tmp_path):
    wanting = plan(tmp_path / "r")
    greedy(wanting.model, step=1)
    with pytest.raises(UsageError, match="out of memory at `batch_size` 10"):
        carry_out(wanting, report=False)


def test_a_dry_run_tells_the_cost_and_writes_nothing(line, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("bilevel.cli.dry_run.available", lambda device: 2 * 10**4)
    planned = plan(tmp_path / "r", num_steps=300_000, batch_size=100)
    before = copy.deepcopy(planned.model)
    assert dry_run(planned) == 0
    out = capsys.readouterr().out
    for words in (
        "BiDVL, Alternating()",
        "num_steps 300000",
        "noise: 100 of 1x8x8",
        "1,709  energy",
        "5e+08 a step, 1.5e+14 the whole run",
        "0.014 MB  at the worst moment",
        "too little; a `--batch-size` of",
        "2 s  at 100 TFLOP/s",
        "nothing was written",
    ):
        assert words in out
    assert not list(tmp_path.iterdir())
    assert_equal(planned.model, before)
    with pytest.raises(ValueError, match="only 100 visibles"):
        dry_run(plan(tmp_path, batch_size=101))

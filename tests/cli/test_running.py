"""A planned run on the command line: evaluated, advised, or only counted."""

import copy
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from bilevel import Alternating
from bilevel.cli.dry_run import dry_run
from bilevel.cli.options import UsageError
from bilevel.cli.progress import duration
from bilevel.cli.running import LOOK, Plan, carry_out
from bilevel.methods import BiDVL
from bilevel.methods.data.images import Images
from bilevel.methods.evaluation.evaluate import evaluate
from bilevel.methods.evaluation.features import FeatureNetwork
from bilevel.methods.training.footprint import bytes_in_words, footprint, largest_batch
from bilevel.methods.training.run import Run
from tests.runs import SHORT, assert_equal, data, greedy, made, small


def plan(
    folder: Path, model: BiDVL | None = None, log_to: Sequence[str] = (), **settings: Any
) -> Plan:
    images = Images("noise", "noise.npz", data(100), data(70), None, None, "made up")
    model = made() if model is None else model
    features = FeatureNetwork("pixels", nn.Flatten(), dim=64)
    every = {**SHORT, **settings}
    run = Run(folder)
    return Plan(model, images, run, every, Alternating(), features=features, log_to=[*log_to])


def test_the_command_line_evaluates_and_keeps_the_best(tmp_path, capsys):
    planned = plan(tmp_path / "r", evaluate_every=3)
    assert carry_out(planned, report=False) == 0
    run = Run(tmp_path / "r")
    first, last = run.evaluations()
    assert (first["step"], last["step"]) == (3, 6)
    own = {"features": planned.features, "samples": LOOK}
    again = evaluate(planned.model, planned.images, planned.training.seed, **own)
    assert again == {name: value for name, value in last.items() if name in again}
    best = evaluate(BiDVL.load(run.best_path), planned.images, planned.training.seed, **own)
    assert best["frechet"] == min(first["frechet"], last["frechet"])
    assert "pixels, 64 features" in run.config()["notes"]["evaluations"]["features"]
    assert "[frechet " in capsys.readouterr().out


def test_log_to_refuses_a_missing_package_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match=r"pip install 'bilevel\[wandb\]'"):
        carry_out(plan(tmp_path / "r", small(), log_to=["wandb"]), report=False)
    assert not (tmp_path / "r").exists()


def test_log_to_goes_to_the_folder_of_the_run(tmp_path, monkeypatch):
    made: Any = types.ModuleType("torch.utils.tensorboard")
    said: list[Any] = []

    class Writer:
        def __init__(self, folder: str, purge_step: int | None) -> None:
            said.append(folder)

        def __getattr__(self, name: str) -> Any:
            return lambda *args: said.append((name, *args))

    made.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", made)
    planned = plan(tmp_path / "r", small(), log_to=["tensorboard"], max_seconds=1e-9)
    assert carry_out(planned, report=False) == 0
    assert said[0] == str(tmp_path / "r" / "tensorboard")
    assert {"add_text", "add_scalar", "add_images"} <= {call[0] for call in said[1:]}
    assert planned.run.config()["notes"]["log_to"] == ["tensorboard"]
    assert planned.run.stopped() == "stopped by the clock (`max_seconds` 1e-09) at step 1 of 6"


def test_the_command_line_gives_the_advice(tmp_path):
    wanting = plan(tmp_path / "r", small())
    greedy(wanting.model, step=1)
    with pytest.raises(UsageError, match="out of memory at `batch_size` 10"):
        carry_out(wanting, report=False)


def test_a_dry_run_tells_the_cost_and_writes_nothing(tmp_path, capsys):
    planned = plan(tmp_path / "r", small(), num_steps=300_000, batch_size=100)
    before = copy.deepcopy(planned.model)
    cost = footprint(planned.model, 100, training=planned.training)
    there, room_for_data = 300_000, 100 * 64 * 4
    fits = largest_batch(planned.model, 270_000 - room_for_data, training=planned.training)
    assert 50 < fits < 100
    assert dry_run(planned, there=there) == 0
    out = capsys.readouterr().out
    for words in (
        "BiDVL, Alternating()",
        "num_steps 300000",
        "noise: 100 of 1x8x8",
        "199  energy",
        f"{cost.operations:.3g} a step, {3e5 * cost.operations:.2g} the whole run",
        f"{bytes_in_words(cost.total)}  at the worst moment",
        f"0.3 MB  there is on cpu: too little; a `--batch-size` of {fits} would fit",
        f"{duration(3e5 * cost.operations / 1e14)}  at 100 TFLOP/s",
        "nothing was written",
    ):
        assert words in out
    assert not list(tmp_path.iterdir())
    assert_equal(planned.model, before)
    with pytest.raises(ValueError, match="only 100 visibles"):
        dry_run(plan(tmp_path, batch_size=101))

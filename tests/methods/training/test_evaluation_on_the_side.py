"""Evaluation on the side of a run, and the best model it keeps."""

import copy
import json
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from bilevel import CheckpointError
from bilevel.checkpoint import read_checkpoint
from bilevel.methods import EBLVM, BiDVL
from bilevel.methods.training.best import criterion_of
from bilevel.methods.training.run import Run
from tests.runs import assert_equal, by_weights, data, made, timeless, trained


def told(values: dict[str, list[float]]) -> Callable[[EBLVM], dict[str, float]]:
    """An evaluation that gives these numbers, one after the other."""
    series = iter(
        [dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True)]
    )
    return lambda model: next(series)


# ---------------------------------------------------------------------- evaluation on the side


def rude(model: EBLVM) -> dict[str, float]:
    """Everything an evaluation must not be able to spoil."""
    torch.manual_seed(torch.randint(1000, ()).item())
    model.statistics = "batch"
    model.sample(5)
    model.reconstruct(data(4))
    model.train()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.mul_(2)
    return {"frechet": 1.0}


def test_a_run_with_evaluations_equals_one_without_to_the_bit():
    without, evaluated = made(), made()
    torch.manual_seed(5)
    plain = trained(without)
    after = torch.rand(3)
    torch.manual_seed(5)
    history = trained(evaluated, evaluate=rude, evaluate_every=2)
    assert torch.equal(torch.rand(3), after)
    assert_equal(without, evaluated)
    assert timeless(plain.records) == timeless(history.records)
    assert [record["step"] for record in history.evaluations] == [2, 4, 6]


def test_the_clock_stands_still_during_an_evaluation():
    def slow(model: EBLVM) -> dict[str, float]:
        time.sleep(0.2)
        return {}

    began = time.perf_counter()
    history = trained(made(), evaluate=slow, evaluate_every=2)
    assert history.seconds <= time.perf_counter() - began - 0.6


def test_evaluations_are_written_with_their_step(tmp_path):
    numbers = {"rmse": [0.5, 0.4, 0.3], "auroc": [0.1, 0.2, 0.3]}
    history = trained(made(), tmp_path, evaluate=told(numbers), evaluate_every=2)
    assert Run(tmp_path).evaluations() == history.evaluations
    assert timeless(history.evaluations)[1] == {"step": 4, "rmse": 0.4, "auroc": 0.2}


def test_an_evaluation_needs_a_rhythm_and_a_rhythm_an_evaluation():
    with pytest.raises(ValueError, match="`evaluate_every` is given, but not `evaluate`"):
        trained(made(), evaluate_every=2)
    with pytest.raises(ValueError, match="`evaluate` is given, but not `evaluate_every`"):
        trained(made(), evaluate=rude)


def test_a_failing_evaluation_names_its_step(tmp_path):
    def fails(model: EBLVM) -> dict[str, float]:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as caught:
        trained(made(), tmp_path, evaluate=fails, evaluate_every=3)
    assert caught.value.__notes__ == ["in the evaluation after step 3"]
    assert read_checkpoint(tmp_path / "checkpoints" / "last.pt")["step"] == 2


# ---------------------------------------------------------------------- the best model


def test_the_model_with_the_lowest_distance_is_kept(tmp_path):
    snapshots = {}

    def keep(step: Any) -> None:
        snapshots[step.number] = copy.deepcopy(step.state.problem)

    numbers = {"frechet": [3.0, 1.0, 2.0], "rmse": [0.3, 0.2, 0.1]}
    trained(made(), tmp_path, evaluate=told(numbers), evaluate_every=2, callbacks=[keep])
    assert_equal(BiDVL.load(tmp_path / "best"), snapshots[4])
    said = json.loads((tmp_path / "best" / "best.json").read_text())
    assert said["step"] == said["evaluation"]["step"] == 4
    assert said["evaluation"]["frechet"] == 1.0
    assert "lowest `frechet`" in said["rule"]


@pytest.mark.parametrize(
    ("numbers", "step"),
    [
        ({"rmse": [0.3, 0.2, 0.25]}, 4),
        ({"frechet": [float("nan"), 2.0, 1.0]}, 6),
        ({"frechet": [2.0, 2.0, 2.0]}, 2),
        ({"auroc": [0.3, 0.5, 0.25]}, 4),
        ({"temperature": [0.3, 0.2, 0.25]}, None),
    ],
    ids=["by rmse", "not a number", "the first of equal ones", "the highest", "nothing to go by"],
)
def test_the_rule_of_the_best_model(numbers, step):
    best: dict[str, Any] | None = None
    names, rows = list(numbers), zip(*numbers.values(), strict=True)
    for number, row in zip([2, 4, 6], rows, strict=True):
        found = {"step": number, **dict(zip(names, row, strict=True))}
        rule = criterion_of(None, found)
        best = found if rule is not None and rule.better(found, best) else best
    assert (best and best["step"]) == step


def test_no_model_that_is_not_finite_is_evaluated(tmp_path):
    def poison(step: Any) -> None:
        if step.number == 6:
            with torch.no_grad():
                next(step.state.problem.parameters()).fill_(float("nan"))

    settings = {"evaluate": by_weights, "evaluate_every": 3, "callbacks": [poison]}
    with pytest.raises(CheckpointError, match="NaN or infinite numbers after step 6"):
        trained(made(), tmp_path, **settings)
    assert [record["step"] for record in Run(tmp_path).evaluations()] == [3]

"""The checkpoints that a run keeps: how many, whole at any moment, and where it goes on from them."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bilevel.checkpoint import read_checkpoint
from bilevel.methods import EBLVM, BiDVL
from bilevel.methods.training.run import Run
from tests.runs import assert_equal, by_weights, made, parts, small, timeless, trained


def falling(model: EBLVM) -> dict[str, float]:
    """A number that falls with every step of `small`."""
    passes = model.get_buffer("lower.generator.1.num_batches_tracked")
    return {"frechet": 100.0 - float(passes)}


def steps_on_disk(folder: Path) -> dict[str, int]:
    files = sorted((folder / "checkpoints").iterdir())
    return {file.name: read_checkpoint(file)["step"] for file in files}


def test_as_many_checkpoints_are_kept_as_asked(tmp_path):
    settings = {"num_steps": 7, "checkpoint_every": 1, "keep_checkpoints": 3}
    trained(made(), tmp_path, **settings, callbacks=[lambda step: step.number == 5])
    kept = {"last.pt": 5, "step-00000003.pt": 3, "step-00000004.pt": 4}
    assert steps_on_disk(tmp_path) == kept
    trained(made(), tmp_path, **settings, resume=True)
    kept = {"last.pt": 7, "step-00000005.pt": 5, "step-00000006.pt": 6}
    assert steps_on_disk(tmp_path) == kept


def test_one_checkpoint_is_kept_if_nothing_is_asked(tmp_path):
    trained(made(), tmp_path, checkpoint_every=1)
    assert steps_on_disk(tmp_path) == {"last.pt": 6}


def test_checkpoints_are_kept_where_files_have_one_name_only(tmp_path, monkeypatch):
    def no_links(*_: Any) -> None:
        raise OSError("not on this file system")

    monkeypatch.setattr(os, "link", no_links)
    trained(made(), tmp_path, keep_checkpoints=2)
    assert steps_on_disk(tmp_path) == {"last.pt": 6, "step-00000004.pt": 4}


class Killed(BaseException):
    """What a process that is killed does not live to see."""


def killed_before(call: int, monkeypatch: pytest.MonkeyPatch, start: Callable[[], object]) -> bool:
    """Whether the process died before it renamed or linked a file for the `call`-th time."""
    count = 0

    def mortal(function: Callable[..., None]) -> Callable[..., None]:
        def dies(*arguments: Any, **more: Any) -> None:
            nonlocal count
            count += 1
            if count == call:
                raise Killed
            function(*arguments, **more)

        return dies

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", mortal(os.replace))
        patched.setattr(os, "link", mortal(os.link))
        try:
            start()
        except Killed:
            return True
    return False


def test_a_run_killed_at_any_write_resumes_to_the_same_end(tmp_path, monkeypatch):
    settings = {
        "num_steps": 2,
        "checkpoint_every": 1,
        "keep_checkpoints": 2,
        "evaluate": falling,
        "evaluate_every": 1,
        "upper_lr": 1e-2,
        "lower_lr": 1e-2,
    }
    whole, reference = small(), Run(tmp_path / "whole")
    trained(whole, reference.folder, **settings)
    assert (reference.best() or {})["step"] == 2  # the best model is replaced once
    calls, resumed = 0, 0
    while True:
        calls += 1
        run = Run(tmp_path / f"killed-{calls}")
        if not killed_before(
            calls, monkeypatch, lambda run=run: trained(small(), run.folder, **settings)
        ):
            break
        if not run.checkpoint_path.exists():
            continue  # nothing was promised yet
        resumed += 1
        best = run.best()
        if best is not None:
            assert falling(BiDVL.load(run.best_path, **parts()))["frechet"] == best["frechet"]
        again = small()
        trained(again, run.folder, resume=True, **settings)
        assert_equal(again, whole)
        assert timeless(run.metrics()) == timeless(reference.metrics())
        assert timeless(run.evaluations()) == timeless(reference.evaluations())
        assert timeless([run.best()]) == timeless([reference.best()])
        assert_equal(
            BiDVL.load(run.best_path, **parts()), BiDVL.load(reference.best_path, **parts())
        )
        assert steps_on_disk(run.folder) == {"last.pt": 2, "step-00000001.pt": 1}
    assert resumed >= 8


def test_a_new_run_in_an_old_folder_starts_empty(tmp_path):
    settings = {"evaluate": by_weights, "evaluate_every": 2, "keep_checkpoints": 3}
    trained(made(), tmp_path, **settings)
    Run(tmp_path).begin({})
    left = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {"config.json", "model.json", "weights.safetensors"}
    assert Run(tmp_path).best() is None

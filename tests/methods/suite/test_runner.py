"""Runs of a suite: resumable to the bit, failures recorded, a changed configuration refused by name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bilevel import CheckpointError, Step
from bilevel.methods.likelihood import log_likelihood
from bilevel.methods.suite import SuiteFolder, run_suite
from bilevel.methods.suite.job import make_table
from bilevel.methods.suite.report import write_suite_report
from bilevel.methods.suite.runner import trained
from bilevel.methods.suite.trace import log_spaced
from tests.methods.suite.small_suite import BLOCK, no_steps, suite

TIMES = ("time", "seconds", "startup_seconds", "steps_per_second")


def timeless(record: dict[str, Any]) -> dict[str, Any]:
    """A record without what the clock says."""
    kept = {name: value for name, value in record.items() if name not in TIMES}
    return {**kept, "trace": [[step, value] for step, _, value in record["trace"]]}


def stopping_at(number: int) -> Callable[[Step], None]:
    def stop(step: Step) -> None:
        if step.number == number:
            raise KeyboardInterrupt

    return stop


def test_a_cell_killed_midway_resumes_to_the_uninterrupted_record(tmp_path: Path) -> None:
    config = suite()
    whole = run_suite(config, tmp_path / "whole")
    steps: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        run_suite(config, tmp_path / "parts", callbacks=[stopping_at(13)])
    resumed = run_suite(
        config, tmp_path / "parts", callbacks=[lambda step: steps.append(step.number)]
    )
    assert steps[0] == 11  # after the checkpoint of step 10, not from the start
    assert list(map(timeless, resumed)) == list(map(timeless, whole))
    clock = [seconds for _, seconds, _ in resumed[0]["trace"]]
    assert clock == sorted(clock)
    assert resumed[0]["seconds"] >= clock[-1] > clock[-2]


def test_finished_cells_are_not_repeated(tmp_path: Path) -> None:
    first = run_suite(suite(), tmp_path)
    lines = (tmp_path / "records.jsonl").read_text()
    assert run_suite(suite(), tmp_path, callbacks=[no_steps]) == first
    assert (tmp_path / "records.jsonl").read_text() == lines


def test_other_seeds_are_other_cells_of_the_same_suite(tmp_path: Path) -> None:
    run_suite(suite(), tmp_path, only=["dsm"])
    more = run_suite(suite(seeds=[0, 1]), tmp_path, only=["dsm"])
    assert [record["seed"] for record in more] == [0, 1]
    assert more[0]["test"]["value"] != more[1]["test"]["value"]
    assert len(SuiteFolder(tmp_path).records()) == 2


def test_a_record_cut_off_by_a_crash_is_run_again(tmp_path: Path) -> None:
    first = run_suite(suite(), tmp_path, only=["dsm"])
    path = tmp_path / "records.jsonl"
    path.write_text(path.read_text()[:-20])
    again = run_suite(suite(), tmp_path, only=["dsm"], callbacks=[no_steps])  # it was trained
    assert list(map(timeless, again)) == list(map(timeless, first))
    assert SuiteFolder(tmp_path).records() == again


def test_a_changed_configuration_is_refused_by_name(tmp_path: Path) -> None:
    run_suite(suite(), tmp_path, only=["dsm"])
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    changed = suite(training={**BLOCK["training"], "num_steps": 30})
    with pytest.raises(ValueError, match=r"`blocks.0.training.num_steps` was 20, is 30") as caught:
        run_suite(changed, tmp_path)
    assert "--out" in str(caught.value)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_failing_cell_is_recorded_and_the_suite_goes_on(tmp_path: Path) -> None:
    broken = {"preset": "dsm", "name": "broken", "training": {"upper_lr": 1e30}}
    records = run_suite(suite(methods=[broken, "dsm"]), tmp_path)
    assert [record["status"] for record in records] == ["failed", "finished"]
    assert "step" in records[0]["reason"]
    assert "test" not in records[0]
    assert run_suite(suite(methods=[broken, "dsm"]), tmp_path, callbacks=[no_steps]) == records
    page = write_suite_report(SuiteFolder(tmp_path)).read_text()
    assert "Failed: broken" in page


def test_a_checkpoint_that_does_not_fit_is_no_failure_of_the_method(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_suite(suite(), tmp_path, callbacks=[stopping_at(13)])
    for path in tmp_path.rglob("last.pt"):
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError):
        run_suite(suite(), tmp_path)
    assert not SuiteFolder(tmp_path).records()


def test_time_that_is_up_ends_a_cell(tmp_path: Path) -> None:
    limited = suite(methods=["dsm"], training={**BLOCK["training"], "max_seconds": 1e-9})
    (record,) = run_suite(limited, tmp_path)
    assert record["steps"] == 2  # the first is not counted
    assert record["trace"][-1][0] == 2


def test_a_record_tells_how_it_was_made(tmp_path: Path) -> None:
    (record,) = run_suite(suite(methods=["bism-dsm"]), tmp_path)
    assert record["solver"].startswith("Unrolled(num_steps=5")
    assert record["training"]["lower_steps"] == 5  # the paper's
    assert record["training"]["num_steps"] == 20  # the block's
    assert record["ceiling"] == pytest.approx(0.6931, abs=1e-4)
    assert record["test"]["known"] == "exact"
    assert record["steps"] == 20
    assert record["startup_seconds"] > 0
    assert record["steps_per_second"] == pytest.approx(19 / record["seconds"], rel=0.02)
    assert {"bilevel", "torch", "python"} <= record["versions"].keys()
    assert [point[0] for point in record["trace"]] == [0, *sorted(log_spaced(20, 20))]
    assert record["trace"][-1][2] == record["test"]["value"]
    json.dumps(record, allow_nan=False)


def test_the_recorded_likelihood_is_that_of_the_kept_model(tmp_path: Path) -> None:
    config = suite(methods=["pcd"])  # its chains are part of what is kept
    (record,) = run_suite(config, tmp_path)
    (cell,) = config.cells()
    job = trained(cell, make_table(cell.data), SuiteFolder(tmp_path).cell_folder(cell))
    assert job is not None
    assert log_likelihood(job.machine, job.table.test) == pytest.approx(
        record["test"]["value"], abs=1e-5
    )

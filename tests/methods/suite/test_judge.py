"""What a suite says of a trained model, against its exact likelihood."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bilevel.methods.likelihood import log_likelihood
from bilevel.methods.suite.config import (
    EvaluationConfig,
)
from bilevel.methods.suite.judge import judge
from bilevel.methods.suite.learners import Job, make_job, make_table
from tests.methods.suite.small_suite import suite


def binary(tmp_path: Path, kind: str, options: dict[str, Any], method: str) -> Job:
    """A job on a table of six bits."""
    rows = np.random.default_rng(0).random((60, 6)) < 0.3
    path = tmp_path / "bits.npz"
    parts = {"a_train": rows[:20], "a_valid": rows[20:40], "a_test": rows[40:]}
    arrays: dict[str, Any] = {name: part.astype(np.uint8) for name, part in parts.items()}
    np.savez(path, **arrays)
    config = suite(
        data=[f"{path}:a"], models=[{"kind": kind, "options": options}], methods=[method]
    )
    (cell,) = config.cells()
    return make_job(cell, make_table(cell.data))


def test_an_annealed_estimate_brackets_the_exact_likelihood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = binary(tmp_path, "RBM", {"latent_dim": 5}, "cd1")
    evaluation = EvaluationConfig(chains=200, temperatures=300, trace_temperatures=300)
    exact = judge(job, evaluation, final=True)
    assert exact.known == "exact"
    monkeypatch.setattr(type(job.machine), "enumerable", False)
    found, quick = (judge(job, evaluation, final=final) for final in (True, False))
    assert found.known == quick.known == "annealed estimate"
    assert found.starts == "exact"
    assert found.standard_error is not None
    assert abs(found.value - exact.value) < 5 * found.standard_error
    assert found.lower is not None
    assert found.upper is not None
    assert found.lower <= exact.value <= found.upper


def test_the_mean_field_bound_of_a_deep_machine_is_below_its_likelihood(tmp_path: Path) -> None:
    job = binary(tmp_path, "DBM", {"latent_dims": [16, 2]}, "cd1")
    bound = judge(job, EvaluationConfig(), final=True)
    exact = log_likelihood(job.machine, job.table.test)
    assert bound.known == "variational lower bound"
    assert exact - 2 < bound.value <= exact


def test_a_vae_is_judged_by_its_own_bound(tmp_path: Path) -> None:
    job = binary(tmp_path, "RBM", {"latent_dim": 3}, "vae")
    found = judge(job, EvaluationConfig(), final=True)
    assert found.known == "importance-weighted lower bound"
    assert found.value == pytest.approx(judge(job, EvaluationConfig(), final=False).value, abs=0.1)

"""What a suite says of a trained model, against its exact likelihood."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bilevel.methods.likelihood import log_likelihood
from bilevel.methods.machines import RBM
from bilevel.methods.suite.config import EvaluationConfig
from bilevel.methods.suite.job import Job, make_job, make_table
from bilevel.methods.suite.judge import heldout_likelihood
from tests.methods.suite.small_suite import suite


def binary(
    tmp_path: Path, kind: str, options: dict[str, Any], method: str, columns: int = 6
) -> Job:
    """A job on a table of bits."""
    rows = np.random.default_rng(0).random((60, columns)) < 0.3
    path = tmp_path / "bits.npz"
    parts = {"a_train": rows[:20], "a_valid": rows[20:40], "a_test": rows[40:]}
    arrays: dict[str, Any] = {name: part.astype(np.uint8) for name, part in parts.items()}
    np.savez(path, **arrays)
    config = suite(
        data=[f"{path}:a"], models=[{"kind": kind, "options": options}], methods=[method]
    )
    (cell,) = config.cells()
    return make_job(cell, make_table(cell.data))


@torch.no_grad()
def test_a_machine_that_can_be_enumerated_is_judged_exactly(tmp_path: Path) -> None:
    job = binary(tmp_path, "RBM", {"latent_dim": 5}, "cd1")
    every = torch.tensor(list(itertools.product([0.0, 1.0], repeat=6)))
    log_z = (-job.machine.free_energy(every).double()).logsumexp(0)
    expected = float(-job.machine.free_energy(job.table.test).double().mean() - log_z)
    exact = heldout_likelihood(job, EvaluationConfig(), final=True)
    assert exact.known == "exact"
    assert exact.value == pytest.approx(expected, rel=1e-6)


@torch.no_grad()
def test_an_annealed_estimate_brackets_the_exact_likelihood(tmp_path: Path) -> None:
    """Too large to be enumerated, but all latents but five are idle, and cancel in the likelihood."""
    job = binary(tmp_path, "RBM", {"latent_dim": 26}, "cd1", columns=26)
    machine, same = job.machine, RBM(26, 5)
    assert not machine.enumerable
    machine.weight.normal_(0, 0.3, generator=torch.Generator().manual_seed(0))
    machine.weight[:, 5:] = 0
    machine.latent_bias[5:] = torch.linspace(-2, 2, 21)
    same.weight.copy_(machine.weight[:, :5])
    same.latent_bias.copy_(machine.latent_bias[:5])
    same.visible_bias.copy_(machine.visible_bias)
    exact = log_likelihood(same, job.table.test)
    evaluation = EvaluationConfig(chains=200, temperatures=300, trace_temperatures=300)
    found, quick = (heldout_likelihood(job, evaluation, final=final) for final in (True, False))
    assert found.known == quick.known == "annealed estimate"
    assert found.starts == "gibbs"
    for judgement in (found, quick):
        assert judgement.standard_error is not None
        assert 0 < judgement.standard_error < 0.1
        assert abs(judgement.value - exact) < 5 * judgement.standard_error
    assert found.lower is not None
    assert found.upper is not None
    assert found.lower <= exact <= found.upper


def test_the_mean_field_bound_of_a_deep_machine_is_below_its_likelihood(tmp_path: Path) -> None:
    job = binary(tmp_path, "DBM", {"latent_dims": [16, 2]}, "cd1")
    bound = heldout_likelihood(job, EvaluationConfig(), final=True)
    exact = log_likelihood(job.machine, job.table.test)
    assert bound.known == "variational lower bound"
    assert exact - 2 < bound.value <= exact


def test_a_vae_is_judged_by_its_own_bound(tmp_path: Path) -> None:
    job = binary(tmp_path, "RBM", {"latent_dim": 3}, "vae")
    found = heldout_likelihood(job, EvaluationConfig(), final=True)
    assert found.known == "importance-weighted lower bound"
    assert found.value == pytest.approx(
        heldout_likelihood(job, EvaluationConfig(), final=False).value, abs=0.1
    )

"""Several processes are one: the same variables from the same global batches."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from bilevel import Problem
from bilevel.sync_batch_norm import SyncBatchNorm, synchronise_batch_norm
from tests.distributed_worker import SOLVERS, everything, trained

ROOT = Path(__file__).parents[1]
RANKS = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes left what they computed."""
    folder = tmp_path_factory.mktemp("ranks")
    module = [sys.executable, "-m", "tests.distributed_worker"]
    workers = [
        subprocess.Popen(
            [*module, str(rank), str(RANKS), str(folder / "rendezvous"), str(folder)],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(RANKS)
    ]
    try:
        said = [worker.communicate(timeout=300)[1] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()
    assert all((folder / f"rank{r}.pt").exists() for r in range(RANKS)), said
    return folder


@pytest.fixture(scope="module")
def together(folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(folder / "rank0.pt")
    return loaded


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return everything(None)


@pytest.mark.parametrize("case", ["bidvl", *SOLVERS, "compiled"])
def test_two_processes_equal_one_with_the_same_global_batch(
    case: str, together: dict[str, Any], alone: dict[str, Any]
) -> None:
    for name, value in alone[case].items():
        assert_close(together[case][name], value, rtol=1e-12, atol=1e-12, msg=name)


def test_all_ranks_hold_the_same_variables_to_the_bit(
    folder: Path, together: dict[str, Any]
) -> None:
    other = torch.load(folder / "rank1.pt")
    for case, variables in together.items():
        for name, value in variables.items():
            assert torch.equal(other[case][name], value), (case, name)


def test_one_process_takes_up_what_two_left(folder: Path, alone: dict[str, Any]) -> None:
    resumed = trained(None, 4, resume=folder / "two.pt")
    for name, value in alone["bidvl"].items():
        assert_close(resumed[name], value, rtol=1e-12, atol=1e-12, msg=name)


def test_the_sum_of_shares_is_the_batch() -> None:
    problem = Problem.from_functions(lambda x, y, b: b, lambda x, y, b: b, {}, {})
    batch = (torch.arange(6), {"a": torch.arange(12).view(6, 2), "b": torch.tensor(1.0)}, None)
    shares = [problem.shard(batch, rank, 3) for rank in range(3)]
    assert torch.equal(torch.cat([s[0] for s in shares]), batch[0])
    assert torch.equal(torch.cat([s[1]["a"] for s in shares]), batch[1]["a"])
    assert all(s[1]["b"] == 1 for s in shares)


def test_unequal_shares_are_refused() -> None:
    problem = Problem.from_functions(lambda x, y, b: b, lambda x, y, b: b, {}, {})
    with pytest.raises(ValueError, match="7 rows cannot be shared out .* batch size of 6"):
        problem.shard(torch.zeros(7, 2), 0, 3)
    with pytest.raises(ValueError, match=r"\[4, 6\] rows.*override `shard`"):
        problem.shard((torch.zeros(4), torch.zeros(6)), 0, 2)


def test_synchronising_keeps_tensors_and_names() -> None:
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Sequential(nn.BatchNorm2d(2)))
    before = dict(module.named_parameters())
    state = list(module.state_dict())
    synchronise_batch_norm(module)
    assert isinstance(module[1], SyncBatchNorm)
    assert isinstance(module[2][0], SyncBatchNorm)
    assert list(module.state_dict()) == state
    assert all(p is before[name] for name, p in module.named_parameters())

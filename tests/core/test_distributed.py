"""Several processes are one: the same variables from the same global batches."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optree
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from bilevel import Problem
from bilevel.cli import main
from bilevel.methods import VAE, AdvIL, BiDVL, BiSM, ScoreMatching, VaGES
from bilevel.methods.data.images import load_images
from bilevel.methods.evaluation.evaluate import evaluate
from bilevel.sync_batch_norm import SyncBatchNorm, synchronise_batch_norm
from tests.distributed_worker import IMAGES, OF_THE_CONTRACT, SOLVERS, everything, trained

ROOT = Path(__file__).parents[2]
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


@pytest.mark.parametrize("case", ["bidvl", *SOLVERS, *OF_THE_CONTRACT, "compiled"])
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
    with pytest.raises(ValueError, match=r"7 rows cannot be shared out .* batch size of 6"):
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


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks into /proc")
def test_when_one_rank_is_killed_the_others_say_so_and_the_run_goes_on(tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = "--data digits --device cpu --latent-dim 2 --width 2 --checkpoint-every 5 --no-report"
    asked = ["train", "bidvl", *options.split(), "--num-steps", "200", "--batch-size", "400"]
    launcher = "torch.distributed.run --standalone --nproc-per-node 2 -m bilevel"
    begun = subprocess.Popen(
        [sys.executable, "-m", *launcher.split(), *asked, "--folder", str(run)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    checkpoint = run / "checkpoints" / "last.pt"
    try:
        _wait_for(checkpoint.exists, seconds=200)
        _kill_rank(1, begun.pid)
        said, _ = begun.communicate(timeout=60)
    finally:
        begun.kill()
        begun.communicate()
    assert begun.returncode != 0
    assert "process 0 of 2 lost contact with another one" in said
    assert "`--resume`, with any number of processes" in said
    assert not (run / "model").exists()
    assert main(["train", "--run", str(run), "--resume", "--no-report"]) == 0
    assert (run / "model" / "model.json").exists()
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == [50, 100, 150, 200]


def _wait_for(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def _kill_rank(rank: int, launcher: int) -> None:
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    for child in children:
        environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        if f"RANK={rank}".encode() in environment:
            os.kill(int(child), signal.SIGKILL)
            return
    raise AssertionError(children)


def test_a_batch_that_cannot_be_shared_out_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda *_: 3)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda *_: 0)
    model = BiDVL.for_images((1, 8, 8), latent_dim=2, width=2)
    with pytest.raises(ValueError, match="100 cannot be shared out equally among 3; use 99"):
        model.fit(IMAGES.float().repeat(5, 1, 1, 1), num_steps=1)


@pytest.mark.parametrize("method", [BiDVL, AdvIL, BiSM, VaGES, VAE, ScoreMatching])
def test_the_batches_of_image_models_can_be_shared_out(method: Any) -> None:
    more = {"latent_steps": 3} if method is VaGES else {}
    model = method.for_images((1, 8, 8), width=4, **more)
    generator = torch.Generator().manual_seed(0)
    batch = model.draw(IMAGES[:4].float(), generator)
    batches = (
        [batch, model.draw_lower(batch, generator, 0)] if model.variables("lower") else [batch]
    )
    for whole in batches:
        shares = [model.shard(whole, rank, 2) for rank in range(2)]
        leaves = [optree.tree_leaves(tree) for tree in (whole, *shares)]
        for both, first, second in zip(*leaves, strict=True):
            assert torch.equal(torch.cat([first, second]), both)


def test_one_rank_may_evaluate_while_the_others_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing in an evaluation exchanges anything, synchronised batch norm included."""

    def exchange(*_: Any, **__: Any) -> None:
        raise AssertionError

    model = BiDVL.for_images((1, 8, 8), latent_dim=2, width=2)
    synchronise_batch_norm(model)
    model.eval()
    for name in ("all_reduce", "barrier", "all_gather"):
        monkeypatch.setattr(torch.distributed, name, exchange)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda *_: 2)
    images = load_images("digits")
    for statistics in ("batch", "running"):
        found = evaluate(model, images, statistics=statistics, samples=100)
        assert found["rmse"] > 0

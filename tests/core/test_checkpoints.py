"""`State`: a stopped run goes on as if it had never stopped, whatever stopped it."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from bilevel import CheckpointError, train
from tests.core.resumed import (
    DATA,
    SOLVERS,
    UPPER_DATA,
    Noisy,
    assert_same,
    finish,
    loader,
    make,
    state_of,
)
from tests.problems import Quadratic, regression


@pytest.mark.parametrize("schedule", ["none", "lambda", "multistep", "onecycle", "sequence"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_resumed_run_equals_the_uninterrupted_one(
    solver: str, schedule: str, tmp_path: Path
) -> None:
    whole = finish(make(solver, schedule))
    for stop in (1, 3, 5):  # the epochs end at steps 1 and 2
        path = tmp_path / "run.pt"
        finish(make(solver, schedule), path, stop)
        torch.load(path, weights_only=True)
        assert_same(finish(make(solver, schedule, resume=path)), whole)


@pytest.mark.parametrize("shared", [False, True])
def test_resuming_with_data_loaders(shared: bool, tmp_path: Path) -> None:
    """At every point of an epoch; `shared`: two loaders that draw from one generator."""

    def fresh(**changes: Any) -> dict[str, Any]:
        data, upper = loader(DATA), loader(UPPER_DATA, seed=4)
        if shared:
            upper = DataLoader(
                TensorDataset(*UPPER_DATA), 5, shuffle=True, generator=data.generator
            )
        return make(data=data, upper_data=upper, batch_size=None, **changes)

    whole = finish(fresh())
    for stop in range(1, 6):
        finish(fresh(), tmp_path / "run.pt", stop)
        assert_same(finish(fresh(resume=tmp_path / "run.pt")), whole)


def test_a_loader_that_cannot_be_resumed_says_so(tmp_path: Path) -> None:
    data = DataLoader(TensorDataset(*DATA), 5, shuffle=True)
    with pytest.raises(CheckpointError, match="give it `generator="):
        finish(make(data=data, batch_size=None), tmp_path / "run.pt", 1)


def saved(path: Path, stop: int = 2, **changes: Any) -> Path:
    finish(make(**changes), path, stop)
    return path


def refused(path: Path, match: str, **changes: Any) -> None:
    """Resuming fails with this sentence and leaves everything as it was."""
    settings = make(**changes)
    problem, optimizer = settings["problem"], settings["lower_optimizer"]
    before = {n: t.clone() for n, t in problem.state_dict().items()}
    with pytest.raises(CheckpointError, match=match):
        train(**settings, resume=path)
    assert_same(dict(problem.state_dict()), before)
    assert not optimizer.state


def test_missing_foreign_and_truncated_files(tmp_path: Path) -> None:
    refused(tmp_path / "none.pt", "there is no checkpoint at")
    torch.save({"weights": torch.ones(2)}, tmp_path / "foreign.pt")
    refused(tmp_path / "foreign.pt", "is not a checkpoint of `bilevel.train`")
    (tmp_path / "text.pt").write_text("hello")
    refused(tmp_path / "text.pt", "truncated or not a checkpoint")
    content = saved(tmp_path / "run.pt").read_bytes()
    for part in (0, 1, len(content) // 2, len(content) - 1):
        (tmp_path / "part.pt").write_bytes(content[:part])
        refused(tmp_path / "part.pt", "truncated or not a checkpoint")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"solver": "unrolled"}, r"`solver` was Alternating\(\), is Unrolled"),
        ({"lower_steps": 3}, "`lower_steps` was 2, is 3"),
        ({"batch_size": 4}, "`batch_size` was 5, is 4"),
        ({"seed": 1}, "`seed` was 0, is 1"),
        ({"order": "upper_first"}, "`order` was lower_first"),
        ({"problem": Quadratic()}, "`problem` was Noisy, is Quadratic"),
        ({"data": regression(rows=20)}, "written with 12 rows of data, there are 20 now"),
        ({"schedule": "lambda"}, "does not fit this run"),
    ],
)
def test_another_configuration(changes: dict[str, Any], match: str, tmp_path: Path) -> None:
    refused(saved(tmp_path / "run.pt"), match, **changes)


def test_another_optimizer(tmp_path: Path) -> None:
    path = saved(tmp_path / "run.pt")
    problem = Noisy()
    sgd = torch.optim.SGD(problem.lower.parameters(), 0.1)
    refused(path, "`optimizers` was", problem=problem, lower_optimizer=sgd)


def test_a_checkpoint_with_nan_is_not_written(tmp_path: Path) -> None:
    path, problem = tmp_path / "run.pt", Quadratic()
    state_of(problem).save(path)
    before = path.read_bytes()
    with torch.no_grad():
        problem.lower["y"][1] = float("nan")
    with pytest.raises(CheckpointError, match=r"`lower.y` holds NaN .* previous one was kept"):
        state_of(problem).save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["run.pt"]


def test_an_infinite_mask_is_no_failure(tmp_path: Path) -> None:
    problem = Quadratic()
    problem.register_buffer("mask", torch.tensor([0.0, -float("inf")]))
    state_of(problem).save(tmp_path / "run.pt")
    problem.register_buffer("mask", torch.tensor([0.0, float("nan")]))
    with pytest.raises(CheckpointError, match="`mask`"):
        state_of(problem).save(tmp_path / "run.pt")


def test_what_could_not_be_loaded_is_not_saved(tmp_path: Path) -> None:
    state = state_of(Quadratic())
    state.solver_state = {"history": [1.0, object()]}
    with pytest.raises(CheckpointError, match=r"`solver\.history\.1` is a `object`"):
        state.save(tmp_path / "run.pt")
    assert not list(tmp_path.iterdir())


def test_old_temporary_files_are_removed(tmp_path: Path) -> None:
    old, young = tmp_path / ".run.pt.1.tmp", tmp_path / ".run.pt.2.tmp"
    for left in (old, young):
        left.write_bytes(b"half a checkpoint")
    os.utime(old, (0, 0))
    state_of(Quadratic()).save(tmp_path / "run.pt")
    assert not old.exists()
    assert young.exists()  # another process may be writing it
    state_of(Quadratic()).load(tmp_path / "run.pt")


WRITER = """
import os, signal, sys, time
import torch
from bilevel import train
from tests.core.resumed import make
path = sys.argv[1]
for step in train(**make("unrolled", num_steps=4)):
    pass
step.state.save(path)
for k in range(12):
    child = os.fork()
    while child == 0:
        step.state.save(path)
    time.sleep(0.02 + 0.0037 * k)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    torch.load(path, weights_only=True)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_while_writing(tmp_path: Path) -> None:
    """SIGKILL, a dozen times, of a process that does nothing but write; one import of torch."""
    path, root = tmp_path / "run.pt", Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, "-W", "ignore", "-c", WRITER, str(path)]
    subprocess.run(command, env=environment, cwd=root, check=True)
    whole = finish(make("unrolled", num_steps=6))
    assert_same(finish(make("unrolled", num_steps=6, resume=path)), whole)


def test_buffers_that_are_assigned_or_shared_advance(tmp_path: Path) -> None:
    """`self.average = ...` in a loss, and one counter held by two modules."""

    class Counting(Quadratic):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("average", torch.zeros(()).double())
            counter = torch.zeros(())
            self.first, self.second = nn.Identity(), nn.Identity()
            self.first.register_buffer("count", counter)
            self.second.register_buffer("count", counter)

        def lower_loss(self, batch: Any) -> Tensor:
            loss = super().lower_loss(batch)
            self.average = 0.5 * self.average + 1
            self.first.count += 1
            assert self.second.count == self.first.count
            return loss

    problem = Counting()
    settings = make(problem=problem, data=None, upper_data=None, batch_size=None)
    finish({**settings, "num_steps": 2, "lower_steps": 1})
    assert problem.average == 1.5
    assert problem.first.count == problem.second.count == 2
    assert not problem.average.requires_grad

"""`State`: a stopped run goes on as if it had never stopped, whatever stopped it."""

import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchopt
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from bilevel import (
    Alternating,
    CheckpointError,
    ConjugateGradient,
    Implicit,
    Problem,
    Solver,
    State,
    Unrolled,
    train,
)
from bilevel.repeated import Repeated
from tests.problems import NetProblem, Quadratic, regression, seeded

DATA, UPPER_DATA = regression(rows=12, seed=7), regression(rows=10, seed=9)


class Noisy(NetProblem):
    """Dropout, batch norm, and noise drawn into the batch."""

    def __init__(self) -> None:
        super().__init__(
            seeded(
                lambda: nn.Sequential(
                    nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.3), nn.Linear(4, 1)
                )
            )
        )

    def draw(self, data: Any, generator: torch.Generator) -> Any:
        inputs, targets = data
        noise = torch.randn(inputs.shape, generator=generator, dtype=inputs.dtype)
        return inputs + 0.1 * noise, targets


SOLVERS: dict[str, Solver] = {
    "alternating": Alternating(),
    "implicit": Implicit(ConjugateGradient(max_steps=3, rtol=None, damping=20.0, warm_start=True)),
    "unrolled": Unrolled(2),
    "torchopt": Unrolled(2, torchopt.sgd(0.1)),  # its repr holds addresses
}


def schedulers(kind: str, optimizer: Any) -> Any:
    lr = torch.optim.lr_scheduler
    return {
        "none": lambda: (),
        "lambda": lambda: lr.LambdaLR(optimizer, lambda k: 0.9**k),
        "multistep": lambda: lr.MultiStepLR(optimizer, [2, 3]),
        "onecycle": lambda: lr.OneCycleLR(optimizer, 0.1, total_steps=20),
        "sequence": lambda: lr.SequentialLR(
            optimizer,
            [lr.ConstantLR(optimizer, 0.5, 2), lr.CosineAnnealingLR(optimizer, 5)],
            [2],
        ),
    }[kind]()


def make(solver: str = "alternating", schedule: str = "none", **changes: Any) -> dict[str, Any]:
    """A fresh run: everything `train` needs, built anew as after a restart."""
    problem = changes.pop("problem", None) or Noisy()
    upper = torch.optim.Adam(problem.upper.parameters(), np.float64(0.05))  # from a numpy grid
    lower = torch.optim.Adam(problem.lower.parameters(), 0.05)
    return {
        "problem": problem,
        "data": DATA,
        "upper_data": UPPER_DATA,
        "batch_size": 5,
        "solver": SOLVERS[solver],
        "upper_optimizer": upper,
        "lower_optimizer": lower,
        "lower_scheduler": schedulers(schedule, lower),
        "upper_scheduler": schedulers(schedule, upper),
        "lower_steps": 2,
        "num_steps": 6,
        **changes,
    }


def finish(settings: dict[str, Any], path: Path | None = None, stop: int = 0) -> Any:
    """Run to the end, or save at `stop` and leave; the problem and everything else."""
    for step in train(**settings):
        if step.number == stop and path is not None:
            step.state.save(path)
            return None
        state = step.state
    return state.state_dict()


def assert_same(a: Any, b: Any) -> None:
    if isinstance(a, Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            assert_same(one, other)
    else:
        assert a == b


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


def loader(rows: Any, seed: int = 3) -> DataLoader[Any]:
    return DataLoader(
        TensorDataset(*rows), 5, shuffle=True, generator=torch.Generator().manual_seed(seed)
    )


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


class Other(Noisy):
    pass


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


def state_of(problem: Problem) -> State:
    return State(problem, {}, {}, {}, torch.Generator(), {})


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
from tests.core.test_checkpoints import make
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


# ---------------------------------------------------------------------- what is random in the data

ROWS = TensorDataset(*DATA)


def seed(number: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(number)


class Shuffled(Sampler[int]):
    """An order of its own, in one of the ways that people write."""

    def __init__(self, how: str) -> None:
        self.how, self.epoch = how, 0
        if how == "generator":
            self.source = seed()
        if how == "numpy":
            self.source = np.random.default_rng(3)

    def __len__(self) -> int:
        return 12

    def __iter__(self) -> Iterator[int]:
        self.epoch += 1
        source = {"generator": lambda: self.source}.get(self.how, lambda: seed(self.epoch))()
        return iter(torch.randperm(12, generator=source).tolist())


class Remembering(Shuffled):
    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch = state["epoch"]


class Augmented(TensorDataset):
    """Adds noise to its rows, from a generator of its own or a global one."""

    def __init__(self, draw: Callable[[], float] | None = None) -> None:
        super().__init__(*DATA)
        self.noise = seed(5)
        self.draw = draw

    def __getitem__(self, index: Any) -> Any:
        inputs, targets = super().__getitem__(index)
        own = torch.rand((), generator=self.noise, dtype=torch.double)
        return inputs + (own if self.draw is None else self.draw()), targets


class Stream(IterableDataset[Any]):
    """Rows one after the other, in an order that depends on a count of its epochs."""

    def __init__(self) -> None:
        self.epoch = 0

    def __iter__(self) -> Iterator[Any]:
        self.epoch += 1
        for index in torch.randperm(12, generator=seed(self.epoch)).tolist():
            yield DATA[0][index], DATA[1][index]

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch = state["epoch"]


class OwnPlace:
    """Knows its place in the middle of an epoch, as `torchdata`'s `StatefulDataLoader` does."""

    def __init__(self) -> None:
        self.epoch = self.taken = 0

    def __iter__(self) -> Iterator[Any]:
        order = torch.randperm(12, generator=seed(self.epoch)).split(5)
        while self.taken < len(order):
            self.taken += 1
            yield tuple(column[order[self.taken - 1]] for column in DATA)
        self.epoch, self.taken = self.epoch + 1, 0

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "taken": self.taken}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.taken = state["epoch"], state["taken"]


def replaced() -> RandomSampler:
    return RandomSampler(ROWS, replacement=True, num_samples=40, generator=seed())


def distributed() -> DataLoader[Any]:
    return DataLoader(ROWS, 5, sampler=DistributedSampler(ROWS, 1, 0, shuffle=True))


weights = torch.arange(1.0, 13.0)
RESUMABLE: dict[str, Callable[[], Any]] = {
    "weighted": lambda: DataLoader(
        ROWS, 5, sampler=WeightedRandomSampler(weights, 12, generator=seed())
    ),
    "subset": lambda: DataLoader(ROWS, 4, sampler=SubsetRandomSampler(range(8), generator=seed())),
    "random": lambda: DataLoader(ROWS, 5, sampler=RandomSampler(ROWS, generator=seed())),
    "replacement": lambda: DataLoader(ROWS, 5, sampler=replaced()),
    "nested": lambda: DataLoader(ROWS, batch_sampler=BatchSampler(replaced(), 5, True)),
    "distributed": distributed,
    "in order": lambda: DataLoader(ROWS, 5),
    "list": lambda: DataLoader(ROWS, 2, sampler=[3, 1, 2, 7]),
    "own generator": lambda: DataLoader(ROWS, 5, sampler=Shuffled("generator")),
    "own state": lambda: DataLoader(ROWS, 5, sampler=Remembering("count")),
    "augmented": lambda: DataLoader(Augmented(), 5, shuffle=True, generator=seed()),
    "two data sets": lambda: DataLoader(
        ConcatDataset([Augmented(), ROWS]), 5, shuffle=True, generator=seed()
    ),
    "stream": lambda: DataLoader(Stream(), 5),
    "own place": OwnPlace,
}


def assert_resumes(make_data: Callable[[], Any], path: Path, stops: Sequence[int] = (1, 3)) -> None:
    def fresh(**changes: Any) -> dict[str, Any]:
        settings = {"problem": Reading(), "upper_data": None, "batch_size": None, "lower_steps": 1}
        return make(**{**settings, "data": make_data(), **changes})

    whole = finish(fresh(num_steps=5))
    for stop in stops:
        finish(fresh(num_steps=5), path, stop)
        assert_same(finish(fresh(num_steps=5, resume=path)), whole)


class Reading(NetProblem):
    """Nothing but the data is random in it."""

    def __init__(self) -> None:
        super().__init__(seeded(lambda: nn.Linear(3, 1)))


@pytest.mark.parametrize("name", RESUMABLE)
def test_data_in_any_order_resume_to_the_bit(name: str, tmp_path: Path) -> None:
    """Samplers of their own went on in another order, without a word."""
    assert_resumes(RESUMABLE[name], tmp_path / "run.pt")


def test_workers_resume_to_the_bit(tmp_path: Path) -> None:
    """What they draw comes from a seed that the loader's generator gives them, epoch by epoch."""
    noise = Augmented(lambda: float(torch.rand(())))
    loader = lambda: DataLoader(noise, 6, shuffle=True, generator=seed(), num_workers=1)  # noqa: E731
    assert_resumes(loader, tmp_path / "run.pt", stops=[3])


class Loop:
    """A stream of the user's own that shuffles in some way."""

    def __init__(self, order: Callable[[], list[int]]) -> None:
        self.order = order

    def __iter__(self) -> Iterator[Any]:
        for index in self.order():
            yield DATA[0][index : index + 2], DATA[1][index : index + 2]


def by_python() -> list[int]:
    return random.sample(range(10), 10)


def by_numpy() -> list[int]:
    return np.random.permutation(10).tolist()  # noqa: NPY002


UNRESUMABLE: dict[str, tuple[Callable[[], Any], str]] = {
    "shuffle": (lambda: DataLoader(ROWS, 5, shuffle=True), "shuffles from torch's global"),
    "nested": (
        lambda: DataLoader(ROWS, batch_sampler=BatchSampler(RandomSampler(ROWS), 5, True)),
        "shuffles from torch's global generator",
    ),
    "weighted": (
        lambda: DataLoader(ROWS, 5, sampler=WeightedRandomSampler(weights, 12)),
        r"shuffles from torch's global .*give it `generator=.*`WeightedRandomSampler`",
    ),
    "subset": (
        lambda: DataLoader(ROWS, 5, sampler=SubsetRandomSampler(range(8))),
        "shuffles from torch's global generator",
    ),
    "a count of its own": (
        lambda: DataLoader(ROWS, 5, sampler=Shuffled("count")),
        "the order that the sampler `Shuffled` gives could not be had again",
    ),
    "workers": (
        lambda: DataLoader(ROWS, 5, num_workers=1),
        "workers of this `DataLoader` get their seeds from torch's global generator",
    ),
    "workers that stay": (
        lambda: DataLoader(ROWS, 5, num_workers=1, persistent_workers=True, generator=seed()),
        "use `persistent_workers=False`",
    ),
    "torch": (
        lambda: DataLoader(Augmented(lambda: float(torch.rand(()))), 5),
        "the data draw from torch's global generator while they are read",
    ),
    "numpy": (lambda: Loop(by_numpy), "the data draw from NumPy's global generator"),
    "python": (lambda: Loop(by_python), "the data draw from Python's global generator"),
}


@pytest.mark.parametrize("name", UNRESUMABLE)
def test_data_that_could_not_be_had_again_are_named(name: str, tmp_path: Path) -> None:
    """A checkpoint that could not be resumed is not written."""
    make_data, match = UNRESUMABLE[name]
    source = Repeated(make_data())
    if "workers" not in name:
        next(source)
    with pytest.raises(CheckpointError, match=match):
        source.state_dict()


# ---------------------------------------------------------------------- what else belongs to a run


class Momentum(Reading):
    """Buffers that no `state_dict` holds: one that a loss assigns, one that begins as `None`."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(()).double(), persistent=False)
        self.lower.register_buffer("late", None, persistent=False)
        self.register_buffer("mask", torch.zeros(3).double(), persistent=False)

    def upper_loss(self, batch: Any) -> Tensor:
        loss = super().upper_loss(batch)
        self.mean = 0.9 * self.mean + 0.1 * loss.detach()
        return loss * (1 + self.mean) + self.mask.sum()


def test_buffers_that_no_state_dict_holds_are_resumed(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"

    def fresh(**changes: Any) -> dict[str, Any]:
        return make(**{"problem": Momentum(), "ema": 0.5, **changes})

    whole = finish(fresh())
    assert set(whole["buffers"]) == {"mean", "mask", "lower.late"}
    assert whole["buffers"]["mean"] != 0
    finish(fresh(), path, 3)
    assert_same(finish(fresh(resume=path)), whole)


def test_a_buffer_that_came_late_is_resumed() -> None:
    problem, again = Momentum(), Momentum()
    problem.lower.late = torch.ones(2).double()
    state_of(again).load_state_dict(state_of(problem).state_dict())
    assert torch.equal(again.lower.late, problem.lower.late)


def test_an_earlier_checkpoint_goes_on_from_the_buffers_of_now(tmp_path: Path) -> None:
    state = state_of(Momentum()).state_dict()
    del state["buffers"]
    with pytest.warns(RuntimeWarning, match=r"earlier version, without the values of `mask`"):
        state_of(Momentum()).load_state_dict(state)
    state["buffers"] = {"other": torch.zeros(1)}
    with pytest.raises(CheckpointError, match=r"the buffer `lower\.late` .* is not in both"):
        state_of(Momentum()).load_state_dict(state)


def test_a_module_whose_extra_state_cannot_be_loaded_is_not_saved(tmp_path: Path) -> None:
    class Extra(nn.Linear):
        def get_extra_state(self) -> Any:
            return object()

        def set_extra_state(self, state: Any) -> None:
            pass

    problem = NetProblem(seeded(lambda: Extra(3, 1)))
    with pytest.raises(CheckpointError, match=r"`lower\._extra_state` is a `object`"):
        state_of(problem).save(tmp_path / "run.pt")


def rates(upper: float = 0.05, gamma: float = 0.9, **options: Any) -> dict[str, Any]:
    problem = Noisy()
    first = torch.optim.Adam(problem.upper.parameters(), upper, **options)
    second = torch.optim.Adam(problem.lower.parameters(), 0.05)
    step = torch.optim.lr_scheduler.StepLR
    return {
        "problem": problem,
        "upper_optimizer": first,
        "lower_optimizer": second,
        "upper_scheduler": step(first, 1, gamma),
        "lower_scheduler": torch.optim.lr_scheduler.SequentialLR(
            second,
            [step(second, 1, gamma=0.5), step(second, 1, options.get("weight_decay", 0.5))],
            [3],
        ),
    }


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"upper": 0.01}, r"`upper_optimizer\.initial_lr` was 0\.05, is 0\.01"),
        ({"weight_decay": 0.1}, r"`upper_optimizer\.weight_decay` was 0, is 0\.1"),
        ({"weight_decay": 0.1}, r"`lower_scheduler\.parts\.1` was .*0\.5.*, is .*0\.1"),
        ({"betas": (0.5, 0.9)}, r"`upper_optimizer\.betas` was \(0\.9, 0\.999\), is \(0\.5"),
        ({"gamma": 0.5}, r"`upper_scheduler\.gamma` was 0\.9, is 0\.5"),
    ],
)
def test_a_changed_rate_is_not_ignored(changes: dict[str, Any], match: str, tmp_path: Path) -> None:
    """A resumed run takes the rates of the checkpoint: new ones were accepted and did nothing."""
    path = tmp_path / "run.pt"
    finish(make(**rates()), path, 2)
    train(**make(**rates()), resume=path)
    with pytest.raises(CheckpointError, match=match):
        train(**make(**rates(**changes)), resume=path)


def test_the_optimizers_of_the_run_itself_may_resume_it(tmp_path: Path) -> None:
    """In a notebook the loop is left and entered again with what is there."""
    settings = make(**rates())
    for step in train(**settings):
        if step.number == 2:
            step.state.save(tmp_path / "run.pt")
        if step.number == 3:
            break
    assert next(iter(train(**settings, resume=tmp_path / "run.pt"))).number == 3


def test_a_run_that_is_further_than_its_steps(tmp_path: Path) -> None:
    finish(make(), tmp_path / "run.pt", 4)
    with pytest.raises(
        ValueError, match="after 4 steps, but `num_steps`, the steps in total, is 3"
    ):
        train(**make(num_steps=3, resume=tmp_path / "run.pt"))
    assert list(train(**make(num_steps=4, resume=tmp_path / "run.pt"))) == []


def test_another_number_of_sources(tmp_path: Path) -> None:
    finish(make(), tmp_path / "run.pt", 2)
    with pytest.raises(
        CheckpointError, match="read `data` and `upper_data`, this one reads `data`"
    ):
        train(**make(upper_data=None, resume=tmp_path / "run.pt"))

"""Recorded steps: what a CUDA graph does, shown on a processor by one that repeats operations."""

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bilevel import (
    F2SA,
    Alternating,
    Compiled,
    ConjugateGradient,
    Implicit,
    Problem,
    Solver,
    Unrolled,
)
from bilevel.compile.cuda_graph import Packed
from bilevel.loop.settings import TurnSettings
from bilevel.loop.steps import TurnSteps
from bilevel.optimizers import LevelUpdate
from bilevel.state import State
from tests.replaying import Replayed

GENERATOR = torch.Generator().manual_seed(0)
BATCHES = torch.randn(8, 6, 3, generator=GENERATOR)


class Net(Problem):
    """A small network with batch norm, a learned weight decay and a factor that is no buffer."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.upper = nn.ParameterDict({"decay": torch.zeros(3)})
        self.lower = nn.Sequential(
            nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4), nn.Dropout(dropout), nn.Linear(4, 1)
        )
        with torch.no_grad():
            for p in self.lower.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) / 2)
        self.scale = torch.full((4, 3), 0.5)
        self.beta = 1.0

    def lower_loss(self, batch: Tensor) -> Any:
        decay = (self.upper["decay"].exp() * (self.scale * self.lower[0].weight) ** 2).mean()
        return self.beta * (self.lower(batch)[:, 0] - batch.sum(1)).square().mean() + decay

    def upper_loss(self, batch: Tensor) -> Any:
        error = (self.lower(batch)[:, 0] - batch.sum(1)).square().mean()
        return error + self.upper["decay"].square().sum() / 10, {"error": error}


def adam(parameters: Any, rate: float, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, rate, fused=True, **options)


def sgd(parameters: Any, rate: float, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, rate, momentum=0.9, **options)


class Steps:
    """The steps of a run, taken one by one, eager or recorded."""

    def __init__(
        self,
        *,
        recorded: bool,
        solver: Solver | None = None,
        make: Any = adam,
        problem: Problem | None = None,
        dtype: torch.dtype = torch.float32,
        precision: torch.dtype | None = None,
        clip: float | None = None,
        capture: Any = Replayed,
        **options: Any,
    ) -> None:
        self.problem: Any = (Net() if problem is None else problem).to(dtype).train()
        if dtype is torch.float64:
            self.problem.scale = self.problem.scale.double()
        self.upper = make(self.problem.upper.parameters(), 3e-2, **options)
        self.lower = make(self.problem.lower.parameters(), 1e-2, **options)
        updates: Any = {
            "upper": LevelUpdate([self.upper]),
            "lower": LevelUpdate([self.lower], max_norm=clip),
        }
        state = State(self.problem, updates, {}, torch.Generator(), {})
        self._dtype = dtype
        self._steps = TurnSteps(
            state,
            Alternating() if solver is None else solver,
            TurnSettings(1, precision=precision, throw=False),
            capture=capture if recorded else None,
        )

    def take(self, *numbers: int) -> list[float]:
        """A lower and an upper step on each of these batches; the losses found."""
        losses = []
        for number in numbers:
            batch = BATCHES[number].to(self._dtype)
            self._steps.begin(number)
            losses.append(float(self._steps.lower(batch, True).loss))
            found = self._steps.upper(batch, [batch], None)
            losses += [float(found.value), float(found.stats.direct_norm)]
        return losses


@pytest.fixture(autouse=True)
def _no_fallback() -> Iterator[None]:
    """A step that is not recorded would pass every comparison."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "the step is not recorded")
        yield


def same(eager: Steps, recorded: Steps, tolerance: float = 1e-6) -> None:
    """Variables, buffers and the optimizers' states are the same in both."""
    near = {"rtol": tolerance, "atol": tolerance}
    ours, theirs = recorded.problem.state_dict(), eager.problem.state_dict()
    torch.testing.assert_close(ours, theirs, **near)
    for mine, other in ((recorded.upper, eager.upper), (recorded.lower, eager.lower)):
        for p, q in zip(
            mine.param_groups[0]["params"], other.param_groups[0]["params"], strict=True
        ):
            for name, value in other.state[q].items():
                torch.testing.assert_close(mine.state[p][name], value, check_dtype=False, **near)


def both(**options: Any) -> tuple[Steps, Steps]:
    return Steps(recorded=False, **options), Steps(recorded=True, **options)


@pytest.mark.parametrize(
    ("options", "graphs"),
    [
        ({}, 2),
        ({"make": sgd}, 2),
        ({"make": sgd, "dtype": torch.float64, "nesterov": True}, 2),
        ({"dtype": torch.float64}, 2),
        ({"clip": 0.1, "weight_decay": 0.1, "amsgrad": True}, 2),
        ({"precision": torch.bfloat16}, 2),
        ({"solver": Unrolled(num_steps=9), "make": sgd, "dtype": torch.float64}, 6),
        ({"solver": Unrolled(num_steps=2), "make": sgd, "dtype": torch.float64}, 3),
        ({"solver": Implicit(ConjugateGradient(3, damping=1.0, rtol=None)), "make": sgd}, 9),
    ],
    ids=[
        "adam",
        "sgd",
        "sgd in float64",
        "adam in float64",
        "clipped",
        "autocast",
        "unrolled",
        "unrolled at once",
        "implicit",
    ],
)
def test_a_recorded_run_equals_the_eager_one(options: dict[str, Any], graphs: int) -> None:
    """Fresh batches, both optimizers' states, batch norm's buffers and a rate that falls."""
    eager, recorded = both(**options)
    before = Replayed.made
    losses = []
    for steps in (eager, recorded):
        found = steps.take(0, 1, 2)
        for optimizer in (steps.upper, steps.lower):
            optimizer.param_groups[0]["lr"] *= 0.1
        losses.append(found + steps.take(3, 4))
    assert Replayed.made == before + graphs
    # a rate in float32 is what fused kernels read
    exact = options.get("dtype") is torch.float64 and options.get("make") is sgd
    assert losses[1] == pytest.approx(losses[0], rel=1e-12 if exact else 1e-4)
    same(eager, recorded, 1e-12 if exact else 1e-5)


def _load_own_state(steps: Steps) -> None:
    for optimizer in (steps.upper, steps.lower):
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def _move_memory(steps: Steps) -> None:
    for parameter in steps.problem.parameters():
        parameter.data = parameter.data.clone()
    steps.problem.scale.data = steps.problem.scale.data.clone() * 3


def _group(**settings: Any) -> Any:
    def change(steps: Steps) -> None:
        for optimizer in (steps.upper, steps.lower):
            optimizer.param_groups[0].update(settings)

    return change


CHANGES: dict[str, tuple[Any, int]] = {  # and how often a step must be recorded anew
    "eval": (lambda s: s.problem.eval(), 2),
    "one layer's mode": (lambda s: s.problem.lower[1].eval(), 2),
    "a number": (lambda s: setattr(s.problem, "beta", 2.0), 1),
    "a plain tensor replaced": (lambda s: setattr(s.problem, "scale", torch.ones(4, 3)), 1),
    "a plain tensor written": (lambda s: s.problem.scale.mul_(3), 0),
    "weights written": (lambda s: s.problem.lower[0].weight.data.mul_(3), 0),
    "memory moved": (_move_memory, 2),
    "frozen": (lambda s: s.problem.lower[0].weight.requires_grad_(False), 2),
    "a layer replaced": (lambda s: s.problem.lower.append(nn.Tanh()), 2),
    "rate": (_group(lr=0.5), 0),
    "rate as a tensor": (_group(lr=torch.tensor(0.5)), 0),
    "betas": (_group(betas=(0.5, 0.6)), 2),
    "weight decay": (_group(weight_decay=0.5), 2),
    "eps": (_group(eps=1.0), 2),
    "amsgrad": (_group(amsgrad=False), 2),  # the other way torch gives a running Adam no state
    "maximize": (_group(maximize=True), 2),
    "state loaded": (_load_own_state, 2),
    "autocast": (lambda s: torch.set_autocast_enabled("cpu", True), 2),
    "default dtype": (lambda s: torch.set_default_dtype(torch.float64), 2),
}


@pytest.fixture
def _torchs_own_state() -> Iterator[None]:
    yield
    torch.set_autocast_enabled("cpu", False)
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("_torchs_own_state")
@pytest.mark.parametrize(("change", "anew"), CHANGES.values(), ids=CHANGES)
def test_what_a_recording_takes_for_granted_is_looked_at(change: Any, anew: int) -> None:
    """Each change shows at once, as in the eager run, and nothing else makes a new recording."""
    found, runs = [], both(amsgrad=True)
    before = Replayed.made
    for steps in runs:
        first = steps.take(0, 1)
        change(steps)
        found.append(first + steps.take(2, 3))
        torch.set_autocast_enabled("cpu", False)
        torch.set_default_dtype(torch.float32)
    assert found[1] == pytest.approx(found[0], rel=1e-4)
    assert Replayed.made == before + 2 + anew
    same(*runs, 1e-5)


def test_shapes_and_learning_rates_that_move_in_every_step() -> None:
    """A scheduler makes no recordings; a batch of another shape makes one, and both are kept."""
    runs = both()
    before = Replayed.made
    for steps in runs:
        schedule = torch.optim.lr_scheduler.ExponentialLR(steps.lower, 0.5)
        for number in range(8):
            steps.take(number)
            schedule.step()
    assert Replayed.made == before + 2
    same(*runs)


class Looks(Net):
    """A loss that looks at its own value."""

    def lower_loss(self, batch: Tensor) -> Any:
        loss = super().lower_loss(batch)
        return loss if loss > 0 else -loss


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda s: setattr(s.problem.lower[2], "p", 0.5), "draws random numbers"),
        (lambda s: s.problem.lower[0].weight.register_hook(lambda g: g * 2), "has a hook"),
        (lambda s: s.lower.register_step_pre_hook(lambda *_: None), "step hooks"),
        (lambda s: setattr(s.problem, "__class__", Looks), "looks at the value of a tensor"),
        (_group(betas=(torch.tensor(0.5), torch.tensor(0.9))), "`betas` of `Adam` is a tensor"),
    ],
    ids=["dropout", "hook", "step hook", "look", "tensor option"],
)
def test_what_cannot_be_recorded_runs_as_it_is_and_says_so(spoil: Any, words: str) -> None:
    """After one warning; nothing of the attempt is left behind."""
    eager, recorded = both()
    spoil(eager)
    spoil(recorded)
    taken = eager.take(0, 1, 2)
    with pytest.warns(RuntimeWarning, match=rf"not recorded and runs as .*: .*{words}") as given:
        assert recorded.take(0, 1, 2) == pytest.approx(taken, rel=1e-6)
    assert len({str(warning.message) for warning in given}) == len(given)
    same(eager, recorded)


def test_a_solver_outside_the_loop_is_recorded_once() -> None:
    """The same hypergradient on other batches and variables; a word that is none is refused."""
    solver = Implicit(ConjugateGradient(3, damping=1.0, rtol=None))
    fast = Compiled(solver, capture=Replayed)
    problem = Net().eval()
    problem.double().scale = problem.scale.double()
    before, counts = Replayed.made, []
    for batch in BATCHES[:3].double():
        exact = solver.hypergradient(problem, batch, [batch], throw=False).grad
        found = fast.hypergradient(problem, batch, [batch], throw=False).grad
        torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-14)
        counts.append(Replayed.made - before)
        with torch.no_grad():
            problem.lower[0].weight.mul_(0.5)
    assert counts[0] > 0
    assert counts == counts[:1] * 3
    with pytest.raises(ValueError, match="`how` cannot be 'recrod'; did you mean `record`"):
        Compiled(solver, "recrod")  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match="makes CUDA graphs, but the problem is on the device `cpu`"
    ):
        Compiled(solver, "record").hypergradient(problem, batch, [batch])


def test_one_recording_serves_all_lower_batches_of_a_copy() -> None:
    problem = Net().eval()
    problem.double().scale = problem.scale.double()
    batches, made = list(BATCHES[:3].double()), []
    for count in (1, 3):
        solver = F2SA(100.0, num_steps=3, step_size=0.01)
        exact = solver.hypergradient(problem, batches[0], batches[:count]).grad
        before, fast = Replayed.made, Compiled(solver, capture=Replayed)
        found = fast.hypergradient(problem, batches[0], batches[:count]).grad
        torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-14)
        made.append(Replayed.made - before)
    assert made[0] == made[1]


def test_a_capture_that_fails_leaves_everything_as_it_was() -> None:
    def failing(run: Any, arguments: Any, live: Any) -> Any:
        run(*arguments, *live)
        raise RuntimeError("operation not permitted when stream is capturing")

    eager, recorded = both(capture=failing)
    taken = eager.take(0, 1)
    with pytest.warns(RuntimeWarning, match="operation not permitted"):
        assert recorded.take(0, 1) == taken
    same(eager, recorded, tolerance=0.0)
    for optimizer in (recorded.upper, recorded.lower):
        group = optimizer.param_groups[0]
        assert group["lr"] in (3e-2, 1e-2)
        assert not group["capturable"]


def test_a_recorded_state_loads_into_any_optimizer() -> None:
    """What a recorded run saves is what `torch.optim` expects, and the other way round."""
    eager, recorded = both()
    found = [
        steps.take(0, 1) and copy.deepcopy(steps.lower.state_dict()) for steps in (eager, recorded)
    ]
    eager.lower.load_state_dict(found[1])
    recorded.lower.load_state_dict(found[0])
    assert recorded.take(2, 3) == pytest.approx(eager.take(2, 3), rel=1e-5)
    same(eager, recorded, 1e-5)


def test_answers_are_packed_and_copied() -> None:
    """Each copy has memory of its own, and a scalar does not keep the large ones."""
    given = [
        torch.ones(2, 3),
        torch.tensor(2.0),
        torch.arange(3),
        torch.zeros(0),
        torch.tensor(5.0),
    ]
    packed = Packed(given)
    copies, others = packed.copies(), packed.copies()
    torch.testing.assert_close(copies, given)
    copies[0].zero_()
    torch.testing.assert_close(others, given)
    torch.testing.assert_close(packed.copies(), given)
    assert copies[1].untyped_storage().nbytes() == 8  # with the other scalar of its kind

"""`train`: equal to the loop one would write by hand; and its data."""

import itertools
import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.data import DataLoader, TensorDataset

from bilevel import (
    Batches,
    ConjugateGradient,
    DivergenceError,
    HypergradientError,
    Implicit,
    Problem,
    Step,
    Unrolled,
    train,
)
from tests.problems import NetProblem, Quadratic, mlp, regression, seeded

DATA = regression(rows=12, seed=7)
UPPER_DATA = regression(rows=9, seed=9)


def normed() -> nn.Module:
    return nn.Sequential(
        parametrizations.spectral_norm(nn.Linear(3, 4)),
        nn.BatchNorm1d(4),
        nn.Tanh(),
        nn.utils.spectral_norm(nn.Linear(4, 1)),
    )


def make(net: Any = mlp) -> NetProblem:
    return NetProblem(seeded(net))


def optimizers(problem: Problem) -> dict[str, Any]:
    return {
        "upper_optimizer": torch.optim.Adam(problem.upper.parameters(), 0.05),
        "lower_optimizer": torch.optim.SGD(problem.lower.parameters(), 0.05, momentum=0.9),
    }


def run(problem: Problem, *args: Any, **keywords: Any) -> list[Step]:
    return list(train(problem, *args, **{**optimizers(problem), "num_steps": 4, **keywords}))


def assert_same(a: Problem, b: Problem) -> None:
    torch.testing.assert_close(a.state_dict(), b.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("net", [mlp, normed])
@pytest.mark.parametrize("order", ["lower_first", "upper_first"])
@pytest.mark.parametrize("lower_steps", [1, 3])
def test_alternating_equals_the_loop_by_hand(net: Any, order: Any, lower_steps: int) -> None:
    ours, mine = make(net), make(net)
    given = optimizers(mine)

    def level(which: str, loss: Any, clip: float | None = None) -> None:
        for p in mine.parameters():
            p.grad = None
        loss(DATA).backward()
        parameters = list(mine.variables(which).values())  # type: ignore[arg-type]
        if clip:
            nn.utils.clip_grad_norm_(parameters, clip)
        given[f"{which}_optimizer"].step()

    for _ in range(4):
        if order == "upper_first":
            level("upper", mine.upper_loss)
        for _ in range(lower_steps):
            level("lower", mine.lower_loss, clip=0.3)
        if order == "lower_first":
            level("upper", mine.upper_loss)
    steps = run(ours, DATA, order=order, lower_steps=lower_steps, clip_lower=0.3)
    assert_same(ours, mine)
    assert [s.number for s in steps] == [1, 2, 3, 4]
    assert all(p.grad is None for p in ours.parameters())


def test_clipping_the_hypergradient_leaves_the_record_alone() -> None:
    problem = Quadratic()
    optimizer = torch.optim.SGD(problem.upper.parameters(), 1.0)
    before = problem.upper["x"].detach().clone()
    (step,) = train(
        problem,
        upper_optimizer=optimizer,
        lower_steps=0,
        num_steps=1,
        solver=Implicit(),
        clip_upper=0.01,
    )
    assert step.hypergradient.grad["x"].norm() > 0.1
    torch.testing.assert_close(
        (problem.upper["x"] - before).norm().detach(),
        torch.tensor(0.01).double(),
        rtol=1e-5,
        atol=0,
    )
    assert step.lower_loss is None


class Recorder(Problem):
    """Remembers the batches that each level saw."""

    def __init__(self) -> None:
        super().__init__()
        self.upper = nn.ParameterDict({"x": torch.zeros(()).double()})
        self.lower = nn.ParameterDict({"y": torch.zeros(()).double()})
        self.seen: list[tuple[str, Tensor]] = []

    def draw(self, data: Any, generator: torch.Generator) -> Any:
        return data, torch.rand((), generator=generator)

    def upper_loss(self, batch: Any) -> Tensor:
        self.seen.append(("upper", batch))
        return (self.upper["x"] - self.lower["y"]).square()

    def lower_loss(self, batch: Any) -> Tensor:
        self.seen.append(("lower", batch))
        return (self.upper["x"] + self.lower["y"] - 1).square()


def test_one_source_gives_both_levels_the_same_batch() -> None:
    problem = Recorder()
    run(problem, DATA, batch_size=4, lower_steps=2, num_steps=3)
    # the rehearsal evaluates each loss twice
    assert [level for level, _ in problem.seen[:4]] == ["upper", "upper", "lower", "lower"]
    turns = [problem.seen[i : i + 3] for i in range(4, 13, 3)]
    for turn in turns:
        assert [level for level, _ in turn] == ["lower", "lower", "upper"]
        assert turn[0][1] is turn[1][1] is turn[2][1]
    noises = [turn[0][1][1] for turn in turns]
    assert len({float(n) for n in noises}) == 3
    expected = torch.Generator().manual_seed(0)
    assert [float(torch.rand((), generator=expected)) for _ in noises] == [float(n) for n in noises]


def test_two_sources_give_every_step_its_own_batch() -> None:
    problem = Recorder()
    run(problem, DATA, upper_data=UPPER_DATA, batch_size=4, lower_steps=2, num_steps=1)
    rows = {id(batch) for _, batch in problem.seen}
    assert len(rows) == 3
    problem = Recorder()
    solver = Unrolled(2)
    run(problem, DATA, upper_data=UPPER_DATA, batch_size=4, solver=solver, num_steps=1)
    lower = [float(batch[1]) for level, batch in problem.seen if level == "lower"]
    # the real step, the look at which variables are used, and two unrolled steps on fresh batches
    assert len(set(lower)) == 3
    assert len(set(lower[-2:])) == 2


def test_schedulers_step_once_a_turn() -> None:
    problem = make()
    given = optimizers(problem)
    schedulers = [
        torch.optim.lr_scheduler.StepLR(given["lower_optimizer"], 1, gamma=0.5),
        torch.optim.lr_scheduler.LambdaLR(given["lower_optimizer"], lambda k: 1.0),
    ]
    upper = torch.optim.lr_scheduler.MultiStepLR(given["upper_optimizer"], [2], gamma=0.1)
    for _ in train(
        problem,
        DATA,
        **given,
        num_steps=3,
        lower_steps=2,
        lower_scheduler=schedulers[0],
        upper_scheduler=[upper],
    ):
        pass
    assert schedulers[0].last_epoch == upper.last_epoch == 3
    assert given["upper_optimizer"].param_groups[0]["lr"] == pytest.approx(0.005)


def test_the_clock_stands_still_outside() -> None:
    problem = Quadratic()
    for step in train(problem, **optimizers(problem), num_steps=4):
        seconds = step.seconds
        time.sleep(0.3)
    assert 0 < seconds < 0.9  # three pauses are 0.9 s


def test_iterated_without_gradients_enabled() -> None:
    outside, inside = make(), make()
    run(outside, DATA, solver=Unrolled(2))
    with torch.no_grad():
        run(inside, DATA, solver=Unrolled(2))
    assert_same(outside, inside)


def test_the_same_seed_gives_the_same_run() -> None:
    global_seeds = itertools.count()

    def final(seed: int, solver: Any = None) -> dict[str, Any]:
        problem = NetProblem(seeded(lambda: nn.Sequential(mlp(), nn.Dropout(0.5))))
        torch.manual_seed(next(global_seeds))  # the global generator has no say
        run(problem, DATA, batch_size=5, seed=seed, solver=solver)
        return problem.state_dict()

    for solver in (None, Unrolled(2)):
        first, again, other = final(1, solver), final(1, solver), final(2, solver)
        torch.testing.assert_close(first, again, rtol=0, atol=0)
        assert any(not torch.equal(first[n], other[n]) for n in first)


def test_the_global_generator_is_left_alone() -> None:
    state = torch.get_rng_state()
    run(NetProblem(seeded(lambda: nn.Sequential(mlp(), nn.Dropout(0.5)))), DATA, batch_size=5)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("order", ["lower_first", "upper_first"])
@pytest.mark.parametrize("level", ["upper", "lower"])
@pytest.mark.parametrize("separate", [False, True])
def test_a_bad_loss_is_refused_before_anything_has_moved(
    order: str, level: str, separate: bool
) -> None:
    problem = Recorder()
    setattr(problem, f"{level}_loss", lambda batch: torch.ones(3).double())
    before = {name: value.clone() for name, value in problem.state_dict().items()}
    with pytest.raises(TypeError, match=f"{level}_loss` must return a scalar"):
        run(
            problem,
            DATA,
            upper_data=UPPER_DATA if separate else None,
            batch_size=4,
            order=order,
            num_steps=1,
        )
    assert all(value.equal(before[name]) for name, value in problem.state_dict().items())


def test_the_lower_residual_is_the_norm_of_the_last_lower_gradient() -> None:
    problem = Recorder()
    (step,) = run(problem, DATA, batch_size=4, lower_steps=1, num_steps=1, clip_lower=0.1)
    assert float(step.lower_residual) == pytest.approx(2.0)  # d/dy (x + y - 1)^2 at 0


def test_a_data_loader() -> None:
    loader = DataLoader(
        TensorDataset(*DATA), batch_size=5, shuffle=True, generator=torch.Generator().manual_seed(0)
    )
    expected = DataLoader(
        TensorDataset(*DATA), batch_size=5, shuffle=True, generator=torch.Generator().manual_seed(0)
    )
    problem = Recorder()
    run(problem, loader, num_steps=6)
    by_hand = [batch for _ in range(2) for batch in expected]
    seen = [batch[0] for level, batch in problem.seen[2:] if level == "upper"]
    torch.testing.assert_close(
        seen, [tuple(b) if isinstance(seen[0], tuple) else b for b in by_hand]
    )


def test_batches_visit_every_row_once_an_epoch() -> None:
    batches = Batches({"a": torch.arange(10)}, 5, seed=0)
    epochs = [torch.cat([next(batches)["a"] for _ in range(2)]) for _ in range(3)]
    assert all(e.sort().values.equal(torch.arange(10)) for e in epochs)
    assert not epochs[0].equal(epochs[1])


def test_learns() -> None:
    problem = Quadratic()
    run(
        problem,
        solver=Implicit(ConjugateGradient(warm_start=True)),
        lower_steps=20,
        num_steps=150,
        lower_optimizer=torch.optim.SGD(problem.lower.parameters(), 0.2),
    )
    assert problem.solve().hypergradient().norm() < 1e-2


class Explodes(Problem):
    """A term becomes NaN at a given lower step; `y` counts them."""

    def __init__(self, term: str, at: int) -> None:
        super().__init__()
        self.term, self.at = term, at
        self.upper = nn.ParameterDict({"x": torch.ones(()).double()})
        self.lower = nn.ParameterDict({"y": torch.zeros(()).double()})

    def _bad(self, term: str) -> Tensor:
        late = self.lower["y"] > self.at - 1.5
        return torch.where(late & (self.term == term), torch.tensor(float("inf")).double(), 0)

    def upper_loss(self, batch: Any) -> Any:
        loss = self.upper["x"].square() + self._bad("upper loss")
        return loss, {"logged": self._bad("logged"), "number": 1.0}

    def lower_loss(self, batch: Any) -> Tensor:
        return -self.lower["y"] + 0 * self.upper["x"] + self._bad("lower loss")


@pytest.mark.parametrize("check_every", [1, 4, 100])
@pytest.mark.parametrize("term", ["upper loss", "lower loss", "logged"])
def test_divergence_is_named_exactly(term: str, check_every: int) -> None:
    problem = Explodes(term, 3 if term == "lower loss" else 4)  # the upper loss sees one step more
    given = {
        "upper_optimizer": torch.optim.SGD(problem.upper.parameters(), 0.1),
        "lower_optimizer": torch.optim.SGD(problem.lower.parameters(), 1.0),
    }
    with pytest.raises(DivergenceError, match=f"at step 3: `{term}` is inf") as caught:
        run(problem, **given, num_steps=8, check_every=check_every)
    assert (caught.value.step, caught.value.term) == (3, term)


def test_a_failed_hypergradient_names_the_step_or_the_earlier_cause() -> None:
    problem = Quadratic()
    with pytest.raises(HypergradientError) as caught:
        run(problem, solver=Implicit(ConjugateGradient(max_steps=1, rtol=1e-12)))
    assert caught.value.__notes__ == ["at step 1"]
    problem = Quadratic()
    steps = train(problem, **optimizers(problem), num_steps=9, solver=Implicit())
    next(steps)
    problem.H.fill_(float("nan"))
    with pytest.raises(DivergenceError, match="at step 2"):
        next(steps)


def test_a_failed_hypergradient_can_be_asked_back() -> None:
    problem = Quadratic()
    solver = Implicit(ConjugateGradient(max_steps=1, rtol=1e-12))
    steps = run(problem, solver=solver, throw=False)
    assert "without reaching" in steps[-1].hypergradient.result.value

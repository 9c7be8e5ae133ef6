"""Tasks with lower variables of their own, and many hypergradients at once: equal to the loop."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torchopt
from torch import Tensor, nn

from bilevel import (
    GMRES,
    Alternating,
    Cholesky,
    ConjugateGradient,
    Hypergradient,
    HypergradientError,
    Identity,
    Implicit,
    Problem,
    Result,
    Solver,
    Tasks,
    Unrolled,
    best_response,
    check_hypergradient,
    hypergradients,
    train,
)
from bilevel.tree import Tree
from tests.problems import ROWS, classification, normal, regression, seeded

T = 3


def stacked(draw: Callable[..., Sequence[Tensor]], seed: int) -> tuple[Tensor, ...]:
    """The data of the tasks."""
    each = [draw(seed=seed + i) for i in range(T)]
    return tuple(torch.stack(parts) for parts in zip(*each, strict=True))


def apart(batch: Sequence[Tensor], i: int) -> tuple[Tensor, ...]:
    return tuple(part[i] for part in batch)


@torch.no_grad()
def put(problem: Problem, level: Any, tree: Tree, i: int) -> None:
    for name, p in problem.variables(level).items():
        p.copy_(tree[name][i])


def means(found: list[Hypergradient]) -> Tree:
    return {n: torch.stack([f.grad[n] for f in found]).mean(0) for n in found[0].grad}


SOLVERS: list[Solver] = [
    Alternating(),
    Implicit(ConjugateGradient(damping=4.0)),
    Implicit(ConjugateGradient(max_steps=2, rtol=None, damping=4.0)),
    Implicit(Cholesky(damping=4.0)),
    Implicit(GMRES(damping=4.0, rtol=1e-12)),
    Unrolled(3, optimizer=torchopt.adam(0.1)),
]


@pytest.mark.parametrize(
    ("name", "vectorize"),
    [
        ("ridge", True),
        ("logistic with logs", True),
        ("tanh network", True),
        ("tied weights", True),
        ("frozen and unused", True),
        ("logistic with logs", False),
        ("tied weights", False),
    ],
)
def test_tasks_are_the_loop_over_tasks(name: str, vectorize: bool) -> None:
    row = ROWS[name]
    draw = classification if name.startswith("logistic") else regression
    upper_batch, lower_batch = stacked(draw, 20), stacked(draw, 40)
    tasks, one = Tasks(row.make(), T, vectorize=vectorize), row.make()
    with torch.no_grad():
        for i, y in enumerate(tasks.variables("lower").values()):
            y += 0.1 * normal(*y.shape, seed=i)
    for solver in SOLVERS:
        found = solver.hypergradient(tasks, upper_batch, [lower_batch])
        each = []
        for i in range(T):
            put(one, "lower", tasks.variables("lower"), i)
            each.append(solver.hypergradient(one, apart(upper_batch, i), [apart(lower_batch, i)]))
        torch.testing.assert_close(found.grad, means(each), rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(found.value, torch.stack([e.value for e in each]).mean())
        assert found.logs.keys() == each[0].logs.keys()


def test_a_lower_step_moves_each_task_as_if_it_were_alone() -> None:
    """So the learning rate does not depend on the number of tasks."""
    row, batch = ROWS["ridge"], stacked(regression, 20)
    tasks, one = Tasks(row.make(), T), row.make()
    before = copy.deepcopy(one.state_dict())
    for problem, data in ((tasks, batch), (one, apart(batch, 1))):
        optimizers = {
            f"{level}_optimizer": torch.optim.SGD(getattr(problem, level).parameters(), 0.05)
            for level in ("upper", "lower")
        }
        next(train(problem, data, num_steps=1, lower_steps=4, **optimizers))  # type: ignore[arg-type]
    torch.testing.assert_close(tasks.lower.w[1], one.lower["w"], rtol=1e-12, atol=1e-12)
    assert all(
        torch.equal(p, before[f"lower.{n}"]) for n, p in tasks.problem.lower.named_parameters()
    )


class Begun(Problem):
    """One step from initial values that are learned."""

    def __init__(self) -> None:
        super().__init__()
        self.upper = nn.ParameterDict({"x": normal(2, seed=1)})
        self.lower = nn.ParameterDict({"y": normal(2, seed=2)})

    def upper_loss(self, batch: Any) -> Tensor:
        return (self.lower["y"] - batch).square().sum()

    def lower_loss(self, batch: Any) -> Tensor:
        return (self.lower["y"] - batch).pow(4).sum()

    def initial_lower(self) -> Tree:
        return {"y": self.upper["x"].sin()}


@pytest.mark.parametrize("share_upper", [True, False])
def test_tasks_begin_where_their_problem_says(share_upper: bool) -> None:
    batch, solver = normal(T, 2, seed=3), Unrolled(2, optimizer=torchopt.sgd(0.1))
    tasks = Tasks(Begun(), T, share_upper=share_upper)
    alone = [solver.hypergradient(Begun(), b, [b]) for b in batch]
    found = solver.hypergradient(tasks, batch, [batch]).grad["x"]
    each = torch.stack([one.grad["x"] for one in alone])
    torch.testing.assert_close(found, each.mean(0) if share_upper else each)
    assert not Tasks(ROWS["ridge"].make(), T).gives_initial_lower


def test_conjugate_gradients_need_the_steps_of_the_hardest_task_not_of_all() -> None:
    problem = Problem.from_functions(
        lambda x, y, h: (y["y"] - 1).square().sum(),
        lambda x, y, h: (h * y["y"].square()).sum() / 2 - (y["y"] * x["x"]).sum(),
        {"x": normal(2)},
        {"y": normal(2)},
    )
    scales = 1 + torch.arange(40, dtype=torch.float64).reshape(20, 2)  # two eigenvalues each
    found = Implicit(ConjugateGradient(rtol=1e-12)).hypergradient(
        Tasks(problem, 20), scales, [scales]
    )
    assert found.stats.num_products <= 4


def test_tasks_are_checked_solved_and_drawn_like_any_problem() -> None:
    row, batch = ROWS["ridge"], stacked(regression, 20)
    tasks = Tasks(row.make(), T)
    assert check_hypergradient(tasks, Implicit(), batch, [batch], num_directions=2)
    one = ROWS["ridge"].make()
    expected = one.best_response(apart(batch, 2))
    assert expected is not None
    torch.testing.assert_close(best_response(tasks, batch)["w"][2], expected["w"])

    class Drawn(Problem):
        def __init__(self) -> None:
            super().__init__()
            self.upper, self.lower = (
                seeded(lambda: nn.Linear(1, 1)),
                seeded(lambda: nn.Linear(2, 1)),
            )

        def draw(self, data: Any, generator: torch.Generator) -> Any:
            return torch.rand(4, 2, generator=generator, dtype=torch.float64)

        def upper_loss(self, batch: Any) -> Tensor:
            return (self.lower(batch) - self.upper(batch[:, :1])).square().mean()

        lower_loss = upper_loss

    drawn = Tasks(Drawn(), T).draw(None, torch.Generator().manual_seed(0))
    assert drawn.shape == (T, 4, 2)
    assert not torch.equal(drawn[0], drawn[1])


def test_what_cannot_be_batched_is_said_and_runs_in_a_loop() -> None:
    row, batch = ROWS["lstm"], stacked(regression, 20)
    with pytest.raises(RuntimeError) as caught:
        Tasks(row.make(), T).lower_loss(batch)
    assert "`vectorize=False` runs them in a loop" in caught.value.__notes__[0]
    assert Tasks(row.make(), T, vectorize=False).losses("lower", batch)[0].shape == (T,)
    with pytest.raises(ValueError, match=r"shape \(3, 6, 3\), .* must count the 4 tasks"):
        Tasks(row.make(), 4).lower_loss(batch)
    copied = copy.deepcopy(Tasks(ROWS["ridge"].make(), T))
    assert copied.losses("lower", batch)[0].shape == (T,)
    with pytest.raises(TypeError, match="`problem` must be a `Problem`"):
        Tasks(nn.Linear(1, 1), 3)  # type: ignore[arg-type]
    both = ROWS["quadratic"].make()
    both.lower["y"] = both.upper["x"]  # type: ignore[operator]
    with pytest.raises(ValueError, match="`y` of `Quadratic` belongs to both levels"):
        Tasks(both, 3)


# ---------------------------------------------------------------------- many hypergradients


def many(problem: Problem, level: Any, seed: int) -> Tree:
    return {
        name: p.detach() + 0.1 * normal(T, *p.shape, seed=seed)
        for name, p in problem.variables(level).items()
    }


@pytest.mark.parametrize("name", ["quadratic", "logistic with logs", "tanh network"])
def test_hypergradients_are_the_loop_over_members(name: str) -> None:
    row = ROWS[name]
    problem, one = row.make(), row.make()
    upper, lower = many(problem, "upper", 50), many(problem, "lower", 60)
    for solver in (*SOLVERS, Implicit(Identity(0.1))):
        found = hypergradients(
            problem, row.upper_batch, [row.lower_batch], solver=solver, upper=upper, lower=lower
        )
        assert found.at_once == solver.separates()
        for i in range(T):
            put(one, "upper", upper, i)
            put(one, "lower", lower, i)
            alone = solver.hypergradient(one, row.upper_batch, [row.lower_batch])
            torch.testing.assert_close(found.values[i], alone.value)
            for name_, grad in alone.grad.items():
                torch.testing.assert_close(found.grad[name_][i], grad, rtol=1e-12, atol=1e-12)
            if isinstance(solver, Implicit):
                torch.testing.assert_close(found.lower_residuals[i], alone.stats.lower_residual)


def test_members_end_by_themselves_and_the_worst_is_told() -> None:
    """One needs a step, one four, one has no minimum: the first two are as exact as alone."""
    problem = Problem.from_functions(
        lambda x, y, _: y["y"].square().sum(),
        lambda x, y, _: (x["h"] * y["y"].square()).sum() / 2,
        {"h": torch.ones(4, dtype=torch.float64)},
        {"y": torch.ones(4, dtype=torch.float64)},
    )
    ones = torch.ones(4, dtype=torch.float64)
    h = torch.stack(
        [2 * ones, torch.arange(1.0, 5.0).double(), torch.tensor([1.0, -1, 1, 1]).double()]
    )
    y = torch.stack([ones, ones, ones])
    solver = Implicit(ConjugateGradient(rtol=1e-13))
    with pytest.raises(HypergradientError, match="negative curvature"):
        hypergradients(problem, solver=solver, upper={"h": h}, lower={"y": y})
    found = hypergradients(problem, solver=solver, upper={"h": h}, lower={"y": y}, throw=False)
    assert found.result is Result.NEGATIVE_CURVATURE
    torch.testing.assert_close(found.grad["h"][:2], -2 / h[:2], rtol=1e-12, atol=1e-12)


def test_an_ensemble_trains_as_its_members_would_alone() -> None:
    row = ROWS["ridge"]
    problem = Tasks(row.make(), T, share_upper=False, share_batch=True)
    starts = normal(T, 3, seed=70)
    with torch.no_grad():
        problem.upper.log_l2.copy_(starts)

    def run(problem: Problem) -> None:
        adam = torch.optim.Adam(problem.upper.parameters(), 0.05)
        sgd = torch.optim.SGD(problem.lower.parameters(), 0.1)
        for _ in train(
            problem, row.lower_batch, upper_optimizer=adam, lower_optimizer=sgd, num_steps=5,
            lower_steps=3, solver=Implicit(ConjugateGradient(max_steps=2, rtol=None)),
        ):  # fmt: skip
            pass

    run(problem)
    for i in range(T):
        one = row.make()
        with torch.no_grad():
            one.upper["log_l2"].copy_(starts[i])
        run(one)
        torch.testing.assert_close(
            problem.upper.log_l2[i], one.upper["log_l2"], rtol=1e-11, atol=1e-12
        )


def test_misfits_of_many_are_refused_by_name() -> None:
    problem = ROWS["quadratic"].make()
    with pytest.raises(ValueError, match="says how many members of `Quadratic`"):
        hypergradients(problem, solver=Implicit())
    with pytest.raises(ValueError, match="no upper variable `z`"):
        hypergradients(problem, solver=Implicit(), upper={"z": normal(3, 3)})
    with pytest.raises(ValueError, match=r"shape \(5, 2\); for 5 members it must have \(5, 3\)"):
        hypergradients(problem, solver=Implicit(), upper={"x": normal(5, 2)})
    with pytest.raises(TypeError, match=r"a linear solver goes into `Implicit`"):
        hypergradients(problem, solver=Cholesky(), upper={"x": normal(5, 3)})  # type: ignore[arg-type]

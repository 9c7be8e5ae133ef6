"""First-order and penalty solvers: where they end, what they choose, what they say, what they keep."""

import copy
import gc
from typing import Any

import optree
import pytest
import torch
from torch import Tensor, nn

from bilevel import (
    BDA,
    BOME,
    F2BA,
    F2SA,
    GPBGD,
    MEHA,
    VPBGD,
    Alternating,
    F2SAp,
    Hypergradient,
    Problem,
    Solver,
    Unrolled,
    check_hypergradient,
    train,
)
from tests.problems import Quadratic, normal

H = torch.tensor([[1.2, 0.2], [0.2, 0.8]], dtype=torch.float64)
B = torch.tensor([1.0, -0.5], dtype=torch.float64)
T = torch.tensor([1.0, 2.0], dtype=torch.float64)
SLOPE = torch.linalg.solve(H, B)  # y*(x) = SLOPE x
BEST = float(SLOPE @ T / (1 + SLOPE @ SLOPE))  # minimises F(x, y*(x))


def small() -> Problem:
    """G = y'Hy/2 - y'Bx, F = |y - T|^2/2 + x^2/2; two lower variables and one upper."""

    def upper_loss(x: Any, y: Any, batch: Any) -> Tensor:
        return (y["y"] - T).square().sum() / 2 + x["x"].square() / 2

    def lower_loss(x: Any, y: Any, batch: Any) -> Tensor:
        return y["y"] @ H @ y["y"] / 2 - y["y"] @ B * x["x"]

    x, y = torch.tensor(1.0, dtype=torch.float64), normal(2)
    return Problem.from_functions(upper_loss, lower_loss, {"x": x}, {"y": y})


def ended(problem: Problem, solver: Solver, rate: float, lower: float, steps: int) -> float:
    """The upper variable after a training."""
    optimizers = {
        "upper_optimizer": torch.optim.SGD(problem.upper.parameters(), rate, momentum=0.5),
        "lower_optimizer": torch.optim.SGD(problem.lower.parameters(), lower, momentum=0.5),
    }
    for _ in train(problem, solver=solver, num_steps=steps, **optimizers):
        pass
    return float(next(problem.upper.parameters()).detach())


def penalised(weight: Tensor) -> float:
    """The x of the minimum of F + (y - y*(x))' weight (y - y*(x)) / 2."""
    cross = weight @ SLOPE
    rows = [torch.cat([torch.eye(2) + weight, -cross[:, None]], 1)]
    rows.append(torch.cat([-cross, 1 + SLOPE @ cross[:, None]])[None])
    return float(torch.linalg.solve(torch.cat(rows), torch.cat([T, T.new_zeros(1)]))[2])


@pytest.mark.parametrize(
    ("make", "weight"),
    [
        (lambda c: VPBGD(c, step_size=0.7, num_steps=2), H),
        (GPBGD, H @ H),
        (lambda c: MEHA(c, step_size=0.4), H - torch.linalg.solve(torch.eye(2) + H, H)),
    ],
    ids=["v-pbgd", "g-pbgd", "meha"],
)
def test_ends_where_the_penalised_loss_is_least(make: Any, weight: Tensor) -> None:
    """A point that is O(1/penalty) from the bilevel solution, and exactly known."""
    bias = []
    for penalty, steps in ((5.0, 60), (10.0, 100)):
        x = ended(small(), make(penalty), 0.3 / penalty, 0.6 / penalty, steps)
        assert x == pytest.approx(penalised(penalty * weight), abs=2e-3)
        bias.append(abs(penalised(penalty * weight) - BEST))
    assert bias[1] / bias[0] == pytest.approx(0.55, abs=0.06)


@pytest.mark.parametrize(("rate", "steps"), [(0.1, 30), (0.05, 60)])
def test_bome_stays_by_the_solution_as_near_as_its_step_size(rate: float, steps: int) -> None:
    """Its theory bounds the distance to the bilevel solution by the step size, and no closer."""
    problem = small()
    lower = next(problem.lower.parameters())
    with torch.no_grad():
        next(problem.upper.parameters()).fill_(BEST)
        lower.copy_(SLOPE * BEST)
    x = ended(problem, BOME(step_size=0.7), rate, rate, steps)
    assert x == pytest.approx(BEST, abs=rate / 2)
    assert (lower.detach() - SLOPE * x).norm() < 2 * rate


def counterexample() -> Problem:
    """G = y_1^2/2 - x y_1 leaves y_2 free; F = (x - y_2)^2/2 + (y_1 - 1)^2/2 wants x = y = 1."""

    def upper_loss(x: Any, y: Any, batch: Any) -> Tensor:
        return (x["x"] - y["y"][1]).square() / 2 + (y["y"][0] - 1).square() / 2

    def lower_loss(x: Any, y: Any, batch: Any) -> Tensor:
        return y["y"][0].square() / 2 - x["x"] * y["y"][0]

    zero = torch.zeros((), dtype=torch.float64)
    return Problem.from_functions(
        upper_loss, lower_loss, {"x": zero}, {"y": torch.zeros(2).double()}
    )


def test_bda_takes_the_right_one_of_many_lower_solutions() -> None:
    """The paper's counterexample: unrolling leaves y_2 = 0 and ends at 1/2, the solution is 1."""
    found = {}
    for name, solver in {
        "bda": BDA(20, aggregation=1.0, step_size=0.5, upper_step_size=1.0),
        "unrolled": Unrolled(20),
    }.items():
        problem = counterexample()
        upper = torch.optim.SGD(problem.upper.parameters(), 0.5)
        lower = torch.optim.SGD(problem.lower.parameters(), 0.5)
        run = {"upper_optimizer": upper, "lower_optimizer": lower, "lower_steps": 0}
        for _ in train(problem, solver=solver, num_steps=15, **run):
            pass
        found[name] = float(next(problem.upper.parameters()).detach())
    assert found["unrolled"] == pytest.approx(0.5, abs=1e-3)
    assert found["bda"] == pytest.approx(1.0, abs=0.05)


def test_bda_is_the_derivative_of_its_own_steps() -> None:
    problem, solver = Quadratic(), BDA(5, step_size=0.2, upper_step_size=0.3)

    def value(x: Tensor) -> Tensor:
        moved = copy.deepcopy(problem)
        with torch.no_grad():
            moved.upper["x"].copy_(x)
        return solver.hypergradient(moved).value

    found, x = solver.hypergradient(problem).grad["x"], problem.upper["x"].detach()
    for i, step in enumerate(1e-5 * torch.eye(3, dtype=torch.float64)):
        assert float(found[i]) == pytest.approx(float(value(x + step) - value(x - step)) / 2e-5)


# ------------------------------------------------------------------ states

KEEPING = [
    F2SA(100.0, step_size=0.1),
    F2BA(step_size=0.1),
    F2SAp(step_size=0.1),
    VPBGD(step_size=0.1),
    GPBGD(),
    MEHA(step_size=0.1),
]
EVERY = [*KEEPING, BOME(step_size=0.1), BDA(3, step_size=0.1)]


def named(solver: Solver) -> str:
    return type(solver).__name__


def test_memory_does_not_grow_from_call_to_call() -> None:
    problem = Quadratic()
    states: list[Any] = [None for _ in KEEPING]
    counts = []
    for call in range(5):
        for i, solver in enumerate(KEEPING):
            states[i] = solver.hypergradient(problem, state=states[i]).state
        if call in (1, 4):
            gc.collect()
            counts.append(sum(issubclass(type(o), Tensor) for o in gc.get_objects()))
    assert counts[0] == counts[1]
    assert not any(t.requires_grad for t in optree.tree_leaves(states) if isinstance(t, Tensor))


@pytest.mark.parametrize("solver", EVERY, ids=named)
def test_nan_is_not_hidden(solver: Solver) -> None:
    problem = Quadratic()
    problem.t[0] = torch.nan
    answer = solver.hypergradient(problem, throw=False)
    shown = [answer.value, *answer.grad.values(), *(answer.lower_grad or {}).values()]
    assert any(part.isnan().any() for part in shown)
    assert answer.value.isnan()
    problem = Quadratic()
    problem.c[0] = torch.nan
    answer = solver.hypergradient(problem, throw=False)
    shown = [*answer.grad.values(), *(answer.lower_grad or {}).values()]
    assert any(part.isnan().any() for part in shown)


@pytest.mark.parametrize("solver", [BOME(), VPBGD(), GPBGD(), MEHA(), F2SA(100.0)], ids=named)
def test_the_lower_optimizer_keeps_its_state(solver: Solver) -> None:
    """D8: it is the user's own, it takes every step, and the copies' step size is its rate."""
    problem = Quadratic()
    lower = torch.optim.Adam(problem.lower.parameters(), 1e-3)
    upper = torch.optim.SGD(problem.upper.parameters(), 1e-3)
    for _ in train(
        problem, upper_optimizer=upper, lower_optimizer=lower, solver=solver, num_steps=3
    ):
        pass
    (moments,) = lower.state.values()
    assert int(moments["step"]) == 3


def test_copies_follow_the_schedule_and_leave_constants_alone() -> None:
    class Two(Quadratic):
        def __init__(self) -> None:
            super().__init__()
            self.lower["fixed"] = nn.Parameter(torch.ones(4, dtype=torch.float64))

        def lower_loss(self, batch: Any) -> Tensor:
            return super().lower_loss(batch) + self.lower["fixed"] @ self.lower["y"]

    problem = Two()
    optimizer = torch.optim.SGD([problem.lower["y"]], 0.1)
    solver = VPBGD(num_steps=1)
    first = solver.hypergradient(problem, lower_optimizer=optimizer).state
    optimizer.param_groups[0]["lr"] = 0.05
    second = solver.hypergradient(problem, lower_optimizer=optimizer).state
    way, half = (s["omega"]["y"] - problem.lower["y"].detach() for s in (first, second))
    torch.testing.assert_close(half, way / 2)
    torch.testing.assert_close(first["omega"]["fixed"], problem.lower["fixed"].detach())
    own = VPBGD(step_size=0.1).hypergradient(problem, lower_optimizer=optimizer).state
    torch.testing.assert_close(own["omega"]["fixed"], problem.lower["fixed"].detach())


# ------------------------------------------------------------------ what was wrong elsewhere


def test_the_penalty_on_the_gradient_norm_has_a_gradient() -> None:
    """D6: without the lower gradient's own graph the penalty had no effect at all."""
    problem = Quadratic()
    variables = [problem.upper["x"], problem.lower["y"]]
    (slope,) = torch.autograd.grad(problem.lower_loss(None), variables[1:], create_graph=True)
    loss = problem.upper_loss(None) + 3 * slope.square().sum() / 2
    wanted = torch.autograd.grad(loss, variables)
    answer = GPBGD(3.0).hypergradient(problem)
    assert answer.lower_grad is not None
    torch.testing.assert_close((answer.grad["x"], answer.lower_grad["y"]), wanted)


@pytest.mark.parametrize("distance", [0.0, 1e-15, 1e-8, 1e-3])
def test_nothing_is_divided_by_a_constraint_that_is_rounding(distance: float) -> None:
    """D9: near the lower solution the barrier's share stays below the upper loss's own gradient."""
    problem = Quadratic().solve()
    with torch.no_grad():
        problem.lower["y"].add_(distance * normal(4, seed=8))
    kept = Alternating().hypergradient(problem)
    answer = BOME(step_size=0.4).hypergradient(problem)
    (of_y,) = torch.autograd.grad(problem.upper_loss(None), [problem.lower["y"]])
    assert answer.lower_grad is not None
    most = 2 * float(of_y.norm() + kept.grad["x"].norm())
    assert float(answer.stats.response_norm) < most
    assert float(answer.lower_grad["y"].norm()) < most


def test_the_order_of_the_copies_in_a_state_does_not_matter() -> None:
    problem, solver = Quadratic(), F2SAp(4, 100.0, num_steps=3, step_size=0.1)
    state = solver.hypergradient(problem).state
    other = state | {"copies": dict(reversed(state["copies"].items()))}
    one, two = (solver.hypergradient(problem, state=s).grad["x"] for s in (state, other))
    assert torch.equal(one, two)


# ------------------------------------------------------------------ what is said


def warned(solver: Solver, problem: Problem) -> Hypergradient:
    """Warned at the first call of a run, and never again."""
    with pytest.warns(RuntimeWarning, match=r"theory") as said:
        answer = solver.hypergradient(problem)
    assert len(said) == 1
    return solver.hypergradient(problem, state=answer.state)


@pytest.mark.parametrize(
    "solver", [F2SA(0.3, step_size=0.1), F2SAp(2, 0.3, step_size=0.1)], ids=named
)
def test_a_small_penalty_is_named_with_what_is_needed(solver: Solver) -> None:
    problem = Quadratic()
    with pytest.warns(
        RuntimeWarning, match=r"the penalty 0.3 of `F2SAp?` is below [\d.]+, the least"
    ):
        solver.hypergradient(problem)
    warned(solver, problem)
    F2SA(20.0, step_size=0.1).hypergradient(problem)  # 2 L / mu = 4


def test_a_penalised_loss_that_falls_away_is_named() -> None:
    class Falling(Quadratic):
        def upper_loss(self, batch: Any) -> Tensor:
            return -3 * self.lower["y"].square().sum() + self.upper["x"].square().sum()

    with pytest.warns(RuntimeWarning, match=r"penalty 1 of `VPBGD` .* curves down by 6"):
        VPBGD(1.0, step_size=0.1).hypergradient(Falling())
    warned(VPBGD(1.0, step_size=0.1), Falling())
    VPBGD(20.0, step_size=0.1).hypergradient(Falling())


def test_a_penalty_that_grows_past_what_is_needed_is_not_named() -> None:
    class Falling(Quadratic):
        def upper_loss(self, batch: Any) -> Tensor:
            return -3 * self.lower["y"].square().sum() + self.upper["x"].square().sum()

    VPBGD(1.0, growth=0.1, step_size=0.1).hypergradient(Falling())  # a warning would be an error
    with pytest.warns(RuntimeWarning, match=r"the penalty 1 of `VPBGD`"):
        VPBGD(1.0, max_penalty=100.0, step_size=0.1).hypergradient(Falling())  # it stays at 1


def test_an_envelope_with_several_minima_is_named() -> None:
    class Rough(Quadratic):
        def lower_loss(self, batch: Any) -> Tensor:
            return (3 * self.lower["y"]).cos().sum() + self.lower["y"].sum() * self.upper["x"].sum()

    problem = Rough()
    with torch.no_grad():
        problem.lower["y"].fill_(0.1)
    with pytest.warns(RuntimeWarning, match=r"`smoothing` = 1 of `MEHA` is not below 0\.\d+"):
        MEHA(step_size=0.01).hypergradient(problem)
    MEHA(smoothing=0.02, step_size=0.01).hypergradient(problem)


@pytest.mark.parametrize(
    "solver", [type(s)(**({"num_steps": 2} if s == EVERY[-1] else {})) for s in EVERY], ids=named
)
def test_without_a_step_size_there_must_be_an_optimizer(solver: Solver) -> None:
    if named(solver) == "GPBGD":
        return  # takes no steps of its own
    with pytest.raises(
        ValueError, match=rf"`{named(solver)}` moves .* give `{named(solver)}` a `step_"
    ):
        solver.hypergradient(Quadratic())


def test_a_check_says_what_a_direction_of_both_levels_is() -> None:
    check = check_hypergradient(Quadratic(), VPBGD(step_size=0.1), num_directions=1)
    assert not check.passed
    assert "moves both levels at once" in check.verdict


@pytest.mark.parametrize("solver", EVERY, ids=named)
def test_a_problem_without_a_lower_level_is_refused(solver: Solver) -> None:
    problem = Quadratic()
    problem.lower.requires_grad_(False)
    with pytest.raises(ValueError, match=rf"`{named(solver)}` needs a lower level, but `Quadratic"):
        solver.hypergradient(problem)


@pytest.mark.parametrize("solver", EVERY, ids=named)
def test_a_stopped_lower_gradient_is_refused(solver: Solver) -> None:
    class Stopped(Quadratic):
        stops_lower_gradient = "a part of the lower loss is detached; use `Alternating(...)`"

    with pytest.raises(ValueError, match=rf"`{named(solver)}` needs the true gradient of both"):
        solver.hypergradient(Stopped())


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: F2SA(penalty=0.0), "`penalty` must be positive"),
        (lambda: F2SA(growth=-1.0), "`growth` must be zero or more"),
        (
            lambda: VPBGD(penalty=3.0, max_penalty=2.0),
            "`max_penalty` must not be below `penalty` = 3",
        ),
        (lambda: F2SAp(order=0), "`order` must lie between 1 and 10, got 0"),
        (lambda: MEHA(power=0.5), "`power` must be below 1/2, got 0.5"),
        (lambda: MEHA(smoothing=-1.0), "`smoothing` must be positive"),
        (lambda: BDA(3, aggregation=2.0), "`aggregation` must not exceed 1, got 2.0"),
        (lambda: BOME(barrier=0.0), "`barrier` must be positive"),
    ],
)
def test_settings_out_of_range_are_refused(make: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()

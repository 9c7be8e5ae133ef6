"""Single-loop solvers: what the tables, the recursive estimates and the momenta must be."""

from typing import Any

import optree
import pytest
import torch
from torch import Tensor

from bilevel import (
    FSLA,
    MASOBA,
    MRBO,
    SABA,
    SOBA,
    SRBA,
    SUSTAIN,
    TTSA,
    AmIGO,
    Cholesky,
    Hypergradient,
    Implicit,
    Neumann,
    Problem,
    Solver,
    StocBiO,
    train,
)
from tests.problems import Quadratic, Ridge, nested, normal, regression, spd

DATA, OTHER = regression(8, seed=7), regression(8, seed=9)  # 3 blocks of up to 3 rows
VECTOR = torch.tensor([0.3, -0.5, 0.2], dtype=torch.float64)


def sgd(level: Any, lr: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD(level.parameters(), lr)


def answer(solver: Solver, problem: Problem, state: Any = None) -> Hypergradient:
    return solver.hypergradient(
        problem, OTHER, [DATA], state=state, lower_optimizer=sgd(problem.lower)
    )


def at(state: Any, vector: Tensor = VECTOR) -> Any:
    """The state with another v."""
    return vector if isinstance(state, Tensor) else state | {"vector": vector}


def directions(found: Hypergradient) -> list[Tensor]:
    """Of x, of y, and v after its step."""
    assert found.lower_grad is not None
    vector = found.state if isinstance(found.state, Tensor) else found.state["vector"]
    return [*found.grad.values(), *found.lower_grad.values(), vector]


def assert_close(found: list[Tensor], wanted: list[Tensor]) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-13, atol=1e-14)


def at_ease() -> Quadratic:
    """A quadratic whose three systems are well conditioned, so that few steps solve it."""
    problem = Quadratic(2, 2)
    problem.H.copy_(torch.diag(torch.tensor([1.0, 1.25])))
    problem.B.copy_(torch.eye(2))
    return problem


EXACT = {
    "soba": SOBA(),
    "masoba": MASOBA(weight=0.7),
    "fsla": FSLA(),
    "saba": SABA(),
    "srba": SRBA(),
    "mrbo": MRBO(num_terms=11),
    "stocbio": StocBiO(num_terms=11),
    "amigo": AmIGO(num_steps=2),
}


@pytest.mark.parametrize("name", EXACT)
def test_on_all_rows_they_converge_to_the_closed_form(name: str) -> None:
    problem = at_ease()
    steps, rate = {"mrbo": (60, 0.4)}.get(
        name, (120, 0.2) if EXACT[name].moves_lower else (50, 0.7)
    )
    for _ in train(
        problem,
        solver=EXACT[name],
        num_steps=steps,
        upper_optimizer=sgd(problem.upper, rate),
        lower_optimizer=sgd(problem.lower, 0.9),
    ):
        pass
    assert problem.hypergradient().norm() < 1e-10
    assert (problem.lower["y"] - problem.best_response(None)["y"]).norm() < 1e-10


def test_nothing_is_said_of_a_first_direction_that_is_still_0() -> None:
    """v begins at 0, and an upper loss without x has no direct term: a warning would be an error."""
    problem = Ridge()
    steps = train(
        problem,
        DATA,
        solver=SOBA(),
        num_steps=2,
        upper_optimizer=sgd(problem.upper),
        lower_optimizer=sgd(problem.lower),
    )
    first, second = (float(step.hypergradient.grad["log_l2"].norm()) for step in steps)
    assert first == 0
    assert second > 0


def test_a_falling_learning_rate_reaches_v() -> None:
    problem = Ridge()
    optimizer = torch.optim.SGD(problem.lower.parameters(), 0.1)
    far, near = [], []
    for rate, moves in ((0.1, far), (0.05, near)):
        optimizer.param_groups[0]["lr"] = rate
        found = SOBA().hypergradient(
            problem, OTHER, [DATA], state=VECTOR, lower_optimizer=optimizer
        )
        moves.append(found.state - VECTOR)
    assert_close(far, [2 * near[0]])


def test_a_table_is_unbiased_whatever_it_holds() -> None:
    """The mean of SABA's directions over the blocks is the direction on all rows."""
    problem = Ridge()
    data, other = regression(9, seed=7), regression(9, seed=9)
    optimizer = sgd(problem.lower)

    def found(solver: Solver, state: Any) -> Hypergradient:
        return solver.hypergradient(problem, other, [data], state=state, lower_optimizer=optimizer)

    saba = SABA(batch_size=3)
    state = saba.hypergradient(problem, other, [data], lower_optimizer=optimizer).state
    with torch.no_grad():
        problem.lower["w"].add_(0.3)  # what the table holds is of another point now
    one_pass = [
        torch.cat(directions(found(saba, at(state) | {"calls": call}))) for call in range(3)
    ]
    assert len({tuple(d.tolist()) for d in one_pass}) == 3
    assert_close([torch.stack(one_pass).mean(0)], [torch.cat(directions(found(SOBA(), VECTOR)))])


def test_a_table_of_the_point_itself_gives_the_full_derivatives() -> None:
    """Blocks of unequal size among them."""
    problem, saba = Ridge(), SABA(batch_size=3)
    state = None
    for _ in range(3):
        found = answer(saba, problem, state if state is None else at(state))
        state = found.state
        if found.state["calls"] == 1:
            state = answer(saba, problem, at(found.state) | {"calls": 0}).state
    whole = answer(SOBA(), problem, VECTOR)
    for call in range(3, 6):
        assert_close(
            directions(answer(saba, problem, at(state) | {"calls": call})), directions(whole)
        )


def test_a_recursive_estimate_is_exact_at_a_restart_and_carried_between() -> None:
    problem, srba = Ridge(), SRBA(batch_size=3, period=2)
    first = answer(srba, problem, at(answer(srba, problem).state) | {"calls": 0})
    assert_close(directions(first), directions(answer(SOBA(), problem, VECTOR)))
    # nothing has moved: whatever the rows, the difference is 0
    second = answer(srba, problem, at(first.state))
    assert_close(directions(second), directions(first))
    with torch.no_grad():
        problem.lower["w"].add_(0.3)
    moved = answer(srba, problem, at(first.state))
    whole = answer(SOBA(), problem, VECTOR)
    assert moved.lower_grad is not None
    assert whole.lower_grad is not None
    assert (moved.lower_grad["w"] - whole.lower_grad["w"]).norm() > 1e-3
    again = answer(srba, problem, at(moved.state))
    assert_close(directions(again), directions(whole))


@pytest.mark.parametrize("mixed", [False, True])
def test_memory_is_what_the_state_holds(mixed: bool) -> None:
    problem = nested(mixed=mixed)
    optimizer = sgd(problem.lower)
    upper, lower = (torch.zeros(n, 1) for n in (5, 8))
    for solver in (saba := SABA(batch_size=3), srba := SRBA(batch_size=3)):
        stated = saba.memory(problem, upper, lower) if solver is saba else srba.memory(problem)
        state = None
        for _ in range(2):
            state = solver.hypergradient(
                problem, upper, [lower], state=state, lower_optimizer=optimizer
            ).state
            held = [t for t in optree.tree_leaves(state) if isinstance(t, Tensor)]
            assert sum(t.numel() * t.element_size() for t in held) == stated


@pytest.mark.parametrize("solver", [MASOBA(weight=1.0), FSLA(eta=1.0)])
def test_without_memory_the_momenta_are_soba(solver: Solver) -> None:
    problem = Ridge()
    states: list[Any] = [None, None]
    for _ in range(3):
        one, two = (
            answer(s, problem, state) for s, state in zip((SOBA(), solver), states, strict=True)
        )
        assert_close(directions(two), directions(one))
        states = [one.state, two.state]
        with torch.no_grad():
            problem.lower["w"].add_(0.1)


def test_on_one_batch_a_stochastic_sum_is_the_neumann_series() -> None:
    problem = Ridge()
    one = answer(StocBiO(num_terms=4, step_size=0.2), problem)
    two = answer(Implicit(Neumann(num_steps=5, step_size=0.2)), problem)
    assert_close(list(one.grad.values()), list(two.grad.values()))


def two_parts() -> Problem:
    """A quadratic whose Hessian mixes two lower variables."""
    H = spd(4)
    return Problem.from_functions(
        lambda x, y, _: (torch.cat([y["a"], y["b"]]) - 1).square().sum() / 2,
        lambda x, y, _: (
            (v := torch.cat([y["a"], y["b"]])) @ H @ v / 2 - v.sum() * x["x"].square().sum()
        ),
        {"x": normal(2)},
        {"a": normal(2, seed=1), "b": normal(2, seed=2)},
    )


@pytest.mark.parametrize("solver", [StocBiO(num_terms=160), MRBO(num_terms=160)])
def test_a_stochastic_sum_takes_a_learning_rate_for_each_variable(solver: Solver) -> None:
    problem = two_parts()
    a, b = problem.lower.parameters()
    optimizer = torch.optim.SGD([{"params": [a], "lr": 0.2}, {"params": [b], "lr": 0.3}])
    found = solver.hypergradient(problem, lower_optimizer=optimizer)
    wanted = Implicit(Cholesky()).hypergradient(problem)
    torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-6, atol=0)


def test_the_linear_system_leaves_out_what_no_optimizer_moves() -> None:
    problem = two_parts()
    for others in ([], [torch.nn.Parameter(torch.zeros(1))]):
        a, _ = problem.lower.parameters()
        groups = [{"params": [p], "lr": 0.1} for p in (a, *others)]
        for solver in (SOBA(), SOBA(step_size=0.2)):
            found = solver.hypergradient(problem, lower_optimizer=torch.optim.SGD(groups))
            assert found.state[:2].all()
            assert not found.state[2:].any()


@pytest.mark.parametrize("drawn", [TTSA, SUSTAIN])
def test_as_many_products_are_told_as_were_taken(drawn: Any) -> None:
    problem, told = Ridge(), set()
    plain = answer(drawn(num_terms=1, step_size=0.2), problem).grad["log_l2"]
    for seed in range(8):
        found = answer(drawn(num_terms=3, step_size=0.2, seed=seed), problem)
        told.add(found.stats.num_products)
        if not found.stats.num_products and drawn is TTSA:
            assert_close([found.grad["log_l2"]], [3 * plain])
    assert told == ({0, 1, 2} if drawn is TTSA else {0, 2, 4})


@pytest.mark.parametrize(
    ("drawn", "whole"),
    [
        (TTSA, StocBiO(num_terms=2, step_size=0.2)),
        (SUSTAIN, MRBO(num_terms=2, step_size=0.2)),
    ],
)
def test_the_mean_of_the_drawn_terms_is_their_sum(drawn: Any, whole: Solver) -> None:
    problem = Ridge()
    terms = {
        tuple(answer(drawn(num_terms=3, step_size=0.2, seed=s), problem).grad["log_l2"].tolist())
        for s in range(12)
    }
    assert len(terms) == 3
    mean = torch.tensor(sorted(terms), dtype=torch.float64).mean(0)
    assert_close([mean], [answer(whole, problem).grad["log_l2"]])


def test_bad_settings_and_batches_are_refused() -> None:
    problem = Ridge()
    for solver in EXACT.values():
        with pytest.raises(ValueError, match=r"there is none; give `.*` a `step_size`"):
            solver.hypergradient(problem, OTHER, [DATA])
    with pytest.raises(ValueError, match=r"`weight` must lie in \(0, 1\]"):
        MASOBA(weight=1.5)
    saba = SABA(batch_size=3)
    state = answer(saba, problem).state
    with pytest.raises(ValueError, match=r"needs all rows at every step.*had 3 blocks"):
        saba.hypergradient(
            problem, OTHER, [regression(20)], state=state, lower_optimizer=sgd(problem.lower)
        )
    uneven = DATA[0], DATA[1][:4]
    with pytest.raises(ValueError, match=r"tensors of the batch have \[4, 8\] rows"):
        saba.hypergradient(problem, OTHER, [uneven], lower_optimizer=sgd(problem.lower))

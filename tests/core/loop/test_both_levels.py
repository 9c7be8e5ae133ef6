"""A solver that moves both levels at once, and one that keeps variables of its own."""

from dataclasses import dataclass
from typing import Any, ClassVar, final

import optree
import pytest
import torch
import torch._inductor

from bilevel import Directions, Oracles, Problem, Solver, train
from bilevel.optimizers import Optimizers
from tests.problems import ROWS, Quadratic


@final
@dataclass(frozen=True)
class Together(Solver):
    """Partial gradients of both levels; counts its calls, and keeps the sum of the lower ones."""

    moves_lower: ClassVar[bool] = True

    def begin(self, oracles: Oracles) -> Any:
        return 0, optree.tree_map(torch.zeros_like, oracles.lower)

    def num_lower_batches(self) -> int:
        return 1

    def respond(
        self, oracles: Oracles, state: Any, lower_optimizer: Optimizers | None
    ) -> Directions:
        upper, lower = oracles.upper, oracles.lower
        evaluation, direct, _ = oracles.partials("upper", upper, lower)
        _, response, down = oracles.partials("lower", upper, lower)
        count, total = state
        total = {name: total[name] + g for name, g in down.items()}
        return Directions(evaluation, direct, response, down, (count + 1, total))


def optimizers(problem: Problem) -> dict[str, torch.optim.Optimizer]:
    return {
        "upper_optimizer": torch.optim.SGD(problem.upper.parameters(), 0.1),
        "lower_optimizer": torch.optim.SGD(problem.lower.parameters(), 0.2, weight_decay=0.1),
    }


@pytest.mark.parametrize("compile", [False, True])
def test_both_levels_move_at_once(compile: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._inductor, "compile", lambda graph, inputs, options: graph)
    problem, mine = Quadratic(), Quadratic()
    x, y = mine.upper["x"], mine.lower["y"]
    total = torch.zeros_like(y)
    run = train(problem, solver=Together(), num_steps=5, compile=compile, **optimizers(problem))
    for step in run:
        (of_x,) = torch.autograd.grad(mine.upper_loss(None), [x])
        more, of_y = torch.autograd.grad(mine.lower_loss(None), [x, y])
        with torch.no_grad():
            total += of_y
            x -= 0.1 * (of_x + more)
            y -= 0.2 * (of_y + 0.1 * y)
        torch.testing.assert_close(problem.upper["x"], x)
        torch.testing.assert_close(problem.lower["y"], y)
        assert step.hypergradient.lower_grad is not None
        count, kept = step.state.solver_state
        assert count == step.number
        torch.testing.assert_close(kept["y"], total)


def test_what_neither_loss_uses_stays_where_it_is() -> None:
    """Also under weight decay, as with the gradients that an optimizer gets from `backward`."""
    row = ROWS["frozen and unused"]
    problem = row.make()
    before = problem.lower.unused.weight.clone()
    data = row.upper_batch
    *_, step = train(problem, data, solver=Together(), num_steps=2, **optimizers(problem))
    assert torch.equal(problem.lower.unused.weight, before)
    assert "unused.weight" not in (step.hypergradient.lower_grad or {})


def test_lower_steps_besides_are_refused() -> None:
    problem = Quadratic()
    with pytest.raises(ValueError, match="`Together` moves the lower variables together"):
        train(problem, solver=Together(), num_steps=1, lower_steps=2, **optimizers(problem))


def test_it_needs_a_lower_optimizer() -> None:
    problem = Quadratic()
    upper = optimizers(problem)["upper_optimizer"]
    with pytest.raises(ValueError, match=r"moves the lower variables by the `lower_optimizer`"):
        train(problem, solver=Together(), num_steps=1, upper_optimizer=upper)

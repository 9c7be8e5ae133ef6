"""Batches in pieces: the answer of one batch, with the memory of a piece."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torchopt
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from bilevel import (
    GMRES,
    MEHA,
    Alternating,
    Cholesky,
    ConjugateGradient,
    Implicit,
    LowerLevel,
    Pieces,
    Problem,
    Solver,
    Unrolled,
    train,
)
from tests.problems import ROWS, normal, regression

SOLVERS: list[Solver] = [
    Alternating(),
    Implicit(ConjugateGradient(damping=1.0)),
    Implicit(Cholesky(damping=1.0)),
    Implicit(GMRES(damping=1.0)),
    Unrolled(2, optimizer=torchopt.sgd(0.1)),
]


class Meter:
    """How many numbers autograd keeps at most."""

    def __init__(self) -> None:
        self.now = self.peak = 0

    def kept(self, tensor: Tensor) -> Any:
        return Kept(self, tensor.detach())


class Kept:
    def __init__(self, meter: Meter, tensor: Tensor) -> None:
        self.meter, self.tensor = meter, tensor
        meter.now += tensor.numel()
        meter.peak = max(meter.peak, meter.now)

    def __del__(self) -> None:
        self.meter.now -= self.tensor.numel()


def peak(run: Callable[[], Any]) -> tuple[Any, int]:
    meter = Meter()
    with saved_tensors_hooks(meter.kept, lambda kept: kept.tensor):
        answer = run()
    return answer, meter.peak


def in_pieces(batch: tuple[Tensor, ...], *sizes: int) -> Pieces:
    parts = [part.split(list(sizes)) for part in batch]
    return Pieces(list(zip(*parts, strict=True)))


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_unequal_pieces_give_the_answer_of_one_batch_with_the_memory_of_one_piece(
    solver: Solver,
) -> None:
    problem = ROWS["tanh network"].make()
    upper, lower = regression(200, seed=1), regression(200, seed=2)
    sizes = (30, 30, 30, 30, 30, 30, 20)
    pieces = in_pieces(upper, *sizes), in_pieces(lower, *sizes)
    whole, most = peak(lambda: solver.hypergradient(problem, upper, [lower]))
    found, least = peak(lambda: solver.hypergradient(problem, pieces[0], [pieces[1]]))
    torch.testing.assert_close(found.grad, whole.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.value, whole.value, rtol=1e-12, atol=1e-12)
    assert found.stats.num_products == whole.stats.num_products
    if solver.unrolled_steps() is None:
        assert least < most / 4


def test_a_penalty_method_keeps_one_piece_at_a_time() -> None:
    problem, solver = ROWS["tanh network"].make(), MEHA(step_size=0.1)
    upper, lower = regression(200, seed=1), regression(200, seed=2)
    sizes = (30, 30, 30, 30, 30, 30, 20)
    pieces = in_pieces(upper, *sizes), in_pieces(lower, *sizes)
    optimizer = torch.optim.SGD(problem.lower.parameters(), 0.1)
    run = partial(solver.hypergradient, problem, lower_optimizer=optimizer)
    whole, most = peak(lambda: run(upper, [lower]))
    found, least = peak(lambda: run(pieces[0], [pieces[1]]))
    torch.testing.assert_close(found.grad, whole.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.lower_grad, whole.lower_grad, rtol=1e-12, atol=1e-12)
    assert least < most / 4


def test_weights_pieces_beside_batches_and_logs() -> None:
    row = ROWS["logistic with logs"]
    problem, solver = row.make(), Implicit(Cholesky())
    inputs, labels = row.lower_batch
    one, two = (inputs[:12], labels[:12]), (inputs[12:], labels[12:])
    several = solver.hypergradient(problem, row.upper_batch, [one, two])
    equal = solver.hypergradient(problem, row.upper_batch, [Pieces([one, two], [1, 1])])
    mixed = solver.hypergradient(problem, row.upper_batch, [Pieces([one]), two])
    for found in (equal, mixed):
        torch.testing.assert_close(found.grad, several.grad, rtol=1e-12, atol=1e-12)
    upper = in_pieces(row.upper_batch, 15, 5)
    logged = solver.hypergradient(problem, upper, [one]).logs["accuracy"]
    whole = solver.hypergradient(problem, row.upper_batch, [one]).logs["accuracy"]
    torch.testing.assert_close(logged, whole)


def trained(data: Any, **settings: Any) -> Problem:
    problem = ROWS["ridge"].make()
    run: dict[str, Any] = {
        "num_steps": 3,
        "upper_optimizer": torch.optim.SGD(problem.upper.parameters(), 0.1),
        "lower_optimizer": torch.optim.SGD(problem.lower.parameters(), 0.1),
        "solver": Implicit(),
    }
    for _ in train(problem, data, **(run | settings)):
        pass
    return problem


def test_a_run_accumulates_and_equals_the_run_with_large_batches() -> None:
    data = regression(10)
    for settings in ({"lower_steps": 2}, {"lower_solver": LowerLevel.solution}):
        whole, found = trained(data, **settings), trained(data, accumulate=3, **settings)
        for name, p in whole.named_parameters():
            torch.testing.assert_close(found.get_parameter(name), p, rtol=1e-10, atol=1e-12)
    with pytest.raises(ValueError, match="leave out `compile`"):
        trained(data, accumulate=3, compile=True)


def test_implicit_draws_as_many_lower_batches_as_it_is_told() -> None:
    drawn = []

    class Counted(Problem):
        def __init__(self) -> None:
            super().__init__()
            one = ROWS["ridge"].make()
            self.upper, self.lower, self.one = one.upper, one.lower, one

        def draw(self, data: Any, generator: torch.Generator) -> Any:
            drawn.append(data)
            return data

        def upper_loss(self, batch: Any) -> Tensor:
            return self.one.upper_loss(batch)

        def lower_loss(self, batch: Any) -> Tensor:
            return self.one.lower_loss(batch)

    problem, solver = Counted(), Implicit(lower_batches=4)
    sgd = torch.optim.SGD(problem.upper.parameters(), 0.1)
    next(
        train(problem, regression(32), upper_data=regression(8), batch_size=4, lower_steps=0,
              upper_optimizer=sgd, num_steps=1, solver=solver)
    )  # fmt: skip
    assert len(drawn) == 5  # the upper batch, four lower ones
    assert str(solver).endswith("check_every=1), lower_batches=4)")
    assert "lower_batches" not in str(Implicit())
    assert copy.deepcopy(solver) == solver


def test_misfits_of_pieces_are_refused() -> None:
    with pytest.raises(ValueError, match="2 pieces and 1 weights"):
        Pieces([normal(2), normal(2)], [1.0])
    with pytest.raises(ValueError, match="no tensor whose rows could be counted; give `weights`"):
        Pieces([None, None])
    with pytest.raises(TypeError, match="`batches` must be a list of batches"):
        Pieces(normal(3))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`weights`"):
        Pieces([normal(2)], [-1.0])

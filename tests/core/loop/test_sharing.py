"""What both losses compute alike is computed once; averages and mixed precision of the loop."""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from bilevel import Alternating, Batches, Implicit, Problem, Solver, train
from bilevel.moving_average import MovingAverage

DATA = torch.randn(12, 3, generator=torch.Generator().manual_seed(0), dtype=torch.double)


class Batch(NamedTuple):
    rows: Tensor
    made: Tensor | None = None


class Plain(Problem):
    """A generator at the lower level that both losses look at, with batch norm and power iterations."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        critic = nn.utils.parametrizations.spectral_norm(nn.Linear(3, 5))
        self.upper = nn.Sequential(critic, nn.Tanh(), nn.Linear(5, 1)).double()
        self.lower = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
        self.forwards = 0

    def draw(self, data: Tensor, generator: torch.Generator) -> Batch:
        return Batch(data)

    def make(self, batch: Batch) -> Tensor:
        self.forwards += 1
        made: Tensor = self.lower(batch.rows)
        return made

    def made(self, batch: Batch) -> Tensor:
        return self.make(batch) if batch.made is None else batch.made

    def upper_loss(self, batch: Batch) -> Tensor:
        return self.upper(batch.rows).mean() - self.upper(self.made(batch)).mean()

    def lower_loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        size = self.made(batch).square().mean()
        return self.upper(self.made(batch)).mean() + size, {"size": size}


class Sharing(Plain):
    """The same, with what both look at computed once."""

    def share(self, batch: Batch) -> Batch:
        return batch._replace(made=self.make(batch))


def run(
    problem: Plain,
    solver: Solver | None = None,
    *,
    lower_steps: int = 2,
    num_steps: int = 4,
    order: Any = "upper_first",
    **options: Any,
) -> Plain:
    for _ in train(
        problem,
        Batches(DATA, 6, seed=0),
        solver=solver,
        upper_optimizer=torch.optim.Adam(problem.upper.parameters(), 1e-2),
        lower_optimizer=torch.optim.SGD(problem.lower.parameters(), 0.1),
        num_steps=num_steps,
        order=order,
        lower_steps=lower_steps,
        **options,
    ):
        pass
    return problem


def assert_same_parameters(a: Plain, b: Plain) -> None:
    theirs = dict(b.named_parameters())
    for name, p in a.named_parameters():
        torch.testing.assert_close(p, theirs[name], rtol=0, atol=1e-12, msg=name)


def test_sharing_changes_no_variable_and_saves_forward_passes() -> None:
    plain, sharing = run(Plain()), run(Sharing())
    assert_same_parameters(plain, sharing)
    rehearsal = 2 * 3  # both losses of the first turn, evaluated twice before anything moves
    assert plain.forwards == rehearsal + 4 * (1 + 2 * 2)
    assert sharing.forwards == rehearsal + 1 + 4 * (1 + 2)  # what is shared is looked at, too


@pytest.mark.usefixtures("traced_only")
def test_a_shared_computation_is_compiled_with_both_steps() -> None:
    assert_same_parameters(run(Plain()), run(Sharing(), compile=True))


@pytest.mark.parametrize(
    ("solver", "options"),
    [
        (Implicit(), {"lower_steps": 1}),
        (Alternating(), {"order": "lower_first"}),
        (Alternating(), {"lower_steps": 0}),
    ],
)
def test_nothing_is_shared_where_the_lower_variables_move_in_between(
    solver: Solver, options: dict[str, Any]
) -> None:
    class Refusing(Plain):
        def share(self, batch: Batch) -> Batch:
            raise AssertionError

    problem = Refusing()
    if isinstance(solver, Implicit):  # which refuses batch norm in training
        problem.lower.eval()
    run(problem, solver, num_steps=1, throw=False, **options)


def test_the_average_follows_the_weights() -> None:
    problem = Plain()
    average = MovingAverage(problem, 0.75)
    start = [p.detach().clone() for p in problem.parameters()]
    with torch.no_grad():
        for p in problem.parameters():
            p += 1
        problem.lower[1].running_mean.fill_(7)
    average.update()
    average.update()
    for p, q in zip(start, average.problem.parameters(), strict=True):
        torch.testing.assert_close(q, p + 1 - 0.75**2)
        assert not q.requires_grad
    assert (average.problem.lower[1].running_mean == 7).all()


def test_a_resumed_average_equals_the_uninterrupted_one(tmp_path: Any) -> None:
    def averages(num_steps: int, **options: Any) -> dict[str, Tensor]:
        problem = Plain()
        for step in train(
            problem,
            Batches(DATA, 6, seed=0),
            upper_optimizer=torch.optim.Adam(problem.upper.parameters(), 1e-2),
            lower_optimizer=torch.optim.SGD(problem.lower.parameters(), 0.1),
            num_steps=num_steps,
            ema=0.5,
            **options,
        ):
            if step.number == 2:
                step.state.save(tmp_path / "two.pt")
        assert step.state.average is not None
        return {n: t.clone() for n, t in step.state.average.state_dict().items()}

    whole = averages(4)
    resumed = averages(4, resume=tmp_path / "two.pt")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_mixed_precision_reaches_the_losses_and_leaves_the_variables() -> None:
    seen: list[torch.dtype] = []

    class Watching(Plain):
        def upper_loss(self, batch: Batch) -> Tensor:
            loss = super().upper_loss(batch)
            seen.append(loss.dtype)
            return loss

    problem = Watching().float()
    for step in train(
        problem,
        Batches(DATA.float(), 6, seed=0),
        upper_optimizer=torch.optim.SGD(problem.upper.parameters(), 0.1),
        lower_optimizer=torch.optim.SGD(problem.lower.parameters(), 0.1),
        num_steps=2,
        precision=torch.bfloat16,
    ):
        assert step.upper_loss.dtype == torch.float32
    assert set(seen) == {torch.bfloat16}
    assert {p.dtype for p in problem.parameters()} == {torch.float32}

"""Compiled steps: the same numbers as eager ones, the same run after a resume, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bilevel import (
    Alternating,
    Cholesky,
    ConjugateGradient,
    Implicit,
    Problem,
    Solver,
    Step,
    Unrolled,
    train,
)

DATA = torch.randn(60, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Net(Problem):
    """A small network whose weight decay is learned; batch norm, noise drawn at every lower step."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.upper = nn.ParameterDict({"decay": torch.zeros(3)})
        self.scale = torch.full((4, 3), 0.5, dtype=torch.float64)  # neither parameter nor buffer
        # no bias before batch norm: its gradient is rounding error, which Adam would blow up
        self.lower = nn.Sequential(
            nn.Linear(3, 4, bias=False),
            nn.BatchNorm1d(4),
            nn.Tanh(),
            nn.Dropout(dropout),
            nn.Linear(4, 1),
        )
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in self.lower.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) / 2)
        self.double()

    def draw_lower(self, batch: Tensor, generator: torch.Generator, step: int) -> Any:
        noise = torch.randn(len(batch), dtype=batch.dtype, generator=generator)
        return batch, noise / (step + 1)

    def lower_loss(self, batch: Any) -> Any:
        v, noise = batch
        decay = (self.upper["decay"].exp() * (self.scale * self.lower[0].weight) ** 2).mean()
        return (self.lower(v)[:, 0] - v.sum(1) - noise).square().mean() + decay, {"decay": decay}

    def upper_loss(self, batch: Any) -> Tensor:
        error = (self.lower(batch)[:, 0] - batch.sum(1)).square().mean()
        return error + self.upper["decay"].square().sum() / 10


def run(solver: Solver, *, compile: bool, adam: bool = True, **options: Any) -> tuple[Net, Step]:
    problem = Net(options.pop("dropout", 0.0))
    make: Any = torch.optim.Adam if adam else torch.optim.SGD
    settings = {} if adam else {"momentum": 0.9}
    upper = make(problem.upper.parameters(), 1e-2, **settings)
    lower = make(problem.lower.parameters(), 1e-2, **settings)
    *_, last = train(
        problem,
        DATA,
        solver=solver,
        upper_optimizer=upper,
        lower_optimizer=lower,
        lower_scheduler=torch.optim.lr_scheduler.ExponentialLR(lower, 0.9),
        lower_steps=2,
        batch_size=20,
        compile=compile,
        clip_lower=1.0,
        **{"num_steps": 6, **options},
    )
    return problem, last


def assert_same(a: Net, b: Net, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(
        dict(a.state_dict()), dict(b.state_dict()), rtol=tolerance, atol=tolerance
    )


@pytest.mark.usefixtures("traced_only")
@pytest.mark.parametrize(
    ("solver", "adam"),
    [
        (Alternating(), False),
        (Unrolled(num_steps=2), True),
        (Implicit(ConjugateGradient(max_steps=3, damping=1.0, rtol=None)), True),
    ],
    ids=["alternating sgd", "unrolled adam", "implicit"],
)
def test_a_compiled_run_equals_the_eager_one(solver: Solver, adam: bool) -> None:
    """Batch norm's buffers, a schedule, clipping and both optimizers' states included."""
    eager, last = run(solver, compile=False, adam=adam, throw=False)
    compiled, compiled_last = run(solver, compile=True, adam=adam, throw=False)
    assert_same(compiled, eager)
    torch.testing.assert_close(compiled_last.hypergradient.grad, last.hypergradient.grad)
    torch.testing.assert_close(compiled_last.logs, last.logs)
    assert compiled_last.lower_residual is not None
    torch.testing.assert_close(compiled_last.lower_residual, last.lower_residual)
    torch.testing.assert_close(
        compiled_last.hypergradient.stats.response_norm, last.hypergradient.stats.response_norm
    )


@pytest.mark.slow
def test_a_run_through_the_compiler_equals_the_eager_one_and_resumes_to_the_bit(
    tmp_path: Path,
) -> None:
    """The one run of these tests that goes all the way: elsewhere traced steps run as they are.

    Second derivatives, Adam, and a tensor that nobody registered; what is written after three steps
    is compiled once more from the compiler's cache.
    """
    solver = Unrolled(num_steps=1)
    eager, last = run(solver, compile=False)
    whole, compiled_last = run(solver, compile=True)
    assert_same(whole, eager)
    torch.testing.assert_close(compiled_last.hypergradient.grad, last.hypergradient.grad)
    _, half = run(solver, compile=True, num_steps=3)
    half.state.save(tmp_path / "half.pt")
    resumed, _ = run(solver, compile=True, resume=tmp_path / "half.pt")
    assert_same(resumed, whole, tolerance=0.0)


def test_dropout_is_not_compiled_and_says_so() -> None:
    eager, _ = run(Alternating(), compile=False, dropout=0.5)
    with pytest.warns(RuntimeWarning, match=r"runs as without `compile`: a loss draws random"):
        compiled, _ = run(Alternating(), compile=True, dropout=0.5)
    assert_same(compiled, eager, tolerance=0.0)  # nothing of the attempt is left behind


def test_a_loss_that_looks_at_values_is_not_compiled_and_says_so() -> None:
    class Looks(Net):
        def upper_loss(self, batch: Any) -> Tensor:
            loss = Net.upper_loss(self, batch)
            return loss if bool(loss > 0) else -loss

    problem = Looks()
    steps = train(
        problem,
        DATA,
        upper_optimizer=torch.optim.Adam(problem.upper.parameters()),
        num_steps=2,
        lower_steps=0,
        compile=True,
    )
    with pytest.warns(RuntimeWarning, match="the step is not compiled"):
        assert next(steps).number == 1
    assert next(steps).number == 2  # without a second warning


@pytest.mark.parametrize("kind", ["rmsprop", "dampening"])
def test_an_optimizer_without_a_twin_is_not_compiled_and_says_so(kind: str) -> None:
    problem = Net()
    parameters = problem.upper.parameters()
    optimizer: torch.optim.Optimizer = (
        torch.optim.RMSprop(parameters)
        if kind == "rmsprop"
        else torch.optim.SGD(parameters, 0.1, momentum=0.9, dampening=0.5)
    )
    with pytest.warns(RuntimeWarning, match="not compiled.*(RMSprop|dampening)"):
        list(
            train(
                problem, DATA, upper_optimizer=optimizer, num_steps=1, lower_steps=0, compile=True
            )
        )


def test_cholesky_answers_alike_when_traced() -> None:
    """The traced solve goes through LU, the watched one through Cholesky."""
    from bilevel.compile import traced

    matrix = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
    rhs = torch.tensor([1.0, -1.0], dtype=torch.float64)
    watched = Cholesky().solve(lambda v: matrix @ v, rhs)
    with traced():
        blind = Cholesky().solve(lambda v: matrix @ v, rhs)
    torch.testing.assert_close(blind.value, watched.value, rtol=1e-14, atol=1e-14)

"""Turns that begin anew: learned initial values, and lower levels that are reset."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torchopt
from torch import Tensor, nn

from bilevel import (
    SOBA,
    Alternating,
    Cholesky,
    ConjugateGradient,
    Implicit,
    Problem,
    Unrolled,
    check_hypergradient,
    train,
)
from bilevel.solvers.unrolled import MODES
from tests.core import resumed
from tests.problems import Quadratic, normal


class Maml(Problem):
    """A sine is fitted by a network of two layers, whose initial values are the upper variables."""

    def __init__(self, pull: float = 0.0) -> None:
        super().__init__()
        self.pull = pull
        start = {"a": normal(4, 1, seed=1), "b": normal(4, seed=2), "c": normal(4, seed=3)}
        self.upper = nn.ParameterDict(start)
        self.lower = nn.ParameterDict({name: torch.zeros_like(v) for name, v in start.items()})

    def initial_lower(self) -> dict[str, Tensor]:
        return dict(self.upper.items())

    def loss(self, batch: Any) -> Tensor:
        inputs, targets = batch
        hidden = (inputs @ self.lower["a"].mT + self.lower["b"]).tanh()
        return (hidden @ self.lower["c"] - targets).square().mean()

    def upper_loss(self, batch: Any) -> Tensor:
        return self.loss(batch)

    def lower_loss(self, batch: Any) -> Tensor:
        pairs = ((self.lower[n], self.upper[n]) for n in self.upper)
        return self.loss(batch) + self.pull * sum((y - x).square().sum() for y, x in pairs)


def sine(seed: int) -> tuple[Tensor, Tensor]:
    inputs = normal(8, 1, seed=seed)
    return inputs, (2 * inputs[:, 0] + seed).sin()


@pytest.mark.parametrize("mode", MODES)
def test_maml_differentiates_through_its_initial_values(mode: Any) -> None:
    problem = Maml()
    solver = Unrolled(3, torchopt.sgd(0.1), mode=mode)
    batches = sine(1), [sine(2)]
    if mode == "reverse":
        check = check_hypergradient(problem, solver, *batches, tolerance=1e-7)
        assert check.passed, check.verdict
    truth = Unrolled(3, torchopt.sgd(0.1)).hypergradient(problem, *batches)
    found = solver.hypergradient(problem, *batches)
    torch.testing.assert_close(found.grad, truth.grad, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.value, truth.value, rtol=1e-12, atol=0)


def test_maml_of_a_quadratic_in_closed_form() -> None:
    """y_1 = x - a (x - t): F = |y_1 - s|^2 / 2 has the slope (1 - a) (y_1 - s)."""
    t, s, rate = normal(3), normal(3, seed=1), 0.3

    class One(Maml):
        def __init__(self) -> None:
            Problem.__init__(self)
            self.upper = nn.ParameterDict({"y": normal(3, seed=2)})
            self.lower = nn.ParameterDict({"y": torch.zeros(3).double()})

        def upper_loss(self, batch: Any) -> Tensor:
            return (self.lower["y"] - s).square().sum() / 2

        def lower_loss(self, batch: Any) -> Tensor:
            return (self.lower["y"] - t).square().sum() / 2

    problem = One()
    x = problem.upper["y"].detach()
    after = x - rate * (x - t)
    found = Unrolled(1, torchopt.sgd(rate)).hypergradient(problem)
    torch.testing.assert_close(found.grad["y"], (1 - rate) * (after - s), rtol=1e-12, atol=1e-14)


def test_imaml_needs_no_more_than_implicit() -> None:
    """With a proximal term the initial values come through the lower loss itself."""
    hessian, goal, wanted = normal(3, 3), normal(3, seed=1), normal(3, seed=2)
    hessian = hessian @ hessian.mT
    eye = torch.eye(3).double()
    problem = Problem.from_functions(
        lambda x, y, _: (y["y"] - wanted).square().sum() / 2,
        lambda x, y, _: (
            ((y["y"] - goal) @ hessian @ (y["y"] - goal) + 2 * (y["y"] - x["y"]).square().sum()) / 2
        ),
        {"y": normal(3, seed=3)},
        {"y": torch.zeros(3).double()},
    )
    response = torch.linalg.inv(hessian + 2 * eye) * 2
    x = problem.upper.y.detach()
    solution = torch.linalg.solve(hessian + 2 * eye, hessian @ goal + 2 * x)
    with torch.no_grad():
        problem.lower.y.copy_(solution)
    found = Implicit(Cholesky()).hypergradient(problem).grad["y"]
    torch.testing.assert_close(found, response @ (solution - wanted), rtol=1e-10, atol=1e-12)


def test_training_begins_every_turn_at_the_learned_values() -> None:
    problem = Maml(pull=0.5)
    lower = torch.optim.Adam(problem.lower.parameters(), 0.05)
    upper = torch.optim.SGD(problem.upper.parameters(), 0.1)
    settings: dict[str, Any] = {"lower_steps": 3, "num_steps": 3, "solver": Implicit(Cholesky())}
    starts = []
    for _ in train(problem, sine(2), upper_optimizer=upper, lower_optimizer=lower, **settings):
        starts.append({name: x.detach().clone() for name, x in problem.upper.items()})
    # the last turn by hand, from what the upper variables were before it
    again = Maml(pull=0.5)
    again.upper.load_state_dict(starts[-2])
    again.lower.load_state_dict(starts[-2])
    fresh = torch.optim.Adam(again.lower.parameters(), 0.05)
    for _ in range(3):
        fresh.zero_grad()
        again.lower_loss(sine(2)).backward()
        fresh.step()
    torch.testing.assert_close(
        dict(problem.lower.items()), dict(again.lower.items()), rtol=1e-10, atol=1e-12
    )


def test_a_reset_lower_level_is_a_fresh_one_every_turn() -> None:
    def run(**changes: Any) -> list[dict[str, Tensor]]:
        problem = Quadratic()
        found = []
        settings: dict[str, Any] = {
            "upper_optimizer": torch.optim.SGD(problem.upper.parameters(), 0.0),
            "lower_optimizer": torch.optim.Adam(problem.lower.parameters(), 0.1),
            "solver": Implicit(ConjugateGradient()),
            "lower_steps": 4,
            "num_steps": 3,
        }
        for _ in train(problem, **settings, **changes):
            found.append({n: y.detach().clone() for n, y in problem.lower.items()})
        return found

    reset, carried = run(reset_lower=True), run()
    assert torch.equal(reset[0]["y"], carried[0]["y"])
    assert torch.equal(reset[2]["y"], reset[0]["y"])  # x stands still
    assert not torch.equal(carried[2]["y"], carried[0]["y"])


def test_a_run_with_resets_resumes_to_the_bit(tmp_path: Path) -> None:
    def run(**changes: Any) -> dict[str, Any]:
        settings = resumed.make(solver="alternating", **changes)
        return settings | {"reset_lower": True, "lower_steps": 2, "num_steps": 4}

    whole, path = resumed.finish(run()), tmp_path / "run.pt"
    resumed.finish(run(), path, 2)
    resumed.assert_same(resumed.finish(run(resume=path)), whole)


def test_what_resets_would_undo_is_refused() -> None:
    problem = Quadratic()

    def begin(of: Problem = problem, **changes: Any) -> None:
        train(
            of,
            upper_optimizer=torch.optim.SGD(of.upper.parameters(), 0.1),
            lower_optimizer=torch.optim.SGD(of.lower.parameters(), 0.1),
            num_steps=1,
            **changes,
        )

    with pytest.raises(ValueError, match=r"`reset_lower` puts .* back in every turn, and `SOBA`"):
        begin(solver=SOBA(), reset_lower=True)
    with pytest.raises(ValueError, match="undoes the lower steps"):
        begin(order="upper_first", reset_lower=True)
    with pytest.raises(ValueError, match="use compile=False"):
        begin(compile=True, reset_lower=True)
    with pytest.raises(ValueError, match=r"`Maml.initial_lower` says .*; leave `reset_lower` out"):
        begin(Maml(), reset_lower=True, solver=Alternating())


def test_initial_values_are_lower_variables() -> None:
    class Wrong(Maml):
        def __init__(self, made: Any) -> None:
            Maml.__init__(self)
            self.made = made

        def initial_lower(self) -> Any:
            return self.made

    for made, error, said in (
        ({"aa": torch.zeros(1)}, ValueError, "did you mean `a`"),
        (
            {"a": torch.zeros(3)},
            ValueError,
            r"`a` of shape \(3,\), the lower variable has \(4, 1\)",
        ),
        (torch.zeros(1), TypeError, "must return a dict of tensors"),
    ):
        with pytest.raises(error, match=said):
            Unrolled(1, torchopt.sgd(0.1)).hypergradient(Wrong(made), sine(1), [sine(2)])

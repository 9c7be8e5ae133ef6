"""Variables that nothing reaches, complex and sparse ones, and ones named like a method."""

import warnings
from typing import Any

import pytest
import torch
import torchopt
from torch import Tensor, nn

from bilevel import (
    Alternating,
    Cholesky,
    Implicit,
    Problem,
    Solver,
    Unrolled,
    check_hypergradient,
    train,
)
from tests.problems import Quadratic, normal, seeded


def zero(*_: Any) -> Tensor:
    """A loss that no variable changes."""
    return torch.zeros(())


def run(problem: Problem, data: Any = None, *, steps: int = 2, **settings: Any) -> list[Any]:
    defaults: dict[str, Any] = {
        "upper_optimizer": torch.optim.SGD(problem.upper.parameters(), 0.1),
        "lower_optimizer": torch.optim.SGD(problem.lower.parameters(), 0.1),
    }
    return [
        step.hypergradient
        for step in train(problem, data, num_steps=steps, **{**defaults, **settings})
    ]


def functions(how: str) -> Problem:
    """x acts through the lower level only, unless `how` cuts it off."""

    def lower_loss(x: Any, y: Any, _: Any) -> Tensor:
        target = {"kept": x["x"], "detached": x["x"].detach(), "float": float(x["x"].detach())}
        return (y["y"] - target[how]).square() + x["z"] * y["y"]

    upper = {"x": torch.ones(()).double(), "z": torch.ones(()).double()}
    return Problem.from_functions(
        lambda x, y, _: (y["y"] - 3).square(), lower_loss, upper, {"y": torch.zeros(()).double()}
    )


@pytest.mark.parametrize("how", ["detached", "float"])
@pytest.mark.parametrize("solver", [Implicit(), Unrolled(2), Unrolled(2, mode="recompute")])
def test_a_variable_that_no_loss_reaches_is_named_once(how: str, solver: Solver) -> None:
    """Its exact 0 looked like a derivative, with SUCCESS."""
    with pytest.warns(RuntimeWarning, match=r"neither loss depends on `x`, .*detach") as seen:
        found = run(functions(how), solver=solver)
    assert len(seen) == 1
    assert seen[0].filename == __file__
    assert [h.stats.unreached for h in found] == [("x",)] * 2
    assert run(functions("kept"), solver=solver)[0].stats.unreached == ()


def test_alternating_on_a_hyperparameter_problem_says_that_nothing_will_move() -> None:
    with pytest.warns(RuntimeWarning, match=r"upper loss does not depend on `x`, `z`.*Implicit"):
        run(functions("kept"))
    answer = Alternating().hypergradient(functions("kept"))
    assert answer.stats.unreached == ("x", "z")


def test_an_exact_zero_is_remarked_at_the_first_step_only() -> None:
    problem = Quadratic().solve()
    problem.upper_loss = lambda batch: (0 * problem.lower["y"] * problem.upper["x"][0]).sum()  # type: ignore[method-assign]
    with pytest.warns(RuntimeWarning, match="exactly 0 in all upper variables") as seen:
        run(problem, solver=Implicit(Cholesky()))
    assert len(seen) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(Quadratic(), solver=Implicit(Cholesky()))
        run(Quadratic())


# ------------------------------------------------------------------ complex, sparse, names


@pytest.mark.parametrize("level", ["upper", "lower"])
def test_complex_variables_are_refused_and_pairs_of_reals_are_right(level: str) -> None:
    """Five solvers gave five answers."""
    z = torch.tensor([1 + 1j, 2 - 1j], dtype=torch.complex128)
    levels: dict[str, Any] = {"upper": {"a": normal(2)}, "lower": {"z": normal(2)}}
    levels[level] = {"w": nn.Parameter(z)}
    problem = Problem.from_functions(zero, zero, **levels)
    for start in (lambda: Implicit().hypergradient(problem), lambda: run(problem)):
        with pytest.raises(ValueError, match=rf"the {level} variable `w` .*`torch.view_as_real`"):
            start()
    with pytest.raises(TypeError, match=rf"`{level}.w` is complex; keep it as pairs of reals"):
        Problem.from_functions(zero, zero, **{**levels, level: {"w": z}})
    pairs = Problem.from_functions(
        lambda x, y, _: (torch.view_as_complex(y["z"]) - 1).abs().square().sum(),
        lambda x, y, _: (torch.view_as_complex(y["z"]) - z * x["a"]).abs().square().sum(),
        {"a": torch.tensor(1.3).double()},
        {"z": torch.view_as_real(1.3 * z).clone()},
    )
    right = 2 * (z.conj() * (1.3 * z - 1)).real.sum()  # of a -> |a z - 1|^2
    torch.testing.assert_close(Implicit().hypergradient(pairs).grad["a"], right, rtol=1e-7, atol=0)


class Words(Problem):
    def __init__(self, sparse: bool, bag: bool = False) -> None:
        super().__init__()
        make = nn.EmbeddingBag if bag else nn.Embedding
        self.lower = seeded(
            lambda: nn.ModuleDict({"e": make(5, 3, sparse=sparse), "h": nn.Linear(3, 1)})
        )
        self.upper = seeded(lambda: nn.ModuleDict({"e": make(5, 3, sparse=sparse)}))
        self.bag = bag

    def words(self, batch: Tensor) -> Tensor:
        both = self.lower["e"](batch).tanh() * (1 + self.upper["e"](batch))
        return both if self.bag else both.mean(1)

    def upper_loss(self, batch: Any) -> Tensor:
        return (self.lower["h"](self.words(batch)) - 1).square().mean()

    def lower_loss(self, batch: Any) -> Tensor:
        return self.upper_loss(batch) + 0.1 * self.lower["h"].weight.square().sum()


@pytest.mark.parametrize(
    "solver",
    [
        Alternating(),
        Implicit(Cholesky(damping=50.0)),
        Unrolled(3, torchopt.adam(0.1)),
        Unrolled(3, torchopt.sgd(0.1), mode="recompute"),
        Unrolled(3, torchopt.sgd(0.1), mode="forward"),
    ],
)
def test_sparse_gradients_are_right(solver: Solver) -> None:
    """Every solver failed with another internal message."""
    rows = torch.tensor([[0, 1, 1], [3, 0, 2]])
    dense, sparse = (
        solver.hypergradient(Words(s), rows, [rows.flip(1)]).grad for s in (False, True)
    )
    torch.testing.assert_close(sparse, dense, rtol=1e-12, atol=1e-15)
    trained = [Words(s) for s in (False, True)]
    for problem in trained:
        run(problem, rows, solver=solver, clip_lower=0.1)
        assert problem.lower["e"].sparse == (problem is trained[1])
    one, two = (p.state_dict() for p in trained)
    torch.testing.assert_close(two, one, rtol=1e-12, atol=1e-15)


def test_bags_of_embeddings_have_no_second_derivative() -> None:
    rows = torch.tensor([[0, 1, 1], [3, 0, 2]])
    assert run(Words(True, bag=True), rows)[0].grad["e.weight"].abs().sum() > 0
    with pytest.raises(
        ValueError, match=r"`e` .EmbeddingBag.* no second derivative .*`nn.Embedding`"
    ):
        run(Words(True, bag=True), rows, solver=Implicit())


@pytest.mark.parametrize("name", ["type", "half", "tensors", "training", "forward", "_order"])
def test_a_variable_may_be_named_like_a_method(name: str) -> None:
    def make() -> Problem:
        return Problem.from_functions(
            lambda x, y, _: (y[name][name] - 3).square().sum(),
            lambda x, y, _: (y[name][name] - x[name]).square().sum(),
            {name: torch.zeros(2).double()},
            {name: {name: torch.zeros(2).double()}},
        )

    problem = make()
    assert check_hypergradient(problem, Implicit()).passed
    run(problem, solver=Implicit(), lower_steps=2)
    other = make()
    other.load_state_dict(problem.state_dict())
    torch.testing.assert_close(other.variables("upper"), problem.variables("upper"))
    assert list(problem.variables("lower")) == [f"{name}.{name}"]


@pytest.mark.parametrize("name", ["a.b", "", 0])
def test_other_names_are_refused(name: Any) -> None:
    with pytest.raises(
        ValueError, match=r"a variable of `lower` is named .* a string without dots"
    ):
        Problem.from_functions(zero, zero, {"x": normal(1)}, {name: normal(1)})
    for bad in ([normal(1)], nn.Linear(1, 1)):
        with pytest.raises(TypeError, match="`upper` must be a dict of tensors"):
            Problem.from_functions(zero, zero, bad, {"y": normal(1)})  # type: ignore[arg-type]

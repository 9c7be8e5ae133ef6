"""Bad input gives one clear error, before the first step."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torchopt
from torch import nn
from torch.nn.utils import parametrizations

from bilevel import (
    Alternating,
    Batches,
    Implicit,
    Problem,
    Solver,
    Unrolled,
    check_hypergradient,
    check_second_order,
    train,
)
from tests.problems import NetProblem, Quadratic, normal, old_spectral_norm, regression, seeded

SECOND_ORDER: list[Solver] = [Implicit(), Unrolled(2, torchopt.sgd(0.1))]


def start(problem: Problem, **changes: Any) -> None:
    """Call `train` and take no step; nothing may have moved."""
    before = {n: t.clone() for n, t in problem.state_dict().items()}
    settings = {
        "upper_optimizer": lambda: torch.optim.SGD(problem.upper.parameters(), 0.1),
        "lower_optimizer": lambda: torch.optim.SGD(problem.lower.parameters(), 0.1),
    }
    made = {n: make() for n, make in settings.items() if n not in changes}
    try:
        train(problem, **{**made, "num_steps": 3, **changes})
    finally:
        torch.testing.assert_close(dict(problem.state_dict()), before, rtol=0, atol=0)


def functions(upper: Any = None, lower: Any = None, **levels: Any) -> Problem:
    return Problem.from_functions(
        upper or (lambda x, y, _: (x["x"] - y["y"]).square().sum()),
        lower or (lambda x, y, _: (x["x"] - y["y"]).square().sum()),
        levels.get("x", {"x": normal(2)}),
        levels.get("y", {"y": normal(2)}),
    )


def test_a_level_without_variables() -> None:
    sgd = torch.optim.SGD([torch.zeros(1)], 0.1)
    for problem in (functions(x={}), functions(x={}, y={})):
        with pytest.raises(ValueError, match=r"the upper level .* has no trainable variables"):
            start(problem, upper_optimizer=sgd, lower_optimizer=sgd)


@pytest.mark.parametrize(
    "solver", [Implicit(), Unrolled(num_steps=2)], ids=lambda s: type(s).__name__
)
def test_a_single_level_is_for_alternating(solver: Solver) -> None:
    frozen = {"y": nn.Parameter(normal(2), requires_grad=False)}
    problem = functions(y=frozen)
    name = type(solver).__name__
    with pytest.raises(ValueError, match=f"`{name}` needs a lower level.*no trainable variables"):
        solver.hypergradient(problem)
    sgd = torch.optim.SGD(problem.upper.parameters(), 0.1)
    with pytest.raises(ValueError, match="`lower_optimizer` holds none of the lower variables"):
        start(problem, upper_optimizer=sgd, lower_optimizer=torch.optim.SGD([normal(2)], 0.1))
    with torch.no_grad():
        problem.upper.x.add_(1)  # away from the optimum, where the gradient is exactly 0
    *_, last = train(problem, upper_optimizer=sgd, num_steps=100, lower_steps=0)
    assert float(last.upper_loss) < 1e-12


@pytest.mark.parametrize("bad", [lambda v: v, lambda v: None, lambda v: (v.sum(), 3)])
def test_a_loss_that_is_no_scalar(bad: Callable[[Any], Any]) -> None:
    problem = functions(upper=lambda x, y, _: bad(y["y"]))
    with pytest.raises(TypeError, match=r"`FunctionProblem\.upper_loss` must return a scalar"):
        Alternating().hypergradient(problem)


def test_a_lower_loss_without_lower_variables() -> None:
    problem = functions(lower=lambda x, y, _: (x["x"] - y["y"].detach()).square().sum())
    for solver in SECOND_ORDER:
        with pytest.raises(ValueError, match="does not depend on any of its 1 lower variables"):
            solver.hypergradient(problem)


class Stopped(Quadratic):
    stops_lower_gradient = "it is stopped at the posterior; use variant='complete'"


@pytest.mark.parametrize("solver", [*SECOND_ORDER, Unrolled(2)], ids=lambda s: type(s).__name__)
def test_a_stopped_gradient_is_refused_by_name(solver: Solver) -> None:
    match = f"`{type(solver).__name__}` needs .* in `Stopped` it is stopped at .*'complete', or"
    with pytest.raises(ValueError, match=match):
        start(Stopped(), solver=solver)
    assert Alternating().hypergradient(Stopped()).grad["x"].isfinite().all()


@pytest.mark.parametrize("norm", [torch.nn.utils.weight_norm, parametrizations.weight_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
def test_weight_norm_is_refused_below_and_right_above(norm: Any) -> None:
    problem = NetProblem(seeded(lambda: nn.Sequential(norm(nn.Linear(3, 1)))))
    for solver in SECOND_ORDER:
        with pytest.raises(ValueError, match="weight_norm's second derivative is silently wrong"):
            start(problem, solver=solver)
    start(problem, solver=Alternating())
    above = NetProblem(seeded(lambda: nn.Linear(3, 1)))
    above.upper["weigh"] = seeded(lambda: nn.Sequential(norm(nn.Linear(3, 1)), nn.Sigmoid()))
    check = check_hypergradient(
        above, Unrolled(3, torchopt.sgd(0.1)), regression(), [regression()], tolerance=1e-8
    )
    assert check.passed, check.verdict


def test_variables_of_both_levels_are_lower_ones() -> None:
    """Not refused: the lower level decides their value, F gives their upper gradient."""
    shared = nn.Parameter(normal(2))
    problem = functions()
    problem.upper.shared, problem.lower.shared = shared, shared
    problem.upper_loss = lambda batch: (problem.lower.shared * problem.lower.y).sum()  # type: ignore[method-assign]
    grad = Alternating().hypergradient(problem).grad
    assert list(grad) == ["x", "shared"]
    torch.testing.assert_close(grad["shared"], problem.lower.y.detach(), rtol=0, atol=0)


def test_optimizers() -> None:
    other = torch.optim.SGD([torch.zeros(1)], 0.1)
    for level in ("upper", "lower"):
        with pytest.raises(ValueError, match=f"`{level}_optimizer` holds none of the {level} var"):
            start(Quadratic(), **{f"{level}_optimizer": other})
    problem = Quadratic()
    good = torch.optim.SGD(problem.lower.parameters(), 0.1)
    with pytest.raises(ValueError, match="`lower_optimizer` holds none"):
        start(problem, lower_optimizer=[good, other])
    with pytest.raises(TypeError, match="`LBFGS`"):
        start(problem, lower_optimizer=torch.optim.LBFGS(problem.lower.parameters()))
    with pytest.raises(TypeError, match="`SparseAdam`, which takes sparse gradients only"):
        start(problem, lower_optimizer=torch.optim.SparseAdam(problem.lower.parameters()))
    with pytest.raises(TypeError, match="no differentiable twin of `Adadelta`"):
        start(
            problem,
            solver=Unrolled(2),
            lower_optimizer=torch.optim.Adadelta(problem.lower.parameters()),
        )
    for nobody in (None, ()):
        with pytest.raises(ValueError, match="there is no `lower_optimizer`"):
            start(problem, lower_optimizer=nobody)
    with pytest.raises(ValueError, match="branches from the running lower optimizer"):
        start(problem, solver=Unrolled(2), lower_optimizer=None, lower_steps=0)
    with pytest.raises(ValueError, match="two lower optimizers move `y`"):
        Unrolled(2).hypergradient(problem, lower_optimizer=[good, good])
    with pytest.raises(ValueError, match="moves none of the variables"):
        Unrolled(2).hypergradient(problem, lower_optimizer=other)


def test_unrolled_settings() -> None:
    with pytest.raises(TypeError, match="leave it out to branch from the running `SGD`"):
        Unrolled(2, torch.optim.SGD([torch.zeros(1)], 0.1))
    with pytest.raises(TypeError, match="must be a torchopt transformation"):
        Unrolled(2, "sgd")
    for bad in ({"num_steps": 0}, {"truncate": 5}, {"mode": "backward"}, {"max_grad_norm": 0.0}):
        with pytest.raises(ValueError, match=f"`{next(iter(bad))}` must"):
            Unrolled(**{"num_steps": 2, **bad})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="3 are needed, got 2"):
        Unrolled(3, torchopt.sgd(0.1)).hypergradient(Quadratic(), None, [None, None])
    with pytest.raises(TypeError, match="`linear_solver` must be"):
        Implicit("cg")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"order": "both"}, "`order` must be"),
        ({"num_steps": 0}, "`num_steps` must be positive"),
        ({"lower_steps": -1}, "`lower_steps` must be zero or more"),
        ({"check_every": 0}, "`check_every` must be positive"),
    ],
)
def test_train_settings(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        start(Quadratic(), **changes)


def test_data() -> None:
    nan = torch.zeros(5, 2)
    nan[3, 1] = float("nan")
    cases: list[tuple[Any, Any, str]] = [
        (torch.zeros(0, 3), None, "the data are empty"),
        ((torch.zeros(3), torch.zeros(4)), None, r"got lengths \[3, 4\]"),
        (nan, None, r"1 of 5 rows \(index 3\)"),
        (torch.zeros(3), 4, "between 1 and the number of rows, 3; got 4"),
    ]
    for data, size, match in cases:
        with pytest.raises(ValueError, match=match):
            start(Quadratic(), data=data, batch_size=size)
    for wrong in ([1.0, 2.0], np.zeros(3).tolist(), "digits", 3):
        with pytest.raises(TypeError, match="`data` must be a pytree of tensors"):
            start(Quadratic(), data=wrong)
    with pytest.raises(TypeError, match="got a ndarray among them"):
        Batches((torch.zeros(2), np.zeros(2)))


def test_an_iterator_cannot_be_read_twice() -> None:
    problem = Quadratic()
    steps = train(
        problem,
        iter([None]),
        num_steps=3,
        lower_steps=0,
        upper_optimizer=torch.optim.SGD(problem.upper.parameters(), 0.1),
    )
    next(steps)
    with pytest.raises(ValueError, match="can be read once only"):
        next(steps)


def test_from_functions_names_what_is_no_tensor() -> None:
    with pytest.raises(TypeError, match=r"`lower\.net\.w` must be a tensor .* got float"):
        functions(y={"net": {"w": 1.0}})


def test_float32_cannot_be_differenced() -> None:
    with pytest.raises(ValueError, match=r"need float64, but `upper\.x` is torch\.float32"):
        check_hypergradient(Quadratic().float(), Implicit())


def test_findings() -> None:
    net = nn.Sequential(
        nn.LayerNorm(3),
        nn.BatchNorm1d(3),
        parametrizations.weight_norm(nn.Linear(3, 3)),
        parametrizations.spectral_norm(nn.Linear(3, 3)),
        old_spectral_norm(nn.Linear(3, 3)),
        nn.MultiheadAttention(4, 2),
    )
    second = {f.name: f.wrong for f in check_second_order(net)}
    assert second == {"2": True, "3": False, "4": False, "5": False}
    assert {f.name for f in check_second_order(net, order=3)} == {"0", "1", *second}
    assert "1" not in {f.name for f in check_second_order(net.eval(), order=3)}
    with pytest.raises(ValueError, match="`order` must be 2 or 3"):
        check_second_order(net, order=1)


def test_forward_mode_says_what_torch_lacks() -> None:
    """torch has no forward derivative of `mse_loss`'s and `huber_loss`'s backward."""
    problem = functions(lower=lambda x, y, _: nn.functional.mse_loss(y["y"], x["x"]))
    with pytest.raises(RuntimeError, match="use `mode='recompute'`"):
        Unrolled(2, torchopt.sgd(0.1), mode="forward").hypergradient(problem)
    again = Unrolled(2, torchopt.sgd(0.1), mode="forward").hypergradient(functions())
    assert again.grad["x"].isfinite().all()  # the failure leaves nothing behind

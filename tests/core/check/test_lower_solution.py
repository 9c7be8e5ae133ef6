"""The lower minimum that `check_hypergradient` compares with."""

import pytest
import torch
from torch import nn

from bilevel import Cholesky, Implicit, Problem, check_hypergradient
from bilevel.check import solve_lower
from bilevel.oracles import Oracles
from tests.core.check.cases import DOUBLE, number
from tests.problems import Ridge, normal, regression


def test_a_lower_level_without_minimum_is_one_sentence() -> None:
    problem = Problem.from_functions(
        lambda x, y, _: (y["y"] - 1).square().sum(),
        lambda x, y, _: (y["y"] * 2).sum() + x["x"],
        {"x": number(1.0)},
        {"y": torch.zeros(2, **DOUBLE)},
    )
    with pytest.raises(ValueError, match=r"could not be solved.*linear in a variable"):
        check_hypergradient(problem, Implicit())
    assert all(bool((p == q).all()) for p, q in zip(problem.parameters(), [1.0, 0.0], strict=True))


@pytest.mark.parametrize("n", [20, 1100])
def test_the_lower_minimum_is_found_to_rounding(n: int) -> None:
    """By dense Newton steps, and by conjugate gradients where there are many variables."""
    curvature = torch.linspace(1, 50, n, **DOUBLE)
    target = normal(n)
    problem = Problem.from_functions(
        lambda x, y, _: y["y"].sum(),
        lambda x, y, _: (curvature * ((y["y"] - target).cosh() - 1)).sum() + 0 * x["x"],
        {"x": number(1.0)},
        {"y": torch.zeros(n, **DOUBLE)},
    )
    solution = solve_lower(Oracles(problem, None, [None]))["y"]
    torch.testing.assert_close(solution, target, rtol=0, atol=1e-12)


def test_an_answer_is_not_blamed_for_an_inexact_minimum() -> None:
    """A minimum at infinity: Newton's last step stays long, and enters the uncertainty."""
    problem = Problem.from_functions(
        lambda x, y, _: y["y"].sum(),
        lambda x, y, _: (-y["y"]).exp().sum() * x["x"],
        {"x": number(1.0)},
        {"y": torch.zeros(1, **DOUBLE)},
    )
    check = check_hypergradient(problem, Implicit(Cholesky()))
    assert not str(check).startswith("disagrees"), check


def test_ridge_regression_still_reaches_ten_digits() -> None:
    test, train = regression(seed=7), regression(seed=9)
    check = check_hypergradient(Ridge(), Implicit(Cholesky()), test, [train], tolerance=1e-10)
    assert check.passed, check


def test_several_lower_batches_are_one_lower_loss() -> None:
    """`Implicit` averages the lower batches, and so does the solution it is compared with."""
    test, first, second = regression(seed=7), regression(seed=9), regression(seed=11)
    whole = tuple(torch.cat(parts) for parts in zip(first, second, strict=True))
    several = check_hypergradient(
        Ridge(), Implicit(Cholesky()), test, [first, second], tolerance=1e-9
    )
    assert several.passed, several
    together = check_hypergradient(Ridge(), Implicit(Cholesky()), test, [whole], tolerance=1e-9)
    torch.testing.assert_close(several.truth, together.truth, rtol=1e-8, atol=0)


def test_complex_variables_are_refused_with_advice_that_helps() -> None:
    problem = Problem.from_functions(
        lambda x, y, _: y["z"].abs().square().sum(),
        lambda x, y, _: (y["z"] - x["a"]).abs().square().sum(),
        {"a": number(1.0)},
        {"z": nn.Parameter(torch.zeros(2, dtype=torch.complex128))},
    )
    with pytest.raises(ValueError, match=r"`z` .* is complex; keep it as pairs of reals"):
        check_hypergradient(problem, Implicit())

"""The modes of `Unrolled` are one derivative computed in several ways."""

from typing import Any

import pytest
import torch
import torchopt

from bilevel import Problem, Unrolled
from bilevel.solvers.segments import cuts
from tests.problems import ROWS, Quadratic, normal
from tests.solver_rows import adam

SEGMENTED = ["checkpoint", "mixed"]


@pytest.mark.parametrize("row_name", ROWS)
def test_segments_equal_reverse_mode(row_name: str) -> None:
    row = ROWS[row_name]
    problem = row.make()
    optimizer = adam(problem)
    reverse, *others = (
        Unrolled(6, mode=mode).hypergradient(
            problem, row.upper_batch, [row.lower_batch], lower_optimizer=optimizer
        )
        for mode in ("reverse", *SEGMENTED)
    )
    rtol = 1e-10 if row.exact else 1e-5
    for other in others:
        torch.testing.assert_close(other.grad, reverse.grad, rtol=rtol, atol=1e-12)
        torch.testing.assert_close(other.value, reverse.value, rtol=rtol, atol=0)
        residuals = other.stats.lower_residual, reverse.stats.lower_residual
        torch.testing.assert_close(*residuals, rtol=rtol, atol=1e-12)


@pytest.mark.parametrize("mode", SEGMENTED)
def test_truncated_and_clipped_segments(mode: Any) -> None:
    settings: Any = {"optimizer": torchopt.adam(0.05), "truncate": 7, "max_grad_norm": 0.5}
    problem = Quadratic()
    truth = Unrolled(9, **settings).hypergradient(problem).grad["x"]
    found = Unrolled(9, mode=mode, **settings).hypergradient(problem).grad["x"]
    torch.testing.assert_close(found, truth, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 10, 97])
def test_segments_cover_all_steps(steps: int) -> None:
    found = cuts(5, 5 + steps)
    assert [t for a, b in found for t in range(a, b)] == list(range(5, 5 + steps))
    lengths = [b - a for a, b in found]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] <= 2 * steps**0.5


def test_mixed_mode_notices_a_backward_pass_that_drops_tangents() -> None:
    """torch's backward of a determinant uses factors that the forward pass saved, without tangents."""
    base = torch.eye(3).double() + normal(3, 3) / 5
    problem = Problem.from_functions(
        lambda x, y, _: y["y"].sin().sum(),
        lambda x, y, _: torch.linalg.det(base * (1 + x["x"]) + y["y"]) + y["y"].square().sum(),
        {"x": torch.tensor(0.3).double()},
        {"y": torch.zeros(3, 3).double()},
    )
    with pytest.raises(ValueError, match=r'than its reverse mode .*; use `mode="checkpoint"`'):
        Unrolled(3, torchopt.sgd(0.1), mode="mixed").hypergradient(problem)

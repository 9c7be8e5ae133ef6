"""Differences of one function: their order, and where they may not be trusted."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from bilevel.check.differences import Ladder, climb_down, directions, shares
from tests.core.check.cases import DOUBLE, number
from tests.problems import generator


def derivative(function: Callable[[float], float], tolerance: float = 1e-5) -> Any:
    ladder = Ladder(function, function(0.0), 0.0, 1.0)
    return climb_down([ladder], tolerance, 0.0)[0]


def test_differences_of_a_smooth_function_are_of_fourth_order() -> None:
    found = derivative(lambda t: float(number(1 + t).sin()))
    truth = float(number(1.0).cos())
    assert (
        abs(found.value - truth) < 1e-11
    )  # h^4 f5 / 7680 = 5e-13 at the first step, rounding 1e-13
    assert found.noise < 1e-6


@pytest.mark.parametrize("distance", [3e-3, 1e-4, 1e-6])
def test_differences_come_closer_than_the_nearest_kink(distance: float) -> None:
    found = derivative(lambda t: t + 5 * max(t - distance, 0.0))
    assert abs(found.value - 1) < 1e-8  # rounding over the step
    assert found.step < distance


def test_a_kink_at_the_point_is_uncertainty_not_truth() -> None:
    """The mean of both slopes, .5, is found at every step: central differences cannot see it."""
    found = derivative(lambda t: 3.0 + max(t, 0.0))
    assert found.noise > 0.4


def test_noise_of_the_function_is_noise_of_the_derivative() -> None:
    def rough(t: float) -> float:
        return t + 1e-4 * (hash(t) % 1000 / 1000)

    found = derivative(rough)
    assert abs(found.value - 1) < 3 * found.noise


def test_steps_stay_where_the_function_is_finite() -> None:
    found = derivative(lambda t: float(number(1e-6 + t).sqrt()))
    assert found.value == pytest.approx(500, rel=1e-8)


def test_every_variable_gets_a_direction() -> None:
    assert shares([3, 1, 2], 6) == [3, 1, 2]
    assert shares([1000, 1, 40], 32) == [16, 1, 15]
    assert shares([5, 5, 5], 1) == [1, 1, 1]


def test_directions_move_each_entry_by_its_own_size() -> None:
    point = torch.tensor([1e-6, 1.0, 1e3] * 10, **DOUBLE)
    along, lengths = directions(point, 4, generator())
    torch.testing.assert_close(along.norm(dim=1), torch.ones(4, **DOUBLE))
    moves = along.abs() * torch.tensor(lengths)[:, None]
    assert bool((moves <= 5 * point).all())

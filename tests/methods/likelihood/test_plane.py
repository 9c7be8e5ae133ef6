"""Densities on the plane, normalised on a grid: against closed forms and quadrature of another kind."""

import math

import pytest
import torch

from bilevel.methods import GaussianRBM, MaximumLikelihood, ScoreMatching
from bilevel.methods.data.densities import density
from bilevel.methods.likelihood import plane_density

WIDE = (-12.0, 12.0), (-9.0, 9.0)


def rbm() -> GaussianRBM:
    made = GaussianRBM(2, 3).double()
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(4)) / 2)
    return made


def test_a_machine_has_its_own_partition_function() -> None:
    """log Z by enumeration of the hidden states and by the grid, and so every likelihood."""
    made = rbm()
    found = plane_density(MaximumLikelihood(made), WIDE, size=200)
    assert found.log_partition == pytest.approx(made.log_partition().item(), abs=1e-9)
    v = torch.randn(20, 2, generator=torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(found.log_prob(v), made.log_likelihood(v).detach())
    assert not found.log_prob(v).requires_grad


def test_the_density_is_one_on_its_cells_and_lies_where_it_is() -> None:
    moons = density("moons")
    box = (-0.3, 1.3), (-0.1, 1.1)
    found = plane_density(lambda v: 5 - moons.log_prob(v), box, size=150)
    assert found.log_partition == pytest.approx(-5, abs=1e-6)
    area = 1.6 * 1.2 / 150**2
    assert float(found.log_density.exp().sum() * area) == pytest.approx(1, abs=1e-12)
    row, column = 30, 100  # the first coordinate along the rows
    v = torch.tensor([[-0.3 + 1.6 * 30.5 / 150, -0.1 + 1.2 * 100.5 / 150]])
    expected = float(moons.log_prob(v))
    assert float(found.log_density[row, column]) == pytest.approx(expected, abs=1e-3)
    outside = torch.tensor([[0.5, 1.2], [-0.4, 0.5]])
    assert found.log_prob(outside).tolist() == [-math.inf] * 2


def test_a_box_that_cuts_the_density_is_remarked() -> None:
    with pytest.warns(UserWarning, match="density is 62% of its highest value"):
        plane_density(lambda v: v.square().sum(1) / 2, ((-1.0, 8.0), (-8.0, 8.0)), size=200)
    bounded = ScoreMatching(torch.nn.Sequential(torch.nn.Linear(2, 1), torch.nn.Flatten(0)))
    bounded.visible_range = (0.0, 1.0)
    plane_density(bounded, ((0.0, 1.0), (0.0, 1.0)), size=20)


def test_what_has_no_density_on_the_plane_is_refused() -> None:
    with pytest.raises(ValueError, match="low < high"):
        plane_density(lambda v: v.sum(1), ((1.0, -1.0), (0.0, 1.0)))
    with pytest.raises(ValueError, match="one number per point"):
        plane_density(lambda v: v, ((-1.0, 1.0), (0.0, 1.0)))
    with pytest.raises(ValueError, match="NaN or infinite at some points"):
        plane_density(lambda v: v.sum(1).log(), ((-1.0, 1.0), (0.0, 1.0)))

"""The picture of a density on the plane."""

import sys

import numpy as np
import pytest
import torch
from torch import Tensor

from bilevel.methods import MaximumLikelihood, ScoreMatching
from bilevel.methods.machines import GaussianRBM
from bilevel.methods.report import plot_density


def round_energy(v: Tensor) -> Tensor:
    """About (1, -2), narrower in the second coordinate."""
    return (v[:, 0] - 1).square() / 2 + 2 * (v[:, 1] + 2).square()


def test_the_shading_is_the_density_the_right_way_up() -> None:
    figure = plot_density(round_energy, box=((-5.0, 5.0), (-6.0, 6.0)), size=240)
    (image,) = figure.axes[0].images
    shade = np.asarray(image.get_array())
    row, column = np.unravel_index(shade.argmax(), shade.shape)
    assert image.origin == "lower"
    assert -6 + 12 * (row + 0.5) / 240 == pytest.approx(-2, abs=0.2)
    assert -5 + 10 * (column + 0.5) / 240 == pytest.approx(1, abs=0.2)
    assert shade.max() == pytest.approx(1 / np.pi, rel=0.02)
    assert image.get_extent() == [-5, 5, -6, 6]


def test_data_and_samples_have_panels_of_their_own() -> None:
    points = torch.randn(1500, 2, generator=torch.Generator().manual_seed(0))
    model = MaximumLikelihood(GaussianRBM(2, 2))
    figure = plot_density(model, data=2 * points, samples=points, size=40)
    titles = [axes.get_title(loc="left") for axes in figure.axes[:3]]
    assert titles == ["density", "data, 1,000 points", "samples, 1,000 points"]
    assert [len(axes.collections) for axes in figure.axes[:3]] == [0, 1, 1]
    (left, right), low = figure.axes[0].get_xlim(), float(2 * points[:, 0].min())
    assert left < low < right
    bounded = ScoreMatching(torch.nn.Sequential(torch.nn.Linear(2, 1), torch.nn.Flatten(0)))
    bounded.visible_range = (-1.0, 1.0)
    assert plot_density(bounded, size=20).axes[0].get_xlim() == (-1, 1)


def test_what_cannot_be_drawn_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="nothing to tell where the density is"):
        plot_density(round_energy)
    with pytest.raises(ValueError, match=r"`samples` must be of shape \(n, 2\), got \(5, 3\)"):
        plot_density(round_energy, samples=torch.zeros(5, 3), box=((-5.0, 5.0), (-6.0, 6.0)))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"bilevel\[report\]"):
        plot_density(round_energy, box=((-5.0, 5.0), (-6.0, 6.0)))
